"""Folders of every make, end to end: legacy config, KV-cache scales beside any projection, shards, other dtypes, bad scales."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam.errors import PointerError
from aliasparam_nvfp4 import retarget
from aliasparam_nvfp4.checkpoint import CheckpointError, CheckpointFolder
from aliasparam_nvfp4.demo.run import addresses, fingerprints
from aliasparam_nvfp4.errors import BackendError, ScaleError

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.demo._quiet import quiet  # noqa: E402
from aliasparam_nvfp4.integrations.transformers import (  # noqa: E402
    compressed_tensors_here,
    load_model,
    reload_folder,
    use_backend,
)

from .test_checkpoint_kinds import _assert_export_is_the_file as assert_export_is_the_file  # noqa: E402
from .test_checkpoint_kinds import by_compressed_tensors, by_modelopt, decoded  # noqa: E402
from .test_checkpoint_kinds import load as load_as  # noqa: E402
from .test_checkpoint_kinds import logits as logits_of  # noqa: E402
from .test_cli import write_tokenizer  # noqa: E402
from .test_transformers import edit, load, out, write_checkpoint  # noqa: E402


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- legacy --------------------------------------------------------------------------------------------------------------


def test_a_legacy_folder_loads_reloads_and_saves_as_a_new_one_does(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Only hf_quant_config.json says that it is quantized (ModelOpt before 0.29)."""
    legacy = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    expected = [out(load(folder)) for folder in two]
    for folder in two:
        write_tokenizer(folder)
        change_config(folder, lambda config: config.pop("quantization_config"))
        (folder / "hf_quant_config.json").write_text(json.dumps(legacy))

    model, _ = load_model(two[0], "reference")

    assert torch.equal(out(model), expected[0])
    reload_folder(model, two[1])
    assert torch.equal(out(model), expected[1])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(out(load(tmp_path / "saved")), expected[1])


# -- KV-cache scales -----------------------------------------------------------------------------------------------------


def with_kv_scales(kind: str) -> Callable[[Any], Any]:
    def config(mtq: Any) -> Any:
        found = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG if kind == "MIXED" else getattr(mtq, kind))
        found["quant_cfg"] = list(found["quant_cfg"]) + list(mtq.FP8_KV_CFG["quant_cfg"])
        if kind == "MIXED":
            fp8 = {"num_bits": (4, 3), "axis": None}
            names = ("*self_attn*weight_quantizer", "*self_attn*input_quantizer")
            found["quant_cfg"] += [{"quantizer_name": name, "cfg": fp8} for name in names]
        return found

    return config


