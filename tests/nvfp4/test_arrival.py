"""Weights of 16 bits that arrive at a model which serves NVFP4: what they become is what ModelOpt would have stored."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aliasparam import checkpoint_names, checkpoint_state_dict, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.layout.boxes import whole
from aliasparam_nvfp4 import NvFp4LinearMethod, quantize_on_arrival
from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.linear.verify import random_weights
from aliasparam_nvfp4.quantize.codec import quantize

pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import compressed_tensors_here

from ..conftest import DEVICES
from . import test_gpt_oss as gpt_oss
from .moe_models import by_compressed_tensors, by_modelopt, load, small_moe

KEPT = ("input_scale", "input_global_scale")
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("arrival")

    @functools.cache
    def made(make: Callable[..., Path], seed: int) -> Path:
        return make(root / f"{make.__name__}-{seed}", "qwen3", seed)

    return made


@functools.cache
def trained(seed: int) -> dict[str, Tensor]:
    """A model's values under the names of the checkpoint: experts apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in small_moe("qwen3", seed).state_dict().items():
        path, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for expert, both in enumerate(tensor):
                for half, rows in zip(("gate", "up"), both.chunk(2), strict=True):
                    found[f"{path}.{expert}.{half}_proj.weight"] = rows
        elif leaf == "down_proj":
            found |= {f"{path}.{expert}.down_proj.weight": one for expert, one in enumerate(tensor)}
        elif name != "lm_head.weight":
            found[name] = tensor
    return found


@functools.cache
def model_of(folder: Path) -> Any:

    with compressed_tensors_here():
        return load(folder)


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = checkpoint_state_dict(model)
    yield
    after = checkpoint_state_dict(model)
    assert all(torch.equal(bits(after[name]), bits(value)) for name, value in before.items())


def bits(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def in_parts(tensors: dict[str, Tensor], seed: int) -> Iterator[Any]:
    """In any order, whole or in two parts, in one buffer that is used again, as a stream's is."""
    chosen, items = random.Random(seed), list[Any]()
    for name, value in tensors.items():
        cut = chosen.randrange(value.shape[0]) if chosen.random() < 0.5 else 0
        rest = whole(value.shape[1:])
        both = [(0, cut), (cut, value.shape[0])] if cut else []
        items += [(name, value[a:b], ((a, b), *rest)) for a, b in both] or [(name, value)]
    chosen.shuffle(items)
    buffer = torch.empty(max(value.numel() for value in tensors.values()), dtype=torch.bfloat16)
    for name, value, *box in items:
        view = buffer[: value.numel()].view(value.shape)
        yield name, view.copy_(value), *box
        buffer.fill_(float("nan"))


@pytest.mark.parametrize("make", [by_modelopt, by_compressed_tensors])
@given(seed=st.integers(0, 999), policy=st.sampled_from(["write-through", "staged", "journal"]))
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_law_9_what_arrives_is_what_an_export_holds(folders: Folders, make: Callable[..., Path], seed: int, policy: Any) -> None:
    """ModelOpt's exporter, and compressed-tensors' (which rounds global scales to 16 bits: there, to a step)."""
    model, which = model_of(folders(make, 0)), seed % 2
    before = checkpoint_state_dict(model)
    with reload(model, policy=policy) as session:
        session.load(quantize_on_arrival(in_parts(trained(which), seed), session.tensors))
    now, stored = checkpoint_state_dict(model), load_file(folders(make, which) / "model.safetensors")
    assert now.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}
    for name, value in stored.items():
        if name.endswith(KEPT):
            assert torch.equal(now[name], before[name]), name
        elif make is by_modelopt or ("_scale" not in name and "packed" not in name):
            assert torch.equal(bits(now[name]), bits(value)), name
        elif "global" in name:
            torch.testing.assert_close(now[name], value, rtol=2**-7, atol=0)
        elif name.endswith("weight_scale"):
            assert (bits(now[name]).int() - bits(value).int()).abs().max() <= 1, name


