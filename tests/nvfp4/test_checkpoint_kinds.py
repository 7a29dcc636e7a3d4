"""Every kind of NVFP4 checkpoint that ModelOpt and compressed-tensors make, from a small model, by their own code on the CPU."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4.checkpoint import QuantConfig, UnsupportedFormatError
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.quantize.codec import dequantize, quantize_activation

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.demo._quiet import quiet  # noqa: E402
from aliasparam_nvfp4.integrations.transformers import compressed_tensors_here, reload_folder, use_backend  # noqa: E402

IDS = torch.arange(1, 25).view(2, 12)
#: Signal-to-noise in dB in float32, against exact arithmetic on the same weights and activations. An activation on the edge
#: between two codes may fall to the other side by the order of a sum, and the rest of the model then differs a little; without
#: quantized activations that cannot be. A forgotten or doubled scale gives less than 3.
W4A4_DB, W4A16_DB = 10.0, 60.0


def small_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, dtype="bfloat16", initializer_range=0.2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def by_modelopt(folder: Path, kind: str | Callable[[Any], Any], seed: int = 0) -> Path:
    """ModelOpt's own quantization and export, with a configuration by its name or made from ``modelopt.torch.quantization``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with quiet():
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_hf_checkpoint
            from modelopt.torch.quantization import tensor_quant

            model = small_model(seed)
            tensor_quant.dynamic_block_quantize_op = _fake_quantize  # ModelOpt's is CUDA alone; AWQ runs the model
            if callable(kind):
                config = kind(mtq)
            else:
                config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG if kind in ("KV", "MIXED") else getattr(mtq, kind))
            if kind == "KV":
                config["quant_cfg"] = config["quant_cfg"] + mtq.FP8_KV_CFG["quant_cfg"]
            if kind == "MIXED":
                fp8 = {"num_bits": (4, 3), "axis": None}
                config["quant_cfg"] = [
                    *config["quant_cfg"],
                    {"quantizer_name": "*self_attn*weight_quantizer", "cfg": fp8},
                    {"quantizer_name": "*self_attn*input_quantizer", "cfg": fp8},
                ]
            model = mtq.quantize(model, config, lambda m: m(input_ids=IDS))
            with torch.inference_mode():
                export_hf_checkpoint(model, export_dir=folder)
    return folder


def _fake_quantize(inputs: Tensor, block: int, amax: Tensor, *args: Any) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    quantized, scale, total = NVFP4QTensor.quantize(inputs.clone(), 16, None, amax.float() / 2688)
    return quantized.dequantize(dtype=inputs.dtype, scale=scale, double_scale=total, block_sizes={-1: 16})


