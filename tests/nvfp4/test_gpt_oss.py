"""gpt-oss in NVFP4, as ModelOpt exports it: experts fused, by columns, gate and up as neighbours, with biases."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aliasparam import reload
from aliasparam.testing import same_bytes
from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.checkpoint import CheckpointError
from aliasparam_nvfp4.cli.inspect import findings
from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe import GPT_OSS, RELU2, ExpertActivation, retarget_experts
from aliasparam_nvfp4.moe.emulate import layer_output
from aliasparam_nvfp4.moe.runners import MoENames, moe_runners
from aliasparam_nvfp4.quantize.codec import dequantize, quantize

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import reload_folder  # noqa: E402

from .folder_models import IDS, write  # noqa: E402
from .interpreter import interpreted  # noqa: E402
from .test_real_folders import QUANTIZATION, load, logits, same  # noqa: E402

E, H, INNER = 4, 64, 48
CLAMPED = ExpertActivation(alpha=1.702, beta=1.0, limit=0.5)


def small(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=H, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=E, num_experts_per_tok=2, initializer_range=0.2, sliding_window=8, swiglu_limit=0.5,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    model.config.architectures = ["GptOssForCausalLM"]
    return model.to(torch.bfloat16).eval()


def packed(model: Any, *, each: bool = False, **inputs: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ModelOpt's tensors, decoded ones in float32); with ``gate_up_proj=`` and ``down_proj=`` input scales, W4A4; with ``each``
    a global scale for each expert."""
    totals = torch.tensor(3.0 / 2688) * (1 + torch.arange(E) / 8 if each else torch.ones(()))
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    plain = {name: t.float() for name, t in tensors.items()}
    for name in [n for n in tensors if n.endswith((".gate_up_proj", ".down_proj"))]:
        codes, scales, _ = quantize(tensors[name].float().mT.contiguous(), totals.view(-1, 1, 1) if each else totals)
        plain[name] = dequantize(codes, scales, totals.view(-1, 1, 1) if each else totals).mT.contiguous()
        tensors |= {name: codes.mT, f"{name}_weight_scale": scales.view(torch.uint8).mT.contiguous().view(scales.dtype),
                    f"{name}_weight_scale_2": totals.clone()}  # fmt: skip
        if inputs:
            tensors[f"{name}_input_scale"] = torch.full(totals.shape, inputs[name.rpartition(".")[2]])
    return tensors, plain


def folders(path: Path, seed: int, *, each: bool = False, **inputs: float) -> tuple[Path, Path, dict[str, Tensor]]:
    model = small(seed)
    tensors, plain = packed(model, each=each, **inputs)
    settings = json.loads(model.config.to_json_string())
    ignored = ["lm_head", "*self_attn*", "*router*"]
    quantization = {**QUANTIZATION, "ignore": ignored, "quant_algo": "NVFP4" if inputs else "W4A16_NVFP4"}
    a = write(path / "a", tensors, {**settings, "quantization_config": quantization})
    return a, write(path / "plain", plain, settings), tensors


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each expert"])
@pytest.mark.parametrize("inputs", [{}, {"gate_up_proj": 0.004, "down_proj": 0.006}], ids=["W4A16", "W4A4"])
def test_it_answers_right_reloads_and_exports_its_bytes(inputs: dict[str, float], each: bool, tmp_path: Path) -> None:
    cls = transformers.GptOssForCausalLM
    a, plain, tensors = folders(tmp_path / "0", 0, each=each, **inputs)
    b, _, _ = folders(tmp_path / "1", 1, each=each, **inputs)
    model = load(a, cls)
    first = logits(model)
    assert signal_to_noise(first, logits(cls.from_pretrained(plain, dtype=torch.float32).eval())) > (10 if inputs else 100)

    model.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n].reshape(-1).view(torch.uint8), same(tensors[n].contiguous(), found[n])) for n in found)
    addresses = {n: p.data_ptr() for n, p in model.named_buffers()}
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(load(b, cls))), "law 9"
    reload_folder(model, a)
    assert torch.equal(logits(model), first) and addresses == {n: p.data_ptr() for n, p in model.named_buffers()}


def test_a_bad_scale_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    cls, inputs = transformers.GptOssForCausalLM, {"gate_up_proj": 0.004, "down_proj": 0.006}
    (a, _, _), (b, _, tensors) = folders(tmp_path / "0", 0, **inputs), folders(tmp_path / "1", 1, **inputs)
    name = "model.layers.1.mlp.experts.down_proj_input_scale"
    write(b, {**tensors, name: torch.tensor(0.0)}, json.loads((b / "config.json").read_text()))
    model = load(a, cls)
    first = logits(model)

    with pytest.raises(ScaleError, match="down_proj_input_scale"):
        reload_folder(model, b)
    assert torch.equal(logits(model), first)
    with pytest.raises(ScaleError, match="missing_input_scale"):
        load(b, cls)
    dynamic = load(b, cls, missing_input_scale="dynamic")
    reload_folder(dynamic, a)
    assert torch.equal(logits(dynamic), first)