@pytest.mark.parametrize("make", [by_modelopt, by_compressed_tensors])
def test_a_scale_that_is_kept_quantizes_each_weight_by_itself(folders: Folders, make: Callable[..., Path]) -> None:
    model = model_of(folders(make, 0))
    before, few = checkpoint_state_dict(model), "model.layers.1.mlp.experts.3.up_proj.weight"
    new = trained(0)[few] * 0.5
    with reload(model, scope="partial") as session:
        session.load(quantize_on_arrival({few: new}, session.tensors, "kept"))
    path, now = few.removesuffix(".weight"), checkpoint_state_dict(model)
    leaf, name = ("weight", "weight_scale_2") if make is by_modelopt else ("weight_packed", "weight_global_scale")
    scale = before[f"{path}.{name}"].reshape(())
    packed, blocks, _ = quantize(new, scale if make is by_modelopt else 1.0 / scale)
    expected = before | {f"{path}.{leaf}": packed, f"{path}.weight_scale": blocks}
    assert all(torch.equal(bits(now[n]), bits(value)) for n, value in expected.items())
    with unchanged(model), pytest.raises(ScaleError, match=r"experts\.3\.up_proj.*cannot say the largest"):  # noqa: SIM117
        with reload(model, scope="partial", policy="journal") as session:
            session.load(quantize_on_arrival({few: trained(0)[few] * 3}, session.tensors, "kept"))


def test_law_9_of_gpt_oss_what_arrives_is_what_modelopt_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts fused, by columns, in several pieces; one global scale for all of a tensor."""
    a, b = gpt_oss.exported(tmp_path / "a", 0), gpt_oss.exported(tmp_path / "b", 1)
    monkeypatch.setattr("aliasparam_nvfp4.arrival._PIECE", 1000)
    model = load(a)
    before, values = checkpoint_state_dict(model), gpt_oss.small(1).state_dict()
    with reload(model, policy="journal") as session:
        session.load(quantize_on_arrival(in_parts(values, 0), session.tensors))
    now, stored = checkpoint_state_dict(model), load_file(b / "model.safetensors")
    assert now.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(bits(now[name]), bits(before[name] if name.endswith("input_scale") else value)), name
    fused = "model.layers.0.mlp.experts.down_proj"
    with reload(model, scope="partial") as session:
        session.load(quantize_on_arrival({fused: values[fused] * 0.5}, session.tensors, "kept"))
    assert torch.equal(checkpoint_state_dict(model)[f"{fused}_weight_scale_2"], stored[f"{fused}_weight_scale_2"])


@pytest.mark.parametrize("recipe", ["max", "kept"])
def test_every_expert_of_one_tensor_keeps_a_scale_of_its_own(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the files have that: each is quantized as if it came alone."""
    monkeypatch.setattr("aliasparam_nvfp4.arrival._PIECE", 1000)
    model, name = load(gpt_oss.folders(tmp_path, 0, each=True)[0]), "model.layers.0.mlp.experts.down_proj"
    before, value = checkpoint_state_dict(model), gpt_oss.small(1).state_dict()[name]
    value = value * torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=value.dtype).view(-1, 1, 1)
    kept = before[f"{name}_weight_scale_2"]
    scales = kept if recipe == "kept" else torch.where(value.any(-1).any(-1), value.abs().amax((1, 2)).float() / 2688, 1.0)
    with reload(model, scope="partial") as session:
        session.load(quantize_on_arrival({name: value}, session.tensors, recipe))
    made = [quantize(one.mT.contiguous(), scale)[:2] for one, scale in zip(value, scales, strict=True)]
    codes, blocks = (torch.stack(parts).view(torch.uint8).mT.contiguous() for parts in zip(*made, strict=True))
    expected = before | {name: codes, f"{name}_weight_scale": blocks, f"{name}_weight_scale_2": scales}
    now = checkpoint_state_dict(model)
    assert all(torch.equal(bits(now[n]), bits(stored)) for n, stored in expected.items())
    large = value.clone()
    large[1] *= 2688 * kept[1] / large[1].abs().max() * 1.01
    assert large.abs().max() < 2688 * kept.max()
    with unchanged(model), pytest.raises(ScaleError, match=r"down_proj.*cannot say the largest"):  # noqa: SIM117
        with reload(model, scope="partial", policy="journal") as session:
            session.load(quantize_on_arrival({name: large}, {**session.tensors, f"{name}_weight_scale_2": kept}, "kept"))


def test_scales_of_a_kv_cache_stay_as_those_of_other_activations_do(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders(by_modelopt, 0), tmp_path / "a")
    file, layer = tmp_path / "a" / "model.safetensors", "model.layers.1.self_attn"
    scales = {f"{layer}.k_proj.k_scale": torch.tensor(0.5), f"{layer}.v_scale": torch.tensor(0.25)}
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    model = load(tmp_path / "a")
    with reload(model) as session:
        session.load(quantize_on_arrival(trained(1), session.tensors))
    now = checkpoint_state_dict(model)
    assert all(torch.equal(now[name], value) for name, value in scales.items())


