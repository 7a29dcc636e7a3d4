"""Folders as they are published: they load, answer as transformers on decoded weights, reload, and export their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aliasparam import checkpoint_digest
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.errors import DeltaError
from aliasparam.reload.observe import Hooks
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam_nvfp4.checkpoint import CheckpointError
from aliasparam_nvfp4.linear.verify import signal_to_noise

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import apply_delta_folder, reload_folder, use_backend  # noqa: E402
from aliasparam_nvfp4.integrations.transformers.config import model_config  # noqa: E402

from .folder_models import IDS, MODELS, quantized, saved, write  # noqa: E402

QUANTIZATION = {
    "quant_method": "modelopt",
    "quant_algo": "W4A16_NVFP4",
    "ignore": ["lm_head", "mtp*", "*visual*", "vision_tower*"],
}


def load(folder: Path, kind: type[Any], **options: Any) -> Any:
    with use_backend("reference", moe="reference", **options):
        return kind.from_pretrained(folder, config=model_config(folder), dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double()  # type: ignore[no-any-return]


def folders(kind: str, seed: int, path: Path) -> tuple[Path, Path, dict[str, Tensor], type[Any]]:
    """(as published, decoded, the published tensors that a model takes, class)."""
    tensors, config, cls = saved(kind, seed)
    packed, plain = quantized(tensors)
    assert any(t.dtype is torch.uint8 for t in packed.values())
    extra = {name: torch.zeros(4, 4, dtype=torch.bfloat16) for name in MODELS[kind][1]}
    published = write(path / "published", {**packed, **extra}, {**config, "quantization_config": QUANTIZATION})
    return published, write(path / "decoded", plain, config), packed, cls


@pytest.mark.parametrize("kind", MODELS)
def test_a_published_folder_answers_right_reloads_and_exports_its_bytes(kind: str, tmp_path: Path) -> None:
    a, decoded, tensors, cls = folders(kind, 0, tmp_path / "a")
    b, _decoded_b, _, _ = folders(kind, 1, tmp_path / "b")
    if kind == "Gemma-4":
        plain = gemma(decoded, cls)
    else:
        plain = cls.from_pretrained(decoded, dtype=torch.float32).eval()
    model = load(a, cls)
    first = logits(model)

    assert signal_to_noise(first, logits(plain)) >= 100
    assert set(model.hf_quantizer.report.dropped) == set(MODELS[kind][1])
    model.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n].reshape(-1).view(torch.uint8), same(tensors[n], found[n])) for n in found)
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(load(b, cls))), "law 9"
    reload_folder(model, a)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("kind", MODELS)
def test_law_12_a_delta_of_a_published_folder_is_a_reload_of_the_next(kind: str, tmp_path: Path) -> None:
    """Converted tensors, experts in one, parts that the model drops: all of them change from A to B."""
    a, _, _, cls = folders(kind, 0, tmp_path / "a")
    b, _, _, _ = folders(kind, 1, tmp_path / "b")
    with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new:
        diff(old, new, tmp_path / "to-b", 1, 0)
        diff(new, old, tmp_path / "to-a", 2, 1, encoding="overwrite", checksum_format="adler32")
    with use_backend("reference", moe="reference"):
        model, cold = (cls.from_pretrained(f, config=model_config(f), dtype=torch.bfloat16).eval() for f in (a, b))
    first, before = logits(model), checkpoint_digest(model)
    assert apply_delta_folder(model, tmp_path / "to-b", serving=0) == 1
    assert checkpoint_digest(model) == checkpoint_digest(cold) and torch.equal(logits(model), logits(cold))
    with pytest.raises(DeltaError, match="the checksum of the new bytes differs"):
        apply_delta_folder(model, tmp_path / "to-b")
    assert apply_delta_folder(model, tmp_path / "to-a", serving=1) == 2
    assert checkpoint_digest(model) == before and torch.equal(logits(model), first)


def same(stored: Tensor, found: Tensor) -> Tensor:
    """The stored tensor's bytes, in the dtype in which what is not quantized is served."""
    return (
        stored.to(found.dtype).reshape(-1).view(torch.uint8)
        if stored.dtype is torch.bfloat16
        else stored.reshape(-1).view(torch.uint8)
    )


