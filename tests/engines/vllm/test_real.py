"""SmolLM2 in the real engine: A, B, A; and all that can go wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .engine import addresses, digest, model_of, reload, said, start, stop  # skips without vLLM

from safetensors.torch import load_file  # isort: skip
from tests.aliasparam.peak import peak_bytes  # isort: skip

IS_A, IS_B = "This is checkpoint A.", "This is checkpoint B."
Stream = Iterator[tuple[str, Tensor]]


@pytest.fixture(scope="module")
def fresh(real: tuple[Path, Path]) -> Iterator[tuple[Any, list[str]]]:
    """An engine of A, and the digest of a fresh engine of B, which came before."""
    llm = start(real[1])
    assert said(llm) == IS_B
    of_b = digest(llm)
    stop(llm)
    llm = start(real[0])
    yield llm, of_b
    stop(llm)


def test_law_9_reloads_equal_fresh_starts_and_move_nothing(fresh: Any, real: tuple[Path, Path]) -> None:
    llm, of_b = fresh
    before, of_a = addresses(llm), digest(llm)
    assert said(llm) == IS_A and len(before[0]) > 1000

    reload(llm, weights_path=str(real[1]))
    assert said(llm) == IS_B and digest(llm) == of_b
    reload(llm, weights_path=str(real[0]))
    assert said(llm) == IS_A and digest(llm) == of_a != of_b
    assert addresses(llm) == before


def test_law_4_a_reload_needs_room_for_no_second_copy_of_declared_layers(fresh: Any, real: tuple[Path, Path]) -> None:
    """vLLM's own reload holds the embedding twice, a fresh one and what came for it; all layers of ours add a little."""
    llm, of_b = fresh
    named = list(model_of(llm).named_parameters())
    embedding = max(parameter.nbytes for _, parameter in named)
    declared = sum(parameter.nbytes for name, parameter in named if "_proj" in name)

    peak = peak_bytes(lambda: reload(llm, weights_path=str(real[1])), torch.device("cpu"))
    assert 2 * embedding < peak < 2 * embedding + declared / 10 and digest(llm) == of_b
    reload(llm, weights_path=str(real[0]))


def broken(tensors: dict[str, Tensor]) -> Stream:
    for number, item in enumerate(tensors.items()):
        if number == 300:
            raise ConnectionError("the stream broke")
        yield item


def without(name: str) -> Callable[[dict[str, Tensor]], Stream]:
    return lambda tensors: ((n, t) for n, t in tensors.items() if n != name)


FAULTS: dict[str, Callable[[dict[str, Tensor]], Stream]] = {
    "a broken stream": broken,
    "a part of a fused tensor": without("model.layers.3.self_attn.k_proj.weight_scale"),
    "a scalar": without("model.layers.3.mlp.up_proj.input_scale"),
    "a layer of vLLM's own": without("model.layers.3.input_layernorm.weight"),
    "the embedding": without("model.embed_tokens.weight"),
}


@pytest.mark.parametrize("policy", ["write-through", "staged", "journal"])
def test_law_10_what_fails_is_refused_or_leaves_the_old_weights_and_the_engine_goes_on(
    policy: str, fresh: Any, real: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, of_b = fresh
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", policy)
    new, of_a, before = load_file(real[1] / "model.safetensors"), digest(llm), addresses(llm)
    faults = list(FAULTS) if policy == "write-through" else ["a broken stream", "the embedding"]

    for fault in faults:
        with pytest.raises(Exception, match=r"stream broke|did not arrive whole"):
            reload(llm, weights_iterator=FAULTS[fault](new))
        if policy == "write-through":
            assert said(llm) == "(error)", fault
        else:
            assert said(llm) == IS_A and digest(llm) == of_a, fault
    reload(llm, weights_path=str(real[1]))
    assert said(llm) == IS_B and digest(llm) == of_b

    reload(llm, weights_path=str(real[0]))
    assert said(llm) == IS_A and addresses(llm) == before


@pytest.mark.parametrize("policy", ["write-through", "staged"])
def test_a_sender_may_use_its_buffer_again(
    policy: str, fresh: Any, real: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own layers wait for fused shards by reference, and get what the buffer holds then."""
    llm, of_b = fresh
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", policy)
    new = load_file(real[1] / "model.safetensors")
    buffer = torch.empty(max(t.nbytes for t in new.values()), dtype=torch.uint8)

    def one_buffer() -> Stream:
        for name, tensor in new.items():
            value = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            yield name, value.copy_(tensor)
            buffer.fill_(77)

    reload(llm, weights_iterator=one_buffer())
    assert said(llm) == IS_B and digest(llm) == of_b
    reload(llm, weights_path=str(real[0]))


def test_a_folder_that_does_not_fit_is_refused_before_the_first_write(
    fresh: Any, real: tuple[Path, Path], tmp_path: Path
) -> None:
    llm, _ = fresh
    bad = tmp_path / "bad"
    bad.mkdir()
    bad.joinpath("model.safetensors").write_bytes((real[1] / "model.safetensors").read_bytes()[:-100])
    of_a = digest(llm)

    for folder, said_of_it in ((bad, "truncated|shorter|ends|bytes"), (tmp_path / "none", "no such folder")):
        with pytest.raises(Exception, match=said_of_it):
            reload(llm, weights_path=str(folder))
        assert said(llm) == IS_A and digest(llm) == of_a
    assert llm.llm_engine.vllm_config.model_config.model == str(real[0])
