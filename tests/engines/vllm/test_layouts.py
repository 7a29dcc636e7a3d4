"""The bytes of every layout through the whole engine, by emulators where the kernel wants a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from .engine import addresses, digest, model_of, reload, start, stop, tokens  # skips without vLLM

from ..w4a16 import as_w4a16  # isort: skip

LAYOUTS = ["reference", "flashinfer_trtllm", "flashinfer_cutlass"]


@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, name) for kind in ("dense", "moe") for name in LAYOUTS), ("compressed", "flashinfer_trtllm")]
)
def test_law_9_every_layout(kind: str, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = request.getfixturevalue(kind)
    monkeypatch.setenv("ALIASPARAM_NVFP4_BACKEND", backend)
    monkeypatch.setenv("ALIASPARAM_NVFP4_MOE_BACKEND", backend)
    fresh = start(b, skip_tokenizer_init=True)
    of_b, answer_b = digest(fresh), tokens(fresh)
    stop(fresh)

    llm = start(a, skip_tokenizer_init=True)
    before, of_a, answer_a = addresses(llm), digest(llm), tokens(llm)
    reload(llm, weights_path=str(b))
    assert (digest(llm), tokens(llm)) == (of_b, answer_b)
    reload(llm, weights_path=str(a))
    assert (digest(llm), tokens(llm)) == (of_a, answer_a)
    assert addresses(llm) == before and of_a != of_b and answer_a != answer_b
    assert _about(llm) == {backend}
    stop(llm)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_input_scales_that_a_w4a16_folder_still_has_are_passed_over(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """They are no part of what is served: folders with and without them serve the same, and reload into each other."""
    a, b = request.getfixturevalue(kind)
    a, b, bare = as_w4a16(a, tmp_path / "a"), as_w4a16(b, tmp_path / "b"), as_w4a16(b, tmp_path / "bare", bare=True)
    fresh = start(bare, skip_tokenizer_init=True)
    of_b = tokens(fresh)
    stop(fresh)

    llm = start(a, skip_tokenizer_init=True)
    answer = tokens(llm)
    for folder in (b, bare):
        reload(llm, weights_path=str(folder))
        assert tokens(llm) == of_b != answer
        reload(llm, weights_path=str(a))
        assert tokens(llm) == answer
    stop(llm)


def _about(llm: object) -> set[str]:
    """What serves the layers."""
    from aliasparam.module.registry import registries

    return {registry.about.partition(":")[0] for _, registry in registries(model_of(llm))}