@pytest.mark.parametrize("kind", ["NVFP4_MLP_ONLY_CFG", "MIXED", "W4A16_NVFP4_CFG"])
def test_kv_scales_travel_with_projections_of_any_kind(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    a, b = (by_modelopt(tmp_path / f"{seed}", with_kv_scales(kind), seed) for seed in (0, 1))
    assert [n for n in load_file(a / "model.safetensors") if n.endswith("k_proj.k_scale")]

    model = load_as(a)

    assert_export_is_the_file(model, a)
    reload_folder(model, b)
    assert_export_is_the_file(model, b)
    assert torch.equal(logits_of(model), logits_of(load_as(b)))


def test_kv_scales_of_compressed_tensors_travel_with_the_attention(tmp_path: Path) -> None:
    a, b = (by_compressed_tensors(tmp_path / f"{seed}", activations=True, seed=seed) for seed in (0, 1))
    for number, folder in enumerate((a, b)):
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        change_config(folder, lambda config, s=scheme: config["quantization_config"].update(kv_cache_scheme=s))
        names = ("q_scale", "k_scale", "v_scale", "kv_scale", "k_proj.output_scale")
        scales = {f"model.layers.{i}.self_attn.{n}": torch.tensor([0.02 + i + number]) for i in (0, 1) for n in names}
        edit(lambda tensors, s=scales: tensors.update(s))(folder)

    model = load_as(a)

    assert_export_is_the_file(model, a)
    reload_folder(model, b)
    assert_export_is_the_file(model, b)


def test_a_kv_scale_of_no_module_is_refused(two: tuple[Path, Path]) -> None:
    edit(lambda tensors: tensors.update({"model.layers.7.self_attn.k_scale": torch.ones(1)}))(two[0])

    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.7.self_attn.k_scale"):
        load(two[0])


# -- shards --------------------------------------------------------------------------------------------------------------


def sharded(folder: Path, count: int) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        own = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % count == part}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_sharded_folders_load_and_reload_like_whole_ones(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Tensors of one projection are spread over the shards."""
    shards = sharded(Path(shutil.copytree(two[1], tmp_path / "shards")), 3)
    whole, model = load(two[1]), load(two[0])

    assert torch.equal(out(load(shards)), out(whole))
    reload_folder(model, shards)
    assert torch.equal(out(model), out(whole)) and fingerprints(model) == fingerprints(whole)

    (shards / "model-00002-of-00003.safetensors").unlink()
    held = fingerprints(model)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors: the file is missing"):
        reload_folder(model, shards)
    assert fingerprints(model) == held and torch.equal(out(model), out(whole))


def test_what_save_pretrained_divides_is_read_byte_for_byte(two: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(two[1])
    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")

    saved, source = CheckpointFolder(tmp_path / "saved"), CheckpointFolder(two[1])

    assert len({entry.file for entry in saved.tensors.values()}) > 2
    assert saved.tensors.keys() == source.tensors.keys()
    raw: Callable[[Tensor], Tensor] = lambda t: t.reshape(-1).view(torch.uint8)  # noqa: E731
    assert all(torch.equal(raw(saved.read(n)), raw(source.read(n))) for n in source.tensors)
    assert torch.equal(out(load(tmp_path / "saved")), out(model))


# -- another dtype -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_law_9_a_model_served_in_another_dtype_reloads_like_a_cold_one(two: tuple[Path, Path], dtype: torch.dtype) -> None:
    def cold(folder: Path) -> Any:
        with use_backend("reference"), quiet():
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    model = cold(two[0])
    where = addresses(model)
    reload_folder(model, two[1], chunk_bytes=100)

    assert out(model).dtype is dtype
    assert torch.equal(out(model), out(cold(two[1]))) and fingerprints(model) == fingerprints(cold(two[1]))
    assert addresses(model) == where


def test_awq_in_another_dtype_loads_and_reloads(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    folder = by_modelopt(tmp_path / "awq", "NVFP4_AWQ_LITE_CFG")
    model = load_as(folder, torch.float16)
    before = logits_of(model)

    reload_folder(model, folder)

    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype is torch.float16
    assert torch.equal(logits_of(model), before)
    assert torch.isfinite(before).all() and before.shape == logits_of(decoded(folder)).shape


def test_law_9_awq_is_a_label_of_nvfp4_and_its_factors_are_in_the_files_or_not(tmp_path: Path) -> None:
    """ModelOpt says AWQ of layers whose factors it folded into what is before them, too."""
    a, b = (write_checkpoint(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2)))
    text = (b / "config.json").read_text()
    (b / "config.json").write_text(text.replace('"quant_algo": "NVFP4"', '"quant_algo": "NVFP4_AWQ"'))
    model, cold = load_as(a, torch.bfloat16), load_as(b, torch.bfloat16)
    first = out(model)

    reload_folder(model, b)
    assert torch.equal(out(model), out(cold))
    reload_folder(cold, a)
    assert torch.equal(out(cold), first)


# -- bad scales ----------------------------------------------------------------------------------------------------------

NAME = "model.layers.1.mlp.down_proj"


def nan_block(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


def no_product(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight_scale_2"].fill_(1e-30)
    tensors[f"{NAME}.input_scale"].fill_(1e-20)


@pytest.mark.parametrize(("poison", "message"), [(nan_block, "block scales are NaN"), (no_product, "alpha has no value")])
def test_law_10_scales_that_are_none_leave_the_model_as_it_was(
    two: tuple[Path, Path], poison: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = load(two[0])
    first, held = out(model), fingerprints(model)
    edit(poison)(two[1])

    with pytest.raises(ScaleError, match=message) as error:
        reload_folder(model, two[1])

    assert NAME in str(error.value) or "model.layers.1.mlp.down_proj.kernel" in str(error.value)
    assert torch.equal(out(model), first) and fingerprints(model) == held


def test_law_10_scales_without_a_sign_in_the_kernel_format_leave_the_model_as_it_was(tmp_path: Path) -> None:
    folder = by_compressed_tensors(tmp_path / "a", activations=False)
    with use_backend("flashinfer_cutedsl_w4a16_sm12x"), compressed_tensors_here():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    held = fingerprints(model)
    edit(lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].view(torch.uint8)[0].bitwise_or_(0x80))(folder)

    with pytest.raises(ScaleError, match=r"mlp\.up_proj\.weight_scale: block scales are negative"):
        reload_folder(model, folder)
    assert fingerprints(model) == held


def test_a_cold_load_names_the_module_of_bad_scales(two: tuple[Path, Path]) -> None:
    edit(nan_block)(two[0])

    with pytest.raises(ScaleError, match=r"model\.layers\.1\.mlp\.down_proj\.kernel\.weight_scale: block scales are NaN"):
        load(two[0])


def test_a_folder_of_the_other_format_is_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    model = load_as(by_modelopt(tmp_path / "mo", "NVFP4_DEFAULT_CFG"))

    with pytest.raises(CheckpointError, match="another way") as error:
        reload_folder(model, by_compressed_tensors(tmp_path / "ct", activations=True))
    assert "ModelOpt" in str(error.value.expected) and "compressed-tensors" in str(error.value.found)


# -- moving a loaded model -----------------------------------------------------------------------------------------------


def test_a_loaded_model_moves_where_room_was_planned(two: tuple[Path, Path]) -> None:
    write_tokenizer(two[0])
    model, _ = load_model(two[0], "reference", retarget_to=["triton_shuffled"])
    first, where = out(model), addresses(model)

    assert retarget(model, "triton_shuffled") == 8
    reload_folder(model, two[1])
    retarget(model, "reference")
    assert torch.equal(out(model), out(load(two[1])))
    reload_folder(model, two[0])
    assert torch.equal(out(model), first) and addresses(model) == where


def test_a_loaded_model_without_room_says_how_to_plan_it_and_stays_whole(two: tuple[Path, Path]) -> None:
    model = load(two[0])

    with pytest.raises(PointerError, match="load_model") as error:
        retarget(model, "triton_shuffled")

    assert 'retarget_to=("triton_shuffled",)' in str(error.value.remedy)
    assert {m.nvfp4_backend.name for m in model.modules() if "nvfp4_backend" in m.__dict__} == {"reference"}
    with use_backend("reference", retarget_to=["nope"]), pytest.raises(BackendError, match="unknown linear backend"):
        transformers.AutoModelForCausalLM.from_pretrained(two[0])
