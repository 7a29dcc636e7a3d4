"""What each of the three engines does to a layer while loading and reloading, step by step, on a declared layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, accept_kernel_bytes, declare, invalidate, process
from aliasparam.errors import AliasError, StaleKernelError, StateError

from .small import SWAP_PAD16, kernel

TRANSFORM = SWAP_PAD16


def make(device: str = "cpu") -> Any:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(8, 6, dtype=torch.uint8, device=device), requires_grad=False)
    layer.scale = nn.Parameter(torch.empty(3, device=device), requires_grad=False)
    layer.weight.weight_loader = print
    declare(
        layer,
        Alias("weight", "prepared", TRANSFORM),
        Derivation("alpha", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32),
        loaded=False,
    )
    return layer


def checkpoint(add: int) -> dict[str, Tensor]:
    return {"weight": torch.arange(48, dtype=torch.uint8).view(8, 6) + add, "scale": torch.tensor([1.0, 2.0, 3.0]) + add}


def assert_serves(layer: Any, add: int) -> None:
    values = checkpoint(add)
    assert torch.equal(layer.prepared, kernel(TRANSFORM, values["weight"]))
    assert torch.equal(layer.alpha, values["scale"].max().reshape(1))
    with pytest.raises(NotImplementedError):  # nn.Module's own forward: the guard let it through
        layer()


def addresses(layer: nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())}


def test_transformers_builds_on_meta_replaces_every_parameter_and_processes_once() -> None:
    layer = make("meta")
    for name, value in checkpoint(0).items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=value.is_floating_point()))
    process(layer)
    before = addresses(layer)
    assert_serves(layer, 0)

    layer.load_state_dict(checkpoint(7))  # its only way to reload
    process(layer)

    assert_serves(layer, 7)
    assert addresses(layer) == before
    assert not any(p.requires_grad for p in layer.parameters())


def test_sglang_refills_in_place_and_processes_modules_that_got_nothing() -> None:
    layers = nn.ModuleList([make(), make()])
    for layer in layers:
        for name, value in checkpoint(0).items():
            layer.get_parameter(name).data.copy_(value)
    process(layers)
    before = addresses(layers)

    for add in (9, 4):
        for name, value in checkpoint(add).items():
            layers[0].get_parameter(name).data.copy_(value)
        process(layers)
        process(layers)
        assert_serves(layers[0], add)
        assert_serves(layers[1], 0)
    assert addresses(layers) == before


@pytest.mark.parametrize("whole", [True, False])
def test_vllm_puts_fresh_tensors_in_place_and_copies_the_results_into_the_old(whole: bool) -> None:
    layer = make()
    for name, value in checkpoint(0).items():
        layer.get_parameter(name).data.copy_(value)
    process(layer)
    before = addresses(layer)

    for add in (9, 4):
        kept = (dict(layer._parameters), dict(layer._buffers))
        for group in (layer._parameters, layer._buffers):  # everything to the meta device, as it was before loading
            for name, tensor in list(group.items()):
                empty = torch.empty_like(tensor, device="meta")
                group[name] = nn.Parameter(empty, requires_grad=False) if group is layer._parameters else empty
        values = checkpoint(add)
        if whole:  # materialized, loaded, processed
            for name, value in values.items():
                layer._parameters[name] = nn.Parameter(torch.empty_like(value), requires_grad=False)
                layer._parameters[name].data.copy_(value)
            for name, buffer in list(layer._buffers.items()):
                layer._buffers[name] = torch.empty_like(buffer, device="cpu")
            process(layer)
        current = (dict(layer._parameters), dict(layer._buffers))
        for old, new, group in zip(kept, current, (layer._parameters, layer._buffers), strict=True):
            for name, tensor in old.items():
                if whole:
                    tensor.data.copy_(new[name])
                group[name] = tensor
        assert_serves(layer, add if whole else 0)
        assert process(layer) == 0
        assert addresses(layer) == before
    assert layer.weight.weight_loader is print


def recorded(tensor: Tensor) -> Tensor:
    """``to_meta_tensor`` (vllm/model_executor/model_loader/reload/meta.py, 0.32.0)."""
    meta = tensor.data.to("meta")
    meta.__class__ = tensor.__class__
    meta.__dict__ = tensor.__dict__.copy()
    return meta


def materialized(meta: Tensor) -> Tensor:
    """``materialize_meta_tensor`` of the same file."""
    made = torch.empty_strided(size=tuple(meta.size()), stride=tuple(meta.stride()), dtype=meta.dtype)
    made.__class__ = meta.__class__
    made.__dict__ = meta.__dict__.copy()
    return made


@pytest.mark.parametrize("loaded", [False, True])
def test_vllm_records_names_on_meta_with_their_class_and_attributes(loaded: bool) -> None:
    """Before anything is loaded and while kernel names refuse, or of a layer that serves. What it then makes of the record stands
    for the same memory: loaders fill it, nothing moves, and until it is processed it refuses."""
    layer = make()
    if loaded:
        load(layer, 0)
        process(layer)
    record = {name: recorded(tensor) for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]}
    assert all(meta.is_meta for meta in record.values())
    assert {n: (m.shape, m.dtype) for n, m in record.items()} == {
        "weight": ((8, 6), torch.uint8), "scale": ((3,), torch.float32),
        "prepared": ((16, 8), torch.uint8), "alpha": ((1,), torch.float32),
    }  # fmt: skip
    load(layer, 0)
    process(layer)
    before, kept = addresses(layer), (dict(layer._parameters), dict(layer._buffers))

    for name, meta in record.items():
        delattr(layer, name)
        if name in kept[0]:
            layer.register_parameter(name, meta)
        else:
            layer.register_buffer(name, meta, persistent=False)
    with pytest.raises(StaleKernelError):
        layer()
    for name, meta in record.items():
        setattr(layer, name, materialized(meta))
    load(layer, 9)
    with pytest.raises(StaleKernelError):
        layer()
    process(layer)
    assert_serves(layer, 9)
    for group, old in zip((layer._parameters, layer._buffers), kept, strict=True):
        for name, tensor in old.items():
            tensor.data.copy_(group[name])
            group[name] = tensor
    process(layer)
    assert_serves(layer, 9)
    assert addresses(layer) == before


def load(layer: Any, add: int) -> None:
    for name, value in checkpoint(add).items():
        layer.get_parameter(name).data.copy_(value)


def test_an_engine_that_puts_a_copy_of_its_own_in_the_place_of_torchs_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's sparse updates mark what is unchanged by NaN (``_load_nan_masked_weights``, checkpoint_weight_patch.py, 0.32.0):
    names in kernel order and views of them keep those values."""
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.arange(48.0).view(8, 6), requires_grad=False)
    declare(layer, Alias("scale", "prepared", TRANSFORM))
    process(layer)
    seen: list[int] = []

    def copy_non_nan_(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        seen.append(source.numel())
        return torch.where(torch.isnan(source), destination, source, out=destination)

    patch = torch.full((8, 6), torch.nan)
    patch[1, 2], patch[6, 5] = 100.0, 101.0
    with monkeypatch.context() as engine:
        engine.setattr(torch.Tensor, "copy_", copy_non_nan_)
        layer.scale.data.narrow(0, 0, 4).copy_(patch[:4])
        layer.scale[4:].copy_(patch[4:])
    process(layer)

    expected = torch.where(patch.isnan(), torch.arange(48.0).view(8, 6), patch)
    assert torch.equal(layer.scale, expected) and torch.equal(layer.prepared, kernel(TRANSFORM, expected))
    assert seen[0] == 24 and seen.count(24) >= 2  # asked with the whole view, before any copy of the library's own


def test_kernel_bytes_that_an_engine_saved_and_brought_back_itself() -> None:
    """Sleep and wake past this library: until it is said that whole weights are back, nothing serves."""
    layer = make()
    load(layer, 3)
    process(layer)
    memory = {name: buffer.data for name, buffer in layer.named_buffers()}
    saved = {name: held.clone() for name, held in memory.items()}

    for held in memory.values():
        held.fill_(77)
    invalidate(layer)
    for use in (layer, lambda: process(layer), lambda: layer.weight.sum()):
        with pytest.raises(AliasError):
            use()
    for name, held in memory.items():
        held.copy_(saved[name])
    with pytest.raises(AliasError):
        process(layer)
    accept_kernel_bytes(layer)
    process(layer)
    assert_serves(layer, 3)
    assert torch.equal(layer.weight, checkpoint(3)["weight"])


def test_kernel_bytes_that_a_peer_wrote_under_their_own_name() -> None:
    """As ``copy_`` over all buffers: seen, refused, and taken when the engine says so."""
    layer, peer = make(), make()
    for module, add in ((layer, 3), (peer, 9)):
        load(module, add)
        process(module)

    layer.prepared.copy_(peer.prepared)
    with pytest.raises(StateError, match="written by other code"):
        process(layer)
    accept_kernel_bytes(layer)
    layer.scale.copy_(peer.scale)
    process(layer)
    assert_serves(layer, 9)
    assert torch.equal(layer.weight, checkpoint(9)["weight"])