@pytest.mark.parametrize("inputs", [{}, {"gate_up_proj": 0.004, "down_proj": 0.006}], ids=["W4A16", "W4A4"])
def test_a_label_of_weights_alone_leaves_it_to_the_files(inputs: dict[str, float], tmp_path: Path) -> None:
    """Exporters call both NVFP4. What the label does not say of activations, their scales say: at the load and at each reload."""
    cls, (a, _, tensors) = transformers.GptOssForCausalLM, folders(tmp_path, 0, **inputs)
    settings = json.loads((a / "config.json").read_text())
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    settings["quantization_config"] |= {"quant_algo": "NVFP4", "config_groups": {"group_0": group}}
    b = write(tmp_path / "b", tensors, settings)

    model = load(b, cls)
    assert torch.equal(logits(model), logits(load(a, cls)))
    for folder in (b, a, b):
        reload_folder(model, folder)
    assert torch.equal(logits(model), logits(load(a, cls)))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2", "input_scale"])
def test_inspect_looks_at_the_scales_of_fused_experts(suffix: str, tmp_path: Path) -> None:
    a, _, tensors = folders(tmp_path, 0, gate_up_proj=0.004, down_proj=0.006)
    name = f"model.layers.1.mlp.experts.down_proj_{suffix}"
    spoiled = tensors[name].float().flatten()
    spoiled[-1] = float("nan")
    tensors[name] = spoiled.view(tensors[name].shape).to(tensors[name].dtype)
    bad = write(tmp_path / "b", tensors, json.loads((a / "config.json").read_text()))

    ranks: Any = {"backend": "reference", "moe_backend": "reference", "tp": 1, "ep": 1, "deep": True}
    assert findings(a, **ranks)[0]["will_load"]
    found = findings(bad, **ranks)[0]
    assert found["will_load"] is False and name in found["reasons"][0]


def test_law_9_another_label_of_the_same_experts_is_refused_by_a_reload(tmp_path: Path) -> None:
    a, _, tensors = folders(tmp_path, 0, gate_up_proj=0.004, down_proj=0.006)
    model = load(a, transformers.GptOssForCausalLM)
    first = logits(model)
    settings = json.loads((a / "config.json").read_text())
    settings["quantization_config"]["quant_algo"] = "W4A16_NVFP4"

    with pytest.raises(CheckpointError, match="quantized in another way"):
        reload_folder(model, write(tmp_path / "b", tensors, settings))
    assert torch.equal(logits(model), first)


def exported(path: Path, seed: int) -> Path:
    """By ModelOpt itself."""
    pytest.importorskip("modelopt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = mtq.quantize(small(seed), copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), lambda m: m(input_ids=IDS))
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=path)
    return path


def test_it_loads_what_modelopt_itself_exports(tmp_path: Path) -> None:
    exported(tmp_path, 0)
    stored = load_file(tmp_path / "model.safetensors")
    served = load(tmp_path, transformers.GptOssForCausalLM)

    # All of it in 4 bits; nonsense gives less than 0. With transformers 5.17 ModelOpt takes one input scale 25 times too large.
    assert signal_to_noise(logits(served), logits(small(0).float())) > 2
    served.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[n].reshape(-1).view(torch.uint8), same(stored[n], found[n])) for n in found)


def layer_for(runner: str, activation: ExpertActivation = CLAMPED, **how: Any) -> tuple[NvFp4MoEMethod, nn.Module]:
    method, layer = NvFp4MoEMethod(runner, activation=activation, input_scale=False, bias=True, **how), nn.Module()
    method.create_weights(layer, E, H, INNER, torch.bfloat16)
    return method, layer


def weights_of(activation: ExpertActivation = CLAMPED) -> dict[str, Tensor]:
    """Rows [gate; up] under the method's names."""
    random = torch.Generator().manual_seed(0)
    rows = 2 * INNER if activation.gated else INNER
    w13, s13, total = quantize(torch.randn(E, rows, H, generator=random) / 8)
    w2, s2, total2 = quantize(torch.randn(E, H, INNER, generator=random) / 8)
    return {
        "w13_weight": w13, "w13_weight_scale": s13, "w13_weight_scale_2": total.expand((E, 2) if activation.gated else (E,)),
        "w2_weight": w2, "w2_weight_scale": s2, "w2_weight_scale_2": total2.expand(E),
        "w13_bias": torch.randn(E, rows, generator=random).to(torch.bfloat16),
        "w2_bias": torch.randn(E, H, generator=random).to(torch.bfloat16),
    }  # fmt: skip


def choices() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    weights, ids = torch.randn(6, E, generator=random).softmax(-1).topk(2)
    return torch.randn(6, H, generator=random).to(torch.bfloat16), weights, ids.int()


