"""What `inspect` says of global scales is what loading does with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
from aliasparam.errors import AliasError  # noqa: E402
from aliasparam_nvfp4.cli.inspect import findings  # noqa: E402
from aliasparam_nvfp4.integrations.transformers import use_backend  # noqa: E402

from ..test_gpt_oss import folders as gpt_oss  # noqa: E402
from ..test_transformers import write_checkpoint  # noqa: E402

EXPERTS, FUSED = ("0.gate_proj", "0.up_proj"), ("q_proj", "k_proj", "v_proj")
NAN = float("nan")


def loads(folder: Path, backend: str, runner: str, missing: Any) -> bool:
    try:
        with use_backend(backend, moe=runner, missing_input_scale=missing):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    except AliasError:
        return False
    return True


def agreed(folder: Path, *, missing: str = "refuse", runner: str = "reference", backend: str = "reference") -> bool:
    """Whether it loads, as both say."""
    found = findings(folder, backend=backend, moe_backend=runner, tp=1, ep=1, deep=True, missing=missing)[0]
    assert found["will_load"] is loads(folder, backend, runner, missing), found["reasons"]
    return bool(found["will_load"])


def changed(folder: Path, made: Path, values: dict[str, float], **quantization: str) -> Path:
    shutil.copytree(folder, made)
    tensors = load_file(made / "model.safetensors")
    assert values.keys() <= tensors.keys()
    tensors |= {name: torch.full_like(tensors[name], value) for name, value in values.items()}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] |= quantization
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize(
    ("modules", "scales", "missing", "fits"),
    [
        (EXPERTS, {"input_scale": 1e-30, "weight_scale_2": 1e-30}, "refuse", True),  # the layer's largest input scale counts
        (EXPERTS, {"weight_scale_2": 1e-38}, "refuse", False),  # no product that float32 holds
        (EXPERTS, {"input_scale": 1e30, "weight_scale_2": 1e30}, "refuse", False),
        (EXPERTS[:1], {"input_scale": NAN}, "max", True),
        (FUSED[:1], {"input_scale": NAN}, "max", True),
        (FUSED, {"input_scale": NAN}, "max", False),
        (FUSED[:1], {"input_scale": 1e-30}, "refuse", True),
        (FUSED, {"input_scale": 1e-30, "weight_scale_2": 1e-30}, "refuse", False),
    ],
)
def test_inspect_refuses_what_loading_refuses(
    modules: tuple[str, ...],
    scales: dict[str, float],
    missing: str,
    fits: bool,
    tmp_path: Path,
    moe_folders: Callable[..., Path],
) -> None:
    layer = "model.layers.0." + ("mlp.experts." if modules[0] in EXPERTS else "self_attn.")
    values = {f"{layer}{module}.{scale}": value for module in modules for scale, value in scales.items()}

    assert agreed(changed(moe_folders("qwen2"), tmp_path / "a", values), missing=missing) is fits


@pytest.mark.parametrize(("runner", "fits"), [("reference", True), ("flashinfer_cutlass", False)])
def test_it_depends_on_the_runner(runner: str, fits: bool, tmp_path: Path, moe_folders: Callable[..., Path]) -> None:
    values = {"model.layers.0.mlp.experts.0.gate_proj.weight_scale_2": 1e-3}  # up has another

    assert agreed(changed(moe_folders("qwen2"), tmp_path / "a", values), runner=runner) is fits


@pytest.mark.parametrize(
    ("backend", "algorithm", "missing", "fits"),
    [
        ("flashinfer_cutlass", "NVFP4", "refuse", True),
        ("flashinfer_cutlass", "NVFP4", "dynamic", False),
        ("triton_w4a4", "W4A16_NVFP4", "refuse", False),
        ("flashinfer_blackwell_tiled_w4a16", "NVFP4", "refuse", False),  # N % 64
    ],
)
def test_it_depends_on_the_backend(backend: str, algorithm: str, missing: str, fits: bool, tmp_path: Path) -> None:
    folder = changed(write_checkpoint(tmp_path / "a", 1), tmp_path / "b", {}, quant_algo=algorithm)

    assert agreed(folder, missing=missing, backend=backend) is fits


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.up_proj"])
def test_of_what_the_model_drops_nothing_is_asked_and_experts_carry_nothing(
    name: str, tmp_path: Path, moe_folders: Callable[..., Path]
) -> None:
    folder = changed(moe_folders("qwen2"), tmp_path / "a", {})
    tensors, dropped = load_file(folder / "model.safetensors"), name.startswith("mtp")
    tensors[f"{name}.input_scale" if dropped else f"{name}_input_scale"] = torch.zeros(())
    if dropped:
        tensors |= {
            f"{name}.weight_scale": torch.full((4, 1), NAN).to(torch.float8_e4m3fn),
            f"{name}.weight_scale_2": torch.zeros(1),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert agreed(folder) is dropped


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
@pytest.mark.parametrize("name", ["gate_up_proj_input_scale", "down_proj_weight_scale_2"])
def test_of_fused_experts_and_of_what_is_left_over(name: str, algorithm: str, tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path, 0, gate_up_proj=0.004, down_proj=0.006)[0]
    bad = changed(folder, tmp_path / "bad", {f"model.layers.1.mlp.experts.{name}": NAN}, quant_algo=algorithm)

    assert agreed(bad) is (algorithm == "W4A16_NVFP4" and name.endswith("input_scale"))
