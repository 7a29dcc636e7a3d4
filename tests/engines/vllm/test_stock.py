"""Defects of vLLM's own layerwise reload (0.32.0), each beside ours.

vLLM's NVFP4 has no kernel on a CPU, so its own reload is shown on a model in bf16, whose fused q, k and v wait for each other as
scales do; the same streams go through ours on a model in NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .engine import digest, model_of, reload, start, stop, tokens  # skips without vLLM

from safetensors.torch import load_file  # isort: skip
from .tiny import tiny_dense, tiny_plain, twins  # isort: skip

Stream = Iterator[tuple[str, Tensor]]
ATTENTION = "model.layers.0.self_attn"


class Served:
    """An engine of A, and what a fresh engine of B answers."""

    def __init__(self, folders: tuple[Path, Path]) -> None:
        self.b, fresh = folders[1], start(folders[1], skip_tokenizer_init=True)
        self.right = tokens(fresh), digest(fresh)
        stop(fresh)
        self.llm = start(folders[0], skip_tokenizer_init=True)
        assert tokens(self.llm) != self.right[0]

    def takes(self, change: Callable[[dict[str, Tensor]], Stream]) -> None:
        reload(self.llm, weights_iterator=change(load_file(self.b / "model.safetensors")))

    def is_right(self) -> bool:
        return (tokens(self.llm), digest(self.llm)) == self.right


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    from vllm.model_executor.model_loader.reload import layerwise

    served = Served((tiny_plain(tmp_path / "a", 0), tiny_plain(tmp_path / "b", 1)))
    ours = layerwise.make_online_process_loader
    monkeypatch.setattr(layerwise, "make_online_process_loader", ours.__wrapped__)
    # New memory is NaN then. Else what vLLM leaves unwritten may be what the fresh engine of B gave back.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield served
    torch.use_deterministic_algorithms(False)
    stop(served.llm)


@pytest.fixture
def ours(dense: tuple[Path, Path]) -> Iterator[Served]:
    served = Served(dense)
    yield served
    stop(served.llm)


def broken(tensors: dict[str, Tensor]) -> Stream:
    """Ends after q of the first layer."""
    yield from ((name, value) for name, value in tensors.items() if name.startswith(f"{ATTENTION}.q_proj"))
    raise ConnectionError("the stream broke")


def whole(tensors: dict[str, Tensor]) -> Stream:
    """Of each layer q, k, v in this order."""
    yield from sorted(tensors.items())


def without_k(tensors: dict[str, Tensor]) -> Stream:
    return ((name, value) for name, value in tensors.items() if not name.startswith(f"{ATTENTION}.k_proj"))


def from_one_buffer(tensors: dict[str, Tensor]) -> Stream:
    """As a transport sends it that uses its memory again."""
    buffer = torch.empty(max(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)
    for name, tensor in tensors.items():
        value = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        yield name, value.copy_(tensor)
        buffer.fill_(77)


def test_a_whole_reload_after_a_broken_stream(ours: Served) -> None:
    with pytest.raises(ConnectionError):
        ours.takes(broken)
    assert tokens(ours.llm) == []
    ours.takes(whole)
    assert ours.is_right()


def test_a_part_of_a_fused_layer(stock: Served, ours: Served) -> None:
    """vLLM serves memory that nobody wrote as k, and says nothing."""
    stock.takes(without_k)
    assert not stock.is_right()
    with pytest.raises(Exception, match="did not arrive whole"):
        ours.takes(without_k)
    assert tokens(ours.llm) == []
    ours.takes(whole)
    assert ours.is_right()


def test_a_transport_buffer_that_is_used_again(stock: Served, ours: Served) -> None:
    """vLLM's layers keep q, k and v by reference until they have all."""
    for served in (stock, ours):
        served.takes(from_one_buffer)
    assert not stock.is_right() and ours.is_right()


def test_layers_of_vllm_s_own_wait_with_copies(tmp_path: Path) -> None:
    """The same stream on a model that is not quantized, with the plugin in place."""
    plain = Served((tiny_plain(tmp_path / "a", 0), tiny_plain(tmp_path / "b", 1)))
    plain.takes(from_one_buffer)
    assert plain.is_right()
    stop(plain.llm)


def packs(model: Any) -> bool:
    """Whether the head computes with a copy of the embedding."""
    head, weight = model.lm_head, model.model.embed_tokens.weight.data
    x = torch.randn(2, weight.shape[1], dtype=weight.dtype)
    before = head.quant_method.apply(head, x)
    weight.mul_(2)
    after = head.quant_method.apply(head, x)
    weight.div_(2)
    return torch.equal(before, after)


def test_a_head_that_is_tied_to_the_embedding(tmp_path: Path) -> None:
    """Some CPUs have vLLM pack it, and its reload leaves the packed copy as it was; so does what writes the embedding alone."""
    served = [
        Served((make(tmp_path / f"{make.__name__}-a", 0, tied=True), make(tmp_path / f"{make.__name__}-b", 1, tied=True)))
        for make in (tiny_plain, tiny_dense)
    ]
    stock, ours = served
    for each in served:
        each.takes(whole)
    assert stock.is_right() is not packs(model_of(stock.llm)) and ours.is_right()

    embedding = model_of(ours.llm).model.embed_tokens.weight.detach().clone()
    halves = iter([("model.embed_tokens.weight", embedding / 2)])
    reload(ours.llm, weights_iterator=halves, is_checkpoint_format=False)
    head = model_of(ours.llm).lm_head
    x = torch.randn(3, embedding.shape[1], dtype=torch.bfloat16)
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ embedding.T / 2)
    for each in served:
        stop(each.llm)


def test_two_plain_layers_that_share_a_weight(tmp_path: Path) -> None:
    """What a CPU packs of the first is the second's too, though it is loaded by the first's name alone."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    class Twins(Qwen2ForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            first, second = (layer.mlp.down_proj for layer in self.model.layers)
            second.register_parameter("weight", first.weight)

    ModelRegistry.register_model("Twins", Twins)
    ours = Served((twins(tmp_path / "a", 0), twins(tmp_path / "b", 1)))
    ours.takes(whole)
    assert ours.is_right()
    stop(ours.llm)