def by_hand(activation: ExpertActivation) -> Tensor:
    t, (x, weights, ids) = weights_of(activation), choices()
    w13 = dequantize(t["w13_weight"], t["w13_weight_scale"], t["w13_weight_scale_2"].reshape(E, -1)[0, 0]).double()
    w2 = dequantize(t["w2_weight"], t["w2_weight_scale"], t["w2_weight_scale_2"][0]).double()
    out = torch.zeros(6, H, dtype=torch.float64)
    for token in range(6):
        for weight, e in zip(weights[token].double(), ids[token].tolist(), strict=True):
            sums = w13[e] @ x[token].double() + t["w13_bias"][e].double()
            hidden = activation(*sums.chunk(2)) if activation.gated else activation(sums, None)
            out[token] += weight * (w2[e] @ hidden + t["w2_bias"][e].double())
    return out


@pytest.mark.parametrize("activation", [CLAMPED, RELU2], ids=["clamped", "relu2"])
def test_biases_are_added_to_true_values(activation: ExpertActivation) -> None:
    method, layer = layer_for("reference", activation, retarget_to=("triton",))
    with reload(layer) as session:
        session.load(weights_of(activation))
    x, weights, ids = choices()

    assert signal_to_noise(method.apply(layer, x, weights, ids).double(), by_hand(activation)) > 45  # rounded to bf16
    names, shape = cast(MoENames, layer), layer.__dict__["nvfp4_moe_shape"]
    triton = moe_runners()["triton"]
    if retarget_experts(layer, "triton"):
        assert signal_to_noise(layer_output(names, triton, shape, x, weights, ids), by_hand(activation)) > 100


def test_both_forms_hold_the_same_experts() -> None:
    rows, columns = layer_for("reference"), layer_for("reference", stored=GPT_OSS)
    tensors = weights_of()
    with reload(rows[1]) as session:
        session.load(tensors)
    fused = {name: paired(t, name) for name, t in tensors.items()}
    with reload(columns[1]) as session:
        session.load(fused)

    assert torch.equal(rows[0].apply(rows[1], *choices()), columns[0].apply(columns[1], *choices()))
    assert all(same_bytes(columns[1].get_parameter(n), t) for n, t in fused.items())


@pytest.mark.parametrize("ep_size", [2, E])
def test_ranks_of_which_each_loads_whole_tensors_add_up(ep_size: int) -> None:
    """Also with one expert on each, whose one scale is still that of all."""
    total = torch.zeros(6, H)
    for rank in range(ep_size):
        method, layer = NvFp4MoEMethod("reference", bias=True, stored=GPT_OSS, ep_size=ep_size, ep_rank=rank), nn.Module()
        method.create_weights(layer, E // ep_size, H, INNER, torch.float32)
        for name, tensor in weights_of(ExpertActivation()).items():
            param, value = layer.get_parameter(name), paired(tensor, name)
            whole = value.float() if name.endswith("bias") else value
            param.weight_loader(param, whole, name, name.partition("_")[0])  # type: ignore[operator]
        for name in ("w13_input_scale", "w2_input_scale"):
            param = layer.get_parameter(name)
            param.weight_loader(param, torch.tensor(0.004), name, name.partition("_")[0])  # type: ignore[operator]
        method.process_weights_after_loading(layer)
        x, weights, ids = choices()
        total += method.apply(layer, x.float(), weights, ids)

    assert signal_to_noise(total.double(), by_hand(ExpertActivation())) > 10  # activations are quantized


def paired(tensor: Tensor, name: str) -> Tensor:
    """[gate; up] rows as neighbouring columns."""
    if name.endswith("_scale_2"):
        return tensor.reshape(-1)[:1].clone()
    if name == "w13_bias":
        return torch.stack(tensor.chunk(2, -1), -1).flatten(-2)
    if name == "w2_bias":
        return tensor
    plain = tensor.view(torch.uint8)
    if name.startswith("w13"):
        plain = torch.stack(plain.chunk(2, 1), 2).flatten(1, 2)
    return plain.mT.contiguous().view(tensor.dtype)


def test_an_engines_loader_takes_biases_expert_by_expert() -> None:
    _, layer = layer_for("reference")
    tensors = weights_of()
    for name in ("w13_bias", "w2_bias"):
        param = layer.get_parameter(name)
        for expert in range(E):
            value = tensors[name][expert]
            shards = {"w1": value[:INNER], "w3": value[INNER:]} if name == "w13_bias" else {"w2": value}
            for shard, part in shards.items():
                param.weight_loader(param, part, name, shard, expert)  # type: ignore[operator]
        assert torch.equal(param, tensors[name])


def main() -> None:
    """The Triton runner under its interpreter."""
    for activation in (CLAMPED, RELU2):
        method, layer = layer_for("triton", activation)
        with reload(layer) as session:
            session.load(weights_of(activation))
        decibel = signal_to_noise(method.apply(layer, *choices()).double(), by_hand(activation))
        assert decibel > 40, (activation, decibel)
    print("held")


def test_the_triton_runner_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    assert "held" in interpreted("tests.nvfp4.test_gpt_oss")


if __name__ == "__main__":
    main()
