"""FP8 layers of mixed checkpoints: which value a scale belongs to."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aliasparam import TensorSpec
from aliasparam.reload.delta_folder import Chain
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.errors import DeltaError
from aliasparam.reload.observe import Hooks
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam_nvfp4.checkpoint import QuantConfig, UnsupportedFormatError
from aliasparam_nvfp4.checkpoint.scheme import Scheme
from aliasparam_nvfp4.cli.inspect import findings
from aliasparam_nvfp4.errors import ScaleError

pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import apply_delta_folder, reload_folder
from aliasparam_nvfp4.integrations.transformers.fp8 import Fp8Linear

from .test_transformers import load, out, write_checkpoint

F32 = torch.float32


def made(n: int, k: int, counts: tuple[int, int], block: tuple[int, int] | None) -> Fp8Linear:
    return Fp8Linear(k, n, False, F32, Scheme("FP8", None, block), TensorSpec(counts, F32))


@pytest.mark.parametrize(
    ("n", "k", "block", "said"),
    [
        (160, 320, (128, 128), True),
        (160, 320, (128, 128), False),
        (160, 96, (64, 64), True),
        (192, 192, (96, 96), True),
        (100, 60, (7, 13), True),
        (256, 128, (64, 32), False),
        (32, 48, (128, 128), False),
    ],
)
def test_law_1_a_block_scale_counts_for_its_block_alone(n: int, k: int, block: tuple[int, int], said: bool) -> None:
    torch.manual_seed(0)
    counts = -(-n // block[0]), -(-k // block[1])
    layer = made(n, k, counts, block if said else None)
    layer.weight.data.copy_(torch.randn(n, k))
    layer.weight_scale.data.copy_(torch.rand(counts) + 0.5)
    decoded = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            decoded[i, j] = layer.weight[i, j].float() * layer.weight_scale[i // block[0], j // block[1]]
    x = torch.randn(3, k)

    assert layer.takes(TensorSpec(counts, F32))
    torch.testing.assert_close(layer(x), x @ decoded.T)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((5, 7), None), ((3, 2), None), ((0, 1), None), ((3, 2), (128, 128)), ((2, 2, 1), None), ((2, 2), (64, 64))],
)
def test_scales_that_do_not_divide_the_weight_are_refused(shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    """160 x 160: each was taken for blocks of the size that its count rounds to."""
    assert not made(160, 160, (2, 2), block).takes(TensorSpec(shape, F32))


_FOUR: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
_EIGHT: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}


def config(inputs4: dict[str, Any] | None, inputs8: dict[str, Any] | None = None, **weights8: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": copy.deepcopy(_FOUR), "input_activations": inputs4},
            "b": {"targets": ["re:.*q_proj"], "weights": {**_EIGHT, **weights8}, "input_activations": inputs8},
        },
    }


def test_what_compressed_tensors_presets_say_is_read() -> None:
    presets = pytest.importorskip("compressed_tensors.quantization").preset_name_to_scheme
    parts = [presets(name, ["Linear"]).model_dump(mode="json") for name in ("NVFP4", "FP8_BLOCK")]
    inputs4, inputs8 = (part["input_activations"] for part in parts)
    read = QuantConfig.from_dict(config(inputs4, inputs8, **parts[1]["weights"]))

    assert read.scheme_of("layers.0.k_proj") == Scheme("NVFP4", "stored")
    assert read.scheme_of("layers.0.q_proj") == Scheme("FP8", "block", (128, 128))


@pytest.mark.parametrize(
    ("inputs4", "inputs8", "weights8"),
    [
        ({**_FOUR, "type": "int"}, None, {}),
        ({**_FOUR, "group_size": 32}, None, {}),
        (None, {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64, "dynamic": True}, {}),
        (None, None, {"block_structure": "odd"}),
        (None, None, {"block_structure": [128]}),
    ],
)
def test_activations_and_blocks_of_another_kind_are_refused_by_name(
    inputs4: dict[str, Any] | None, inputs8: dict[str, Any] | None, weights8: dict[str, Any]
) -> None:
    """They were served as those that are known."""
    with pytest.raises(UnsupportedFormatError, match="not supported"):
        QuantConfig.from_dict(config(inputs4, inputs8, **weights8))


def mixed(folder: Path, **changed: float) -> Path:
    """A small Llama in NVFP4 whose down projections are FP8, with scales as asked for."""
    write_checkpoint(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    quantized = {n.removesuffix(".weight_scale_2"): {"quant_algo": "NVFP4"} for n in tensors if n.endswith(".weight_scale_2")}
    for name in [n for n in quantized if n.endswith("down_proj")]:
        del tensors[f"{name}.weight_scale_2"]
        values = {"weight_scale": 0.01, "input_scale": 0.02, **changed}
        tensors |= {f"{name}.{leaf}": torch.tensor(value) for leaf, value in values.items()}
        tensors[f"{name}.weight"] = torch.randn(48, 80).to(torch.float8_e4m3fn)
        quantized[name] = {"quant_algo": "FP8"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": quantized}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("leaf", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_law_8_fp8_scales_that_are_none_are_refused_cold_and_warm(leaf: str, value: float, tmp_path: Path) -> None:
    """The model answered with NaN."""
    good, bad = mixed(tmp_path / "good"), mixed(tmp_path / "bad", **{leaf: value})
    model = load(good)
    before = out(model)
    if leaf == "weight_scale" and value == 0:  # a weight of zeros
        reload_folder(model, bad)
        assert torch.equal(out(model), out(load(bad))) and bool(out(model).isfinite().all())
        return
    with pytest.raises(ScaleError, match=rf"(?s)model\.layers\.0\.mlp\.down_proj.*{leaf}"):
        reload_folder(model, bad)
    assert torch.equal(out(model), before)
    with pytest.raises(ScaleError, match=rf"(?s)model\.layers\.0\.mlp\.down_proj.*{leaf}"):
        load(bad)
    assert findings(bad, backend="reference", moe_backend="reference", tp=1, ep=1, deep=False)[0]["will_load"] is False


@pytest.mark.parametrize("way", ["delta", "full"])
@pytest.mark.parametrize("leaf", ["weight_scale", "input_scale"])
def test_law_8_a_delta_with_fp8_scales_that_are_none_is_refused_before_it_is_written(leaf: str, way: str, tmp_path: Path) -> None:
    good, bad = mixed(tmp_path / "good"), mixed(tmp_path / "weight_v000001", **{leaf: math.nan})
    other = mixed(tmp_path / "other", **{leaf: 0.03})
    with SafetensorsFolder(good) as old, SafetensorsFolder(bad) as new, SafetensorsFolder(other) as third:
        diff(old, new, tmp_path / "deltas" / "weight_v000001", 1, 0)
        diff(old, third, tmp_path / "well", 1, 0)
    model, written = load(good), list[str]()
    before = out(model)
    hooks = Hooks(on_commit=(lambda session: written.append("committed"),))
    with (
        Chain(tmp_path / "deltas" if way == "delta" else tmp_path, 0, 1) as chain,
        pytest.raises(ScaleError, match=rf"(?s)model\.layers\.0\.mlp\.down_proj.*{leaf}.*nan"),
    ):
        apply_delta_folder(model, chain, hooks=hooks)
    assert torch.equal(out(model), before) and not written
    apply_delta_folder(model, tmp_path / "well", hooks=hooks)
    assert torch.equal(out(model), out(load(other))) and written


@pytest.mark.parametrize("projection", ["o_proj", "k_proj"])
def test_law_8_a_delta_with_block_scales_that_are_none_is_refused_before_it_is_written(projection: str, tmp_path: Path) -> None:
    good, bad = mixed(tmp_path / "good"), mixed(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    name = f"model.layers.0.self_attn.{projection}.weight_scale"
    tensors[name].view(torch.uint8)[2, 1] = 0x7F
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsFolder(good) as old, SafetensorsFolder(bad) as new:
        diff(old, new, tmp_path / "delta", 1, 0)
    model, written = load(good), list[object]()
    before = out(model)
    with pytest.raises(ScaleError, match=rf"(?s){re.escape(name)}.*NaN"):
        apply_delta_folder(model, tmp_path / "delta", hooks=Hooks(on_commit=[written.append]))
    assert torch.equal(out(model), before) and not written


def test_law_10_a_reload_leads_out_of_one_that_failed_behind_its_fp8_layers(tmp_path: Path) -> None:
    """Their weights are plain: refusing twins, which are no parameters, stand in their places."""
    old, new = mixed(tmp_path / "old"), mixed(tmp_path / "new", weight_scale=0.5)
    with SafetensorsFolder(old) as before, SafetensorsFolder(new) as after:
        diff(before, after, tmp_path / "delta", 1, 0)
    model = load(old)
    with pytest.raises(ZeroDivisionError):
        reload_folder(model, new, policy="staged", hooks=Hooks(on_commit=[lambda session: 1 / 0]))
    with pytest.raises(DeltaError, match="applies to another version"):
        apply_delta_folder(model, tmp_path / "delta", serving=5)
    with pytest.raises(DeltaError, match="checksum"):
        apply_delta_folder(model, tmp_path / "delta")
    reload_folder(model, new)
    assert torch.equal(out(model), out(load(new)))
