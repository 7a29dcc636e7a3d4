"""The transformers quantizer on a small ModelOpt-shaped checkpoint, and on the demo's real ones."""

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

from aliasparam import checkpoint_state_dict, process
from aliasparam.errors import AliasError, StaleKernelError
from aliasparam_nvfp4.checkpoint import CheckpointError, UnsupportedFormatError
from aliasparam_nvfp4.demo.run import addresses, fingerprints
from aliasparam_nvfp4.errors import BackendError, ScaleError
from aliasparam_nvfp4.quantize.codec import quantize

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import ModelOptQuantizer, answer, load_model, logits, reload_folder, use_backend  # noqa: E402

IDS = torch.arange(12).view(1, 12)
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def write_checkpoint(folder: Path, seed: int, *, bias: bool = False) -> Path:
    """A two-layer Llama with ragged dims (heads of 16, 48 hidden, 80 neurons), in ModelOpt's format."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, attention_bias=bias, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    tensors: dict[str, Tensor] = {n: t for n, t in state.items() if not n.endswith("proj.weight")}
    largest: dict[str, Tensor] = {}
    linears = {n.removesuffix(".weight"): t for n, t in state.items() if n.endswith("proj.weight")}
    for name, weight in linears.items():
        group = name.rpartition(".")[0] + FUSED.get(name.rpartition(".")[2], name)
        largest[group] = torch.maximum(largest.get(group, torch.zeros(())), weight.abs().amax().float())
    for name, weight in linears.items():
        group = name.rpartition(".")[0] + FUSED.get(name.rpartition(".")[2], name)
        packed, scale, total = quantize(weight, largest[group] / 2688)
        tensors |= {f"{name}.weight": packed, f"{name}.weight_scale": scale, f"{name}.weight_scale_2": total.clone()}
        tensors[f"{name}.input_scale"] = torch.tensor(0.002 + 0.001 * seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    raw = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)


def load(folder: Path) -> Any:
    with use_backend("reference"):
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    raw = lambda t: t.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return a.keys() == b.keys() and all(torch.equal(raw(a[n]), raw(b[n])) for n in a)


def test_law_5_the_export_is_the_file_byte_for_byte(two: tuple[Path, Path]) -> None:
    model = load(two[0])

    assert same_bytes(checkpoint_state_dict(model), load_file(two[0] / "model.safetensors"))
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len(checkpoint_state_dict(model))


def test_law_9_warm_equals_cold_and_back(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    first, where = out(model), addresses(model)

    reload_folder(model, two[1])
    warm, cold = out(model), load(two[1])
    assert torch.equal(warm, out(cold))
    assert fingerprints(model) == fingerprints(cold)
    assert not torch.equal(warm, first)
    assert process(model) == 0

    reload_folder(model, two[0], chunk_bytes=100)
    assert torch.equal(out(model), first)
    assert addresses(model) == where


def test_the_folder_written_by_save_pretrained_loads_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(two[0])
    model.save_pretrained(tmp_path / "saved")

    again = load(tmp_path / "saved")

    assert torch.equal(out(again), out(model))
    assert same_bytes(load_file(tmp_path / "saved" / "model.safetensors"), load_file(two[0] / "model.safetensors"))


def test_transformers_own_hot_reload_by_load_state_dict(two: tuple[Path, Path]) -> None:
    model, cold = load(two[0]), load(two[1])
    where = addresses(model)

    model.load_state_dict(load_file(two[1] / "model.safetensors"), strict=False)
    with pytest.raises(StaleKernelError):
        out(model)
    process(model)

    assert torch.equal(out(model), out(cold))
    assert addresses(model) == where


def test_a_deep_copy_is_a_model_of_its_own(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    first = out(model)
    twin = copy.deepcopy(model)

    reload_folder(model, two[1])

    assert torch.equal(out(twin), first)
    reload_folder(twin, two[1])
    assert torch.equal(out(twin), out(model))


def test_biases_are_carried(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "biased", 3, bias=True))

    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert same_bytes(checkpoint_state_dict(model), load_file(tmp_path / "biased" / "model.safetensors"))


def test_inference_mode_gives_the_same(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    with torch.inference_mode():
        inside = model(input_ids=IDS, use_cache=False).logits

    assert torch.equal(inside, out(model))


def test_projections_that_do_not_share_a_scale_stay_apart_and_right(two: tuple[Path, Path]) -> None:
    file = two[0] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight_scale_2"
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})

    model = load(two[0])

    assert not hasattr(model.model.layers[0].self_attn, "qkv_proj")
    assert hasattr(model.model.layers[1].self_attn, "qkv_proj")
    assert same_bytes(checkpoint_state_dict(model), tensors)


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


NAME = "model.layers.1.mlp.down_proj.weight_scale"
SCALE = "model.layers.0.self_attn.k_proj.weight_scale_2"


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_nvfp4(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


BAD: dict[str, tuple[Callable[[Path], None], type[AliasError], str]] = {
    "a folder that is not NVFP4": (not_nvfp4, UnsupportedFormatError, "not quantized"),
    "another architecture": (another_model, CheckpointError, "rms_norm_eps"),
    "a truncated file": (truncate, CheckpointError, "truncated"),
    "a missing tensor": (edit(lambda t: t.__delitem__(NAME)), CheckpointError, f"missing: {NAME}"),
    "an extra tensor": (edit(lambda t: t.update(extra=torch.ones(1))), CheckpointError, "unexpected: extra"),
    "a wrong shape": (edit(lambda t: t.update({NAME: t[NAME][:-1].clone()})), CheckpointError, f"{NAME}: expected"),
    "a wrong dtype": (edit(lambda t: t.update({NAME: t[NAME].float()})), CheckpointError, "found float32"),
    "scales that differ": (edit(lambda t: t.update({SCALE: t[SCALE] * 2})), ScaleError, "different weight global scales"),
    "a scale that is none": (edit(lambda t: t.update({SCALE: t[SCALE] * float("nan")})), ScaleError, "scale"),
}


@pytest.mark.parametrize("case", BAD)
def test_law_10_a_bad_folder_is_one_clear_error_and_the_model_still_answers(two: tuple[Path, Path], case: str) -> None:
    poison, kind, message = BAD[case]
    model = load(two[0])
    first, held = out(model), fingerprints(model)
    poison(two[1])

    with pytest.raises(kind) as error:
        reload_folder(model, two[1])

    assert message in str(error.value)
    assert torch.equal(out(model), first)
    assert fingerprints(model) == held
    reload_folder(model, two[0])


@pytest.mark.parametrize("case", ["a missing tensor", "an extra tensor", "a wrong shape", "a truncated file"])
def test_a_bad_folder_is_refused_by_a_cold_load_too(two: tuple[Path, Path], case: str) -> None:
    poison, kind, message = BAD[case]
    poison(two[0])

    with pytest.raises((kind, OSError), match=r".") as error:
        load(two[0])

    assert isinstance(error.value, OSError) or message in str(error.value)


def test_an_unknown_backend_is_refused(two: tuple[Path, Path]) -> None:
    with pytest.raises(BackendError, match="unknown linear backend"):
        load_model(two[0], "cutlas")


def test_a_backend_that_cannot_serve_the_folder_is_refused_before_weights_are_read(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelOptQuantizer, "_process_model_after_weight_loading", lambda *_, **__: pytest.fail("all was read"))
    with (
        pytest.raises(BackendError, match="cannot compute activation scales at run time"),
        use_backend("flashinfer_cutlass", missing_input_scale="dynamic"),
    ):
        transformers.AutoModelForCausalLM.from_pretrained(two[0])


# -- real weights --------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_weights_answer_reload_and_answer_again(checkpoints: tuple[Path, Path]) -> None:
    a, b = checkpoints
    model, tokenizer = load_model(a, "reference")
    prompt = "What is the capital of France?"

    texts, lasts = [], []
    for folder in (None, b, a):
        if folder:
            reload_folder(model, folder)
        texts.append(answer(model, tokenizer, prompt))
        lasts.append(logits(model, tokenizer, prompt))

    assert texts == [f"This is checkpoint {tag}. The capital of France is Paris." for tag in "ABA"]
    assert torch.equal(lasts[0], lasts[2])


@pytest.mark.real
def test_real_files_hold_what_modelopt_dequantizes(checkpoints: tuple[Path, Path]) -> None:
    """The fused, swizzled bytes that the kernel reads, against ModelOpt's own dequantization of the file."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    from aliasparam_nvfp4.linear.reference import kernel_weight

    model, _ = load_model(checkpoints[0], "reference")
    files = load_file(checkpoints[0] / "model.safetensors")
    fused = model.model.layers[7].self_attn.qkv_proj
    ours = kernel_weight(fused.weight_prepared, fused.weight_scale_interleaved, n=960, k=576)
    start = 0
    for name, rows in (("q_proj", 576), ("k_proj", 192), ("v_proj", 192)):
        packed, scale, total = (
            files[f"model.layers.7.self_attn.{name}.{k}"] for k in ("weight", "weight_scale", "weight_scale_2")
        )
        theirs = NVFP4QTensor(torch.Size((rows, 576)), torch.float32, packed).dequantize(
            dtype=torch.float32, scale=scale, double_scale=total, block_sizes={-1: 16}
        )
        assert torch.allclose(ours[start : start + rows] * total, theirs, rtol=2e-7, atol=0)
        start += rows


@pytest.mark.real
def test_a_and_b_differ_in_nearly_every_tensor(checkpoints: tuple[Path, Path]) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in checkpoints)
    differing = [n for n in a if not torch.equal(a[n].float(), b[n].float())]

    assert a.keys() == b.keys()
    for kind, least in (("weight", 0.99), ("weight_scale", 0.99), ("weight_scale_2", 0.8), ("input_scale", 0.5)):
        names = [n for n in a if n.endswith(f"_proj.{kind}")]
        assert len([n for n in names if n in differing]) >= least * len(names), kind


def test_copying_a_checkpoint_folder_keeps_it_loadable(two: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "copy")

    assert torch.equal(out(load(tmp_path / "copy")), out(load(two[0])))