def gemma(folder: Path, cls: type[Any]) -> Any:
    """transformers has no conversion for Gemma's experts apart: they are stacked here."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, files = cls(config).float().eval(), load_file(folder / "model.safetensors")
    for path, _module in model.named_modules():
        if path.endswith(".experts"):
            each = {
                p: torch.stack([files.pop(f"{path}.{e}.{p}.weight") for e in range(4)])
                for p in ("gate_proj", "up_proj", "down_proj")
            }
            files[f"{path}.gate_up_proj"] = torch.cat([each["gate_proj"], each["up_proj"]], 1)
            files[f"{path}.down_proj"] = each["down_proj"]
    model.load_state_dict(files)
    return model


def test_a_tensor_that_no_rule_knows_is_refused_cold_and_warm(tmp_path: Path) -> None:
    published, _, tensors, cls = folders("DeepSeek-V3", 0, tmp_path)
    config = model_config(published)
    model = load(published, cls)
    odd = {
        **tensors,
        "model.layers.7.mlp.up_proj.weight": torch.zeros(4, 4),
        "model.layers.1.mlp.experts.9.up_proj.bias": torch.ones(1),
    }
    bad = write(tmp_path / "bad", odd, {**config.to_dict(), "quantization_config": QUANTIZATION})

    for take in (lambda: load(bad, cls), lambda: reload_folder(model, bad)):
        with pytest.raises(CheckpointError, match=r"expert 9 is unexpected|layers\.7\.mlp\.up_proj"):
            take()


def test_a_text_model_of_a_folder_with_a_vision_tower_says_what_it_drops(tmp_path: Path) -> None:
    published, decoded, _, cls = folders("Qwen3.5", 0, tmp_path)

    text = load(published, transformers.AutoModelForCausalLM)

    assert signal_to_noise(logits(text), logits(cls.from_pretrained(decoded, dtype=torch.float32).eval())) >= 100
    rules = set(text.hf_quantizer.report.dropped.values())
    assert rules == {"Qwen3_5ForCausalLM ignores them"} and "model.visual" in str(text.hf_quantizer.report)
    reload_folder(text, published)


def test_input_scales_that_no_calibration_gave_are_refused_or_the_largest(tmp_path: Path) -> None:
    """Of one expert missing, of another 0: as if each had the largest of the layer."""
    tensors, config, cls = saved("GLM-4.5")
    packed, _ = quantized(tensors)
    modules = [n.rpartition(".")[0] for n, t in packed.items() if t.dtype is torch.uint8]
    packed |= {f"{module}.input_scale": torch.tensor(0.003) for module in modules}
    settings = {**config, "quantization_config": {**QUANTIZATION, "quant_algo": "NVFP4"}}
    whole = load(write(tmp_path / "whole", packed, settings), cls)
    experts = "model.layers.1.mlp.experts"
    lacking = {n: t for n, t in packed.items() if n != f"{experts}.1.up_proj.input_scale"}
    lacking[f"{experts}.2.down_proj.input_scale"] = torch.tensor(0.0)
    folder = write(tmp_path / "lacking", lacking, settings)

    with pytest.raises(CheckpointError, match=r"expert 1 lacks w3 input_scale"):
        load(folder, cls)
    model = load(folder, cls, missing_input_scale="max")

    assert torch.equal(logits(model), logits(whole))
    model.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == lacking.keys() and float(found[f"{experts}.2.down_proj.input_scale"]) == 0
    reload_folder(model, folder)
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize(("missing", "without"), [("dynamic", {1}), ("dynamic-tensor", set(range(4)))])
def test_scales_computed_at_run_time_reload_and_export(missing: str, without: set[int], tmp_path: Path) -> None:
    """One dense layer without the tensors, one with 0 in them; of the experts one or all without, one with 0."""

    def folder(seed: int) -> tuple[Path, Path, dict[str, Tensor], type[Any]]:
        tensors, config, cls = saved("GLM-4.5", seed)
        packed, plain = quantized(tensors)
        scaled = {f"{n.rpartition('.')[0]}.input_scale": torch.tensor(0.003) for n, t in packed.items() if t.dtype is torch.uint8}
        dense, experts = "model.layers.0.mlp", "model.layers.1.mlp.experts"
        scaled[f"{dense}.gate_proj.input_scale"] = torch.tensor(0.0)
        scaled[f"{experts}.2.down_proj.input_scale"] = torch.tensor(0.0)
        halves = [f"{experts}.{expert}.{half}" for expert in without for half in ("gate_proj", "up_proj")]
        for lacking in (f"{dense}.down_proj", *halves):
            del scaled[f"{lacking}.input_scale"]
        settings = {**config, "quantization_config": {**QUANTIZATION, "quant_algo": "NVFP4"}}
        path = tmp_path / str(seed)
        return write(path / "a", {**packed, **scaled}, settings), write(path / "d", plain, config), {**packed, **scaled}, cls

    (a, decoded, tensors, cls), (b, *_) = folder(0), folder(1)
    with pytest.raises(CheckpointError, match=r"missing: .*down_proj.input_scale|lacks w1 input_scale"):
        load(a, cls)
    model = load(a, cls, missing_input_scale=missing)
    first = logits(model)

    # Activations of 4 bits give 15 to 20 dB; a scale that is left out or doubled gives less than 3.
    assert signal_to_noise(first, logits(cls.from_pretrained(decoded, dtype=torch.float32).eval())) > 10
    model.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n].reshape(-1).view(torch.uint8), same(tensors[n], found[n])) for n in found)
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(load(b, cls, missing_input_scale=missing))), "law 9"
    reload_folder(model, a)
    assert torch.equal(logits(model), first)


class Holder(nn.Module):
    """A trainer's own module around models."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)

    def forward(self, **inputs: Any) -> Any:
        return next(self.children())(**inputs)