DOWN, UP, QUERY = (
    f"model.layers.0.{leaf}.weight" for leaf in ("mlp.experts.1.down_proj", "mlp.experts.1.up_proj", "self_attn.q_proj")
)
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], type[AliasError], str]] = {
    "no up": (
        lambda t: {n: v for n, v in t.items() if n != UP},
        ReloadError,
        r"experts\.1\.gate_proj.*without all(.|\n)*up_proj",
    ),
    "q alone": (lambda t: {QUERY: t[QUERY]}, ReloadError, r"q_proj.*without all(.|\n)*k_proj"),
    "half": (lambda t: [(DOWN, t[DOWN][:8], ((0, 8), (0, t[DOWN].shape[1])))], ReloadError, r"a part of .*down_proj"),
    "NaN": (lambda t: t | {DOWN: t[DOWN].clone().fill_(float("nan"))}, ScaleError, r"down_proj.*not finite"),
    "inf": (lambda t: t | {UP: t[UP].clone().fill_(float("inf"))}, ScaleError, r"up_proj.*not finite"),
    "shape": (lambda t: t | {DOWN: t[DOWN][:, 1:]}, ReloadError, r"down_proj.*does not fit"),
    "another dtype": (
        lambda t: [(DOWN, t[DOWN][:8], ((0, 8), (0, 128))), (DOWN, t[DOWN][8:].float(), ((8, t[DOWN].shape[0]), (0, 128)))],
        ReloadError,
        r"down_proj.*does not fit(.|\n)*bfloat16.*\n.*float32",
    ),
    "twice": (lambda t: [*t.items(), (DOWN, t[DOWN])], ReloadError, r"down_proj.*arrived twice"),
    "twice, waiting": (lambda t: [(UP, t[UP]), (UP, t[UP])], ReloadError, r"up_proj.*arrived twice"),
    "no tensor": (lambda t: t | {DOWN: 5}, ReloadError, r"down_proj(.|\n)*dense tensor(.|\n)*int"),
    "sparse": (lambda t: t | {DOWN: t[DOWN].to_sparse()}, ReloadError, r"down_proj(.|\n)*sparse"),
    "no values": (lambda t: t | {DOWN: t[DOWN].to("meta")}, ReloadError, r"down_proj(.|\n)*on meta"),
    "unknown": (lambda t: t | {"model.other.weight": t[DOWN]}, ReloadError, r"model\.other\.weight"),
}


@pytest.mark.parametrize("kind", BAD)
def test_law_10_weights_that_do_not_fit_leave_the_old(folders: Folders, kind: str) -> None:
    change, error, message = BAD[kind]
    model = model_of(folders(by_modelopt, 0))
    with unchanged(model), pytest.raises(error, match=message):  # noqa: SIM117
        with reload(model, scope="partial", policy="journal") as session:
            session.load(quantize_on_arrival(change(trained(1)), session.tensors))


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(ReloadError, match="unknown recipe"):
        next(quantize_on_arrival({}, {}, "mse"))  # type: ignore[arg-type]


def test_zeros_and_quantized_tensors_arrive_too(folders: Folders) -> None:
    model = model_of(folders(by_modelopt, 0))
    stored = {n: t.clone() for n, t in checkpoint_names(model).items() if ".layers.1." in n}
    zeros = {name: torch.zeros_like(value) for name, value in trained(0).items() if ".layers.0." in name and "proj" in name}
    with reload(model, scope="partial", policy="journal") as session:
        session.load(quantize_on_arrival(stored | zeros, session.tensors))
    now = checkpoint_state_dict(model)
    assert all(torch.equal(bits(now[name]), bits(value)) for name, value in stored.items())
    assert all(not now[name].any() for name in zeros)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_has_the_codec_s_bytes_on_any_device(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two partitions that arrive in one tensor, in several pieces."""
    monkeypatch.setattr("aliasparam_nvfp4.arrival._PIECE", 640)
    layer, weight = nn.Module(), torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.device(device):
        NvFp4LinearMethod("triton").create_weights(layer, 64, [24, 16], 64, 40, torch.bfloat16)
    stored = {name: t.to(device) for name, t in random_weights((24, 16), 64, 1, torch.device("cpu")).items()}
    with reload(layer) as session:
        session.load(stored)
    with reload(layer) as session:
        session.load(quantize_on_arrival({"weight": weight}, session.tensors))
    packed, blocks, scale = quantize(weight.to(device))
    expected = stored | {"weight": packed, "weight_scale": blocks, "weight_scale_2": scale.repeat(2)}
    assert all(torch.equal(bits(t).cpu(), bits(expected[n]).cpu()) for n, t in checkpoint_state_dict(layer).items())
