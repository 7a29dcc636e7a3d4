"""Every way a folder can be wrong gives one clear error which names file and tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aliasparam import TensorSpec
from aliasparam_nvfp4.checkpoint import CheckpointError, CheckpointFolder, QuantConfig, UnsupportedFormatError, check_tensors

FLAT = {
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}},
    "ignore": ["lm_head", "model.layers.0.self_attn*"],
    "quant_algo": "NVFP4",
    "quant_method": "modelopt",
}
NESTED = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"], "kv_cache_quant_algo": "FP8"}}
TENSORS = {
    "a.weight": torch.arange(64, dtype=torch.uint8).view(8, 8),
    "a.weight_scale": torch.arange(8, dtype=torch.uint8).view(8, 1).view(torch.float8_e4m3fn),
    "a.weight_scale_2": torch.tensor(0.5),
    "norm": torch.ones(5, dtype=torch.bfloat16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FLAT}))
    return tmp_path


def specs() -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


def test_a_good_folder_reads_back_byte_for_byte(folder: Path) -> None:
    source = CheckpointFolder(folder)

    check_tensors(source, specs())
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    cols=st.integers(1, 9),
    limit=st.integers(1, 64),
    dtype=st.sampled_from(["uint8", "bfloat16", "float8_e4m3fn"]),
)
def test_pieces_joined_are_the_tensor(tmp_path: Path, rows: int, cols: int, limit: int, dtype: str) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    tensor = torch.randint(0, 100, (rows, cols)).to(kind)
    save_file({"t": tensor}, tmp_path / "model.safetensors")

    pieces = list(CheckpointFolder(tmp_path).chunks("t", max_bytes=limit))

    assert all(piece.nbytes <= max(limit, cols * kind.itemsize) for _, piece in pieces)
    joined = torch.cat([p.view(torch.uint8) for _, p in pieces]) if pieces else torch.empty(0)
    assert torch.equal(joined.view(-1), tensor.view(torch.uint8).view(-1))


def test_a_scalar_comes_in_one_piece(folder: Path) -> None:
    assert [(first, piece.item()) for first, piece in CheckpointFolder(folder).chunks("a.weight_scale_2")] == [(0, 0.5)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 0.999))
def test_any_truncation_is_found_before_a_byte_is_read(folder: Path, keep: float) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])

    with pytest.raises(CheckpointError, match=r"truncated|not a safetensors"):
        CheckpointFolder(folder)


def test_all_that_does_not_fit_is_listed_in_one_error(folder: Path) -> None:
    expected = specs()
    expected["b.weight"] = TensorSpec((2, 2), torch.uint8)
    expected["a.weight"] = TensorSpec((8, 9), torch.uint8)
    expected["norm"] = TensorSpec((5,), torch.float32)
    del expected["a.weight_scale_2"]

    with pytest.raises(CheckpointError) as error:
        check_tensors(CheckpointFolder(folder), expected)

    text = str(error.value)
    assert "missing: b.weight (uint8[2, 2])" in text
    assert "unexpected: a.weight_scale_2" in text
    assert "model.safetensors: a.weight: expected uint8[8, 9], found uint8[8, 8]" in text
    assert "norm: expected float32[5], found bfloat16[5]" in text


def shards(folder: Path, weight_map: dict[str, str], files: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_folders_and_their_faults(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3)}
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": one, "2.safetensors": two})
    assert set(CheckpointFolder(tmp_path).tensors) == {"a", "b"}

    shards(tmp_path, {"a": "1.safetensors", "c": "2.safetensors"}, {})
    with pytest.raises(CheckpointError, match="disagree"):
        CheckpointFolder(tmp_path)
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"2.safetensors": {**one, **two}})
    with pytest.raises(CheckpointError, match="in two shards"):
        CheckpointFolder(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1\.safetensors: the file is missing"):
        CheckpointFolder(tmp_path)


def test_both_spellings_of_the_quantization(folder: Path) -> None:
    flat, nested = QuantConfig.from_folder(folder), QuantConfig.from_dict(NESTED)

    assert (flat.algo, flat.group_size, flat.kv_cache_algo) == ("NVFP4", 16, None)
    assert (nested.algo, nested.exclude, nested.kv_cache_algo) == ("NVFP4", ("lm_head",), "FP8")
    assert flat.scheme_of("lm_head") is None
    assert flat.scheme_of("model.layers.0.self_attn.q_proj") is None
    assert flat.scheme_of("model.layers.1.self_attn.q_proj") is not None
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text(json.dumps(NESTED))
    assert QuantConfig.from_folder(folder).kv_cache_algo == "FP8"


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "not quantized": {},
    "another method": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
    "FP8": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "another block": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_other_quantizations_are_refused_by_name(folder: Path, case: str) -> None:
    (folder / "config.json").write_text(json.dumps(UNSUPPORTED[case]))

    with pytest.raises(UnsupportedFormatError, match=r"config\.json"):
        QuantConfig.from_folder(folder)


def test_folders_that_are_none(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        QuantConfig.from_folder(folder / "nothing")
    with pytest.raises(CheckpointError, match="not a folder"):
        QuantConfig.from_folder(folder / "config.json")
    (folder / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="not JSON"):
        QuantConfig.from_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        QuantConfig.from_folder(folder)
    (folder / "model.safetensors").write_bytes(b"hello world, this is not safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        CheckpointFolder(folder)