def test_a_model_in_a_module_of_the_callers_own_reloads(tmp_path: Path) -> None:
    a, _, _, cls = folders("GLM-4.5", 0, tmp_path / "a")
    b, _, _, _ = folders("GLM-4.5", 1, tmp_path / "b")
    model, other = load(a, cls), load(b, cls)
    first, second = logits(model), logits(other)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (Holder(policy=model), torch.compile(Holder(policy=model), backend="eager"), Holder(policy=compiled)):
        for folder, expected in ((b, second), (a, first)):
            reload_folder(wrapped, folder)
            assert torch.equal(logits(wrapped), expected)
    for odd, message in (
        (torch.compile(compiled, backend="eager"), "no module"),
        (Holder(policy=model, reference=other), r"several quantized models(?s:.*)policy, reference"),
        (nn.Linear(2, 2), "no model that was loaded"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reload_folder(odd, b)
    assert torch.equal(logits(model), first)


def test_a_wrapped_model_reloads_and_entries_that_change_nothing_are_named(tmp_path: Path) -> None:
    a, _, _, cls = folders("GLM-4.5", 0, tmp_path / "a")
    b, _, _, _ = folders("GLM-4.5", 1, tmp_path / "b")
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, "eos_token_id": 7, "somebodys_note": "x"}))
    model = load(a, cls)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    wrapped = torch.compile(model, backend="eager")

    with pytest.raises(CheckpointError, match="another model"):
        reload_folder(wrapped, b, strict=True)
    with pytest.warns(UserWarning, match=r"eos_token_id: .* to 7"):
        reload_folder(wrapped, b)

    assert signal_to_noise(logits(wrapped), logits(load(b, cls))) >= 100
    (b / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        reload_folder(wrapped, b)


def test_a_delta_is_refused_by_a_model_whose_reload_failed_and_a_reload_leads_out(tmp_path: Path) -> None:
    """Refusing twins stand in the places of what transformers converts."""
    (old, *_), (new, _, _, cls) = folders("Kimi-K2.5", 0, tmp_path / "a"), folders("Kimi-K2.5", 1, tmp_path / "b")
    with SafetensorsFolder(old) as before, SafetensorsFolder(new) as after:
        diff(before, after, tmp_path / "delta", 1, 0)
    model = load(old, cls)
    with pytest.raises(ZeroDivisionError):
        reload_folder(model, new, policy="staged", hooks=Hooks(on_commit=[lambda session: 1 / 0]))
    with pytest.raises(DeltaError):
        apply_delta_folder(model, tmp_path / "delta")
    reload_folder(model, new)
    assert torch.equal(logits(model), logits(load(new, cls)))