def by_compressed_tensors(folder: Path, *, activations: bool, seed: int = 0) -> Path:
    """compressed-tensors' own parameters and packing, in llm-compressor's file layout."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = small_model(seed)
    scheme = preset_name_to_scheme("NVFP4" if activations else "NVFP4A16", ["Linear"])
    linears = {n: m.weight.data for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    key = lambda n: n.rpartition(".")[0] + groups.get(n.rpartition(".")[2], n)  # noqa: E731
    largest: dict[str, Tensor] = {}
    for name, weight in linears.items():
        largest[key(name)] = torch.maximum(largest.get(key(name), torch.zeros((), dtype=weight.dtype)), weight.abs().max())
    tensors = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in linears and n != "lm_head.weight"}
    for name, weight in linears.items():
        total = generate_gparam(-largest[key(name)], largest[key(name)])
        blocks = weight.view(weight.shape[0], -1, 16)
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=total)
        packed = NVFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale, "weight_global_scale": total}, scheme)
        tensors |= {f"{name}.{n}": t.contiguous() for n, t in packed.items()}
        tensors[f"{name}.weight_global_scale"] = total.float().reshape(1)
        if activations:
            tensors[f"{name}.input_global_scale"] = torch.tensor([300.0])
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}
    group = {
        "format": "nvfp4-pack-quantized",
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {**weights, "dynamic": "local"} if activations else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": config}))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    with use_backend("reference"), compressed_tensors_here():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def decoded(folder: Path) -> Any:
    """The model in float32 with exact weights, by ModelOpt's or compressed-tensors' own formula, and quantized activations."""
    tensors = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "weight_packed") and tensor.dtype is torch.uint8:
            total = tensors.get(f"{module}.weight_scale_2")
            total = total if total is not None else 1 / tensors[f"{module}.weight_global_scale"]
            state[f"{module}.weight"] = dequantize(tensor, tensors[f"{module}.weight_scale"], total)
        elif tensor.dtype is torch.float8_e4m3fn and leaf == "weight":
            state[name] = tensor.float() * tensors[f"{module}.weight_scale"]
        elif tensor.dtype is torch.bfloat16 and leaf != "pre_quant_scale":
            state[name] = tensor.float()
    model = transformers.LlamaForCausalLM(config).float().eval()
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_quantizes_its_input(tensors, name))
    return model


def _quantizes_its_input(tensors: dict[str, Tensor], name: str) -> Any:
    scale = tensors.get(f"{name}.input_scale")
    if f"{name}.input_global_scale" in tensors:
        scale = 1 / tensors[f"{name}.input_global_scale"]
    factor = tensors.get(f"{name}.pre_quant_scale")
    fp8 = f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype is torch.float8_e4m3fn

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        x = args[0] if factor is None else args[0] * factor.float()
        if scale is None:
            return None
        if fp8:
            return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)
        codes, blocks = quantize_activation(x, (1 / scale).reshape(1))
        return (dequantize(codes, blocks, scale.reshape(())),)

    return hook


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()  # type: ignore[no-any-return]


MODELOPT = ["NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG", "NVFP4_MLP_ONLY_CFG", "NVFP4_AWQ_LITE_CFG", "KV", "MIXED"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("modelopt")
    return {kind: by_modelopt(tmp_path_factory.mktemp(kind), kind) for kind in MODELOPT}


@pytest.mark.parametrize("kind", MODELOPT)
def test_modelopts_checkpoints_load_right_and_export_byte_for_byte(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[kind]
    model = load(folder)

    least = W4A16_DB if kind.startswith("W4A16") else W4A4_DB
    assert signal_to_noise(logits(load(folder, torch.float32)), logits(decoded(folder))) >= least
    _assert_export_is_the_file(model, folder)
    other = by_modelopt(tmp_path / "b", kind, seed=1)
    before = logits(model)
    reload_folder(model, other)
    assert torch.equal(logits(model), logits(load(other))), "law 9"
    reload_folder(model, folder)
    assert torch.equal(logits(model), before)


def test_each_kind_has_the_tensors_that_make_it_one(folders: dict[str, Path]) -> None:
    names = {kind: load_file(folder / "model.safetensors").keys() for kind, folder in folders.items()}

    assert not any(n.endswith("input_scale") for n in names["W4A16_NVFP4_CFG"])
    assert not any("self_attn" in n and n.endswith("weight_scale_2") for n in names["NVFP4_MLP_ONLY_CFG"])
    assert any(n.endswith("o_proj.pre_quant_scale") for n in names["NVFP4_AWQ_LITE_CFG"])
    assert any(n.endswith("k_proj.k_scale") for n in names["KV"])
    mixed = load(folders["MIXED"])
    assert type(mixed.model.layers[0].self_attn.q_proj).__name__ == "Fp8Linear"
    assert type(mixed.model.layers[0].mlp.gate_proj).__name__ == "Projection"


@pytest.mark.parametrize("activations", [True, False])
def test_compressed_tensors_checkpoints_load_right_and_export_byte_for_byte(activations: bool, tmp_path: Path) -> None:
    folder = by_compressed_tensors(tmp_path / "a", activations=activations)
    model = load(folder)

    assert signal_to_noise(logits(load(folder, torch.float32)), logits(decoded(folder))) >= (W4A4_DB if activations else W4A16_DB)
    _assert_export_is_the_file(model, folder)
    other = by_compressed_tensors(tmp_path / "b", activations=activations, seed=1)
    reload_folder(model, other)
    assert torch.equal(logits(model), logits(load(other)))


def by_transformers_itself(folder: Path) -> Any:
    """The model as transformers loads and decompresses a compressed-tensors folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with quiet():
            config = transformers.CompressedTensorsConfig(dequantize=True)
            try:
                return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
            except (ImportError, TypeError) as error:
                pytest.skip(f"transformers cannot: {error}")


def test_transformers_own_decompression_gives_the_same_weights(tmp_path: Path) -> None:
    """The peer's decoder is the oracle of ours."""
    folder = by_compressed_tensors(tmp_path / "a", activations=False)
    theirs = by_transformers_itself(folder)
    ours = decoded(folder)
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(module.weight.data, ours.get_submodule(name).weight.data.to(module.weight.dtype)), name


@pytest.mark.parametrize("kind", ["int4", "4 bits by channel", "8 bits by tensor group"])
def test_other_compressed_tensors_formats_are_refused_by_name(kind: str) -> None:
    weights = {"num_bits": 4, "type": "int" if kind == "int4" else "float", "strategy": "tensor_group", "group_size": 16}
    group = {"weights": weights, "targets": ["Linear"], "format": "nvfp4-pack-quantized"}
    groups = {"group_0": group}
    if kind == "4 bits by channel":
        groups["group_1"] = {**group, "targets": ["re:.*mlp.*"], "weights": {**weights, "strategy": "channel"}}
    if kind == "8 bits by tensor group":
        groups["group_1"] = {**group, "weights": {**weights, "num_bits": 8}, "format": "float-quantized"}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": groups}

    with pytest.raises(UnsupportedFormatError, match="not supported"):
        QuantConfig.from_dict(config)


def _assert_export_is_the_file(model: Any, folder: Path) -> None:
    exported, stored = checkpoint_state_dict(model), load_file(folder / "model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(exported[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.real
def test_smollm2_is_as_accurate_as_its_bytes_allow(checkpoints: tuple[Path, Path]) -> None:
    """The real model through `reference`, against exact arithmetic on ModelOpt's weights and the same quantized activations."""
    folder = checkpoints[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is Paris, and the sea is wide.", return_tensors="pt").input_ids
    with torch.no_grad():
        found = load(folder, torch.float32)(input_ids=ids, use_cache=False).logits
        expected = decoded(folder)(input_ids=ids, use_cache=False).logits

    assert signal_to_noise(found, expected) >= W4A4_DB
