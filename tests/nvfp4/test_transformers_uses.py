"""What users of transformers do with a model: pipelines, device maps, accelerate's hooks, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aliasparam.errors import AliasError
from aliasparam_nvfp4.checkpoint import CheckpointError
from aliasparam_nvfp4.demo.run import addresses

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend  # noqa: E402

from .cli.folders import chat_folder  # noqa: E402
from .test_transformers import load, out, write_checkpoint  # noqa: E402


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)


def load_by(folder: Path, **options: Any) -> Any:
    with use_backend("reference"):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# -- pipelines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}], ids=["by default", "device_map"])
def test_law_9_a_pipeline_of_a_folder_answers_after_a_reload_as_one_of_the_other_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    a, b = chat_folder(tmp_path / "a", 1), chat_folder(tmp_path / "b", 2)
    with use_backend("reference"):
        warm, cold = (transformers.pipeline("text-generation", model=str(folder), **options) for folder in (a, b))
    first, where = answer(warm), addresses(warm.model)

    reload_folder(warm.model, b)
    assert answer(warm) == answer(cold) != first
    reload_folder(warm.model, a)
    assert answer(warm) == first and addresses(warm.model) == where


def answer(pipeline: Any) -> list[int]:
    given = pipeline("w1 w2", max_new_tokens=8, min_new_tokens=8, do_sample=False, return_tensors=True)
    return given[0]["generated_token_ids"]  # type: ignore[no-any-return]


# -- where layers lie ----------------------------------------------------------------------------------------------------

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
ONE_DEVICE: dict[str, Any] = {"cpu": "cpu", "auto": "auto", "whole": {"": "cpu"}, "by part": dict.fromkeys(PARTS, "cpu")}
DIVIDED: dict[str, dict[str, Any]] = {
    "disk": {"device_map": {"": "disk"}},
    "a layer on disk": {"device_map": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}},
    "a GPU and the host": {"device_map": dict.fromkeys(PARTS, 0) | {"model.layers.1": "cpu"}},
    "two GPUs": {"device_map": dict.fromkeys(PARTS, "cuda:0") | {"model.layers.1": torch.device("cuda", 1)}},
    "auto, and not enough memory": {"device_map": "auto", "max_memory": {"cpu": 20_000}},
}


@pytest.mark.parametrize("case", ONE_DEVICE)
def test_a_device_map_of_one_device_loads_and_reloads(two: tuple[Path, Path], case: str) -> None:
    model = load_by(two[0], device_map=ONE_DEVICE[case])

    assert torch.equal(out(model), out(load(two[0])))
    reload_folder(model, two[1])
    assert torch.equal(out(model), out(load(two[1])))


@pytest.mark.parametrize("case", DIVIDED)
def test_law_8_a_device_map_that_divides_the_model_is_refused_before_anything_is_loaded(
    two: tuple[Path, Path], case: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)device_map.*one device.*\"\": device"):
        load_by(two[0], **DIVIDED[case], offload_folder=tmp_path / "offload")
    assert not (tmp_path / "offload").exists()


HOOKS: dict[str, Callable[[Any, Path], object]] = {
    "offload to the host": lambda model, _: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "offload with buffers": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "offload to disk": lambda model, path: accelerate.disk_offload(model, str(path), execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("case", HOOKS)
def test_law_8_layers_that_accelerate_empties_refuse(two: tuple[Path, Path], case: str, tmp_path: Path) -> None:
    """Its hooks put other tensors under the names before each forward, and kernel names would not follow."""
    model = load(two[0])
    HOOKS[case](model, tmp_path / "offload")
    for _ in range(2):
        with pytest.raises((AliasError, TypeError)):
            out(model)


def test_hooks_that_leave_layers_where_they_are_serve(two: tuple[Path, Path]) -> None:
    model = accelerate.dispatch_model(load(two[0]), {"": "cpu"}, force_hooks=True)
    assert torch.equal(out(model), out(load(two[0])))
    reload_folder(model, two[1])
    assert torch.equal(out(model), out(load(two[1])))


# -- torch.compile -------------------------------------------------------------------------------------------------------


def test_law_9_compiled_code_goes_on_after_a_reload(two: tuple[Path, Path]) -> None:
    """One graph, compiled once: A, B and A again without compiling anew, equal to cold loads."""
    first, second = (out(load(folder)) for folder in two)
    model = torch.compile(load(two[0]), backend="eager", fullgraph=True)
    assert torch.equal(out(model), first) and not torch.equal(first, second)

    with torch.compiler.set_stance("fail_on_recompile"):
        for folder, expected in ((two[1], second), (two[0], first)):
            reload_folder(model, folder)
            assert torch.equal(out(model), expected)
