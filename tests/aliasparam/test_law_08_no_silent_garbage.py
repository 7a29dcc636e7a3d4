"""Law 8: a stale or foreign kernel name is refused wherever somebody can look, not only at the declaring module's forward."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from aliasparam import Derivation, declare, invalidate, process
from aliasparam.errors import AdoptionError, StaleKernelError, StateError

from .small import PAD8, SWAP, Layer, counting, is_ready, kernel, storage_of, the_registry

# -- what a stale name still is ----------------------------------------------------------------------------------------


def test_law_3_a_stale_name_keeps_its_address_shape_and_place() -> None:
    layer = Layer(scale=True)
    process(layer)
    before = {n: (t.data_ptr(), t.shape, t.dtype, t.stride()) for n, t in layer.named_buffers()}
    ready = layer.prepared
    assert type(ready) is Tensor

    layer.weight[0] = 1

    assert {n: (t.data_ptr(), t.shape, t.dtype, t.stride()) for n, t in layer.named_buffers()} == before
    assert list(layer.state_dict()) == ["weight", "scale"]
    assert "open" in repr(layer.prepared)
    process(layer)
    assert layer.prepared is ready


@pytest.mark.parametrize(
    "use",
    [
        lambda k: k + 1,
        lambda k: k.fill_(3),
        lambda k: k.data.fill_(3),
        lambda k: k.detach().fill_(3),
        lambda k: k[0],
        lambda k: k.tolist(),
        lambda k: k.numpy(),
        lambda k: torch.empty_like(k).copy_(k),
        lambda k: torch.utils.dlpack.from_dlpack(k),
        lambda k: torch.cat([k, k]),
        lambda k: k.share_memory_(),
    ],
)
def test_law_8_every_use_of_a_stale_name_is_refused(use: Callable[[Tensor], Any]) -> None:
    layer = Layer()
    process(layer)
    layer.weight[0] = 1

    with pytest.raises((StaleKernelError, BufferError)):
        use(layer.prepared)


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
@pytest.mark.parametrize("stale", [False, True])
def test_law_1_a_copied_module_is_stale_where_the_original_was(by: str, stale: bool) -> None:
    layer = Layer(scale=True)
    process(layer)
    if stale:
        layer.weight[0] = 9
    expected = kernel(SWAP, layer.weight.clone())

    if by == "deepcopy":
        copied = copy.deepcopy(layer)
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)

    assert is_ready(copied) is not stale
    if stale:
        with pytest.raises(StaleKernelError):
            _ = copied.prepared + 1
        process(copied)
    assert torch.equal(copied.prepared, expected)
    assert copied.prepared.data_ptr() == copied.weight.data_ptr() != layer.weight.data_ptr()


def test_a_stale_module_can_be_moved() -> None:
    layer = Layer(scale=True)
    assert not is_ready(layer)

    layer.to("cpu").cpu().to(dtype=None)
    process(layer)

    assert torch.equal(layer.prepared, kernel(SWAP, layer.weight.clone()))


# -- writers of kernel names -------------------------------------------------------------------------------------------


def average(k: Tensor, other: Tensor) -> None:
    k.detach().copy_(other)


WRITERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda k, other: k.copy_(other),
    "a slice": lambda k, other: k[0].copy_(other[0]),
    "detach, as DistributedDataParallel and AveragedModel": average,
    "a view of another dtype": lambda k, other: k.view(torch.int8).copy_(other.view(torch.int8)),
    "foreach": lambda k, other: torch._foreach_copy_([k], [other]),
    "out=": lambda k, other: torch.add(other, 1, out=k),
    "inference mode": lambda k, other: torch.inference_mode()(k.copy_)(other),
}


@pytest.mark.parametrize("verb", [process, lambda layer: layer.weight + 0, lambda layer: layer.weight.add_(1)])
@pytest.mark.parametrize("writer", WRITERS)
def test_law_8_a_write_to_a_kernel_name_is_refused_at_the_next_verb_or_read(writer: str, verb: Callable[[Any], Any]) -> None:
    layer = Layer()
    process(layer)
    WRITERS[writer](layer.prepared, torch.full((6, 8), 5, dtype=torch.uint8))

    with pytest.raises(StateError, match="kernel name 'prepared' was written by other code"):
        verb(layer)
    with pytest.raises(StaleKernelError):
        layer()

    layer.weight.copy_(torch.full((6, 8), 3, dtype=torch.uint8))
    process(layer)
    assert layer().unique().tolist() == [3]


def test_law_8_a_write_through_a_name_fetched_before_it_became_stale_is_refused() -> None:
    layer = Layer()
    process(layer)
    fetched = layer.prepared.detach()
    layer.weight[0] = 1
    fetched.fill_(9)

    with pytest.raises(StateError, match="was written by other code"):
        process(layer)


def test_law_8_copying_all_parameters_and_then_all_buffers_is_refused() -> None:
    a, b = Layer(), Layer()
    b.weight[0] = 200
    process(a)
    process(b)

    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.data.copy_(q.data)
    with pytest.raises(StaleKernelError):
        for p, q in zip(a.buffers(), b.buffers(), strict=True):
            p.data.copy_(q.data)
    process(a)

    assert torch.equal(a(), b())


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_law_8_a_copy_does_not_forget_that_a_kernel_name_was_written(by: str) -> None:
    layer = Layer(scale=True)
    process(layer)
    layer.prepared.fill_(9)
    layer.alpha.fill_(9)

    if by == "deepcopy":
        copied = copy.deepcopy(layer)
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)

    with pytest.raises(StateError, match="was written by other code"):
        process(copied)
    copied.weight.fill_(1)
    process(copied)
    assert copied.alpha.item() == 3


def test_law_1_a_derivation_that_other_code_wrote_is_computed_again() -> None:
    layer = Layer(scale=True)
    process(layer)
    layer.alpha.fill_(100.0)

    assert "alpha" in the_registry(layer).stale_names()
    assert process(layer) == 1
    assert layer.alpha.item() == 3
    layer.alpha.fill_(100.0)
    layer.weight[0] = 1  # opens the module, which writes nothing into alpha
    process(layer)
    assert layer.alpha.item() == 3


def test_law_2_our_own_writers_do_not_count_as_others() -> None:
    layer = Layer((4, 6, 8), scale=True)
    with torch.inference_mode():
        process(layer)
        layer.weight[0] = 9
        layer.scale.fill_(2)
        process(layer)
    the_registry(layer).retarget({"weight": f"{SWAP} | {SWAP}"})
    process(layer)
    process(copy.deepcopy(layer))

    assert process(layer) == 0
    assert storage_of(layer).state is not None


# -- casts and replacements --------------------------------------------------------------------------------------------


def test_law_8_a_cast_of_kernel_names_is_refused() -> None:
    layer = Layer()
    declare(layer, Derivation("alpha2", ("weight",), lambda w: w.max().float().reshape(1), (1,), torch.float32))
    process(layer)
    address = layer.get_buffer("alpha2").data_ptr()

    with pytest.raises(AdoptionError, match="alpha2"):
        layer.half()

    assert layer.get_buffer("alpha2").dtype is torch.float32
    assert layer.get_buffer("alpha2").data_ptr() == address
    layer()


@pytest.mark.parametrize(
    "put",
    [
        lambda layer, other: setattr(layer, "weight", other),
        lambda layer, other: layer._parameters.update(weight=other),
        lambda layer, other: dict.__setitem__(layer._parameters, "weight", other),
        lambda layer, other: layer.__delattr__("weight"),
        lambda layer, other: torch.func.functional_call(layer, {"weight": other}),
        lambda layer, other: setattr(layer, "_parameters", {**layer._parameters, "weight": other}),
        lambda layer, other: layer.__dict__.update(weight=other),
        lambda layer, other: setattr(layer, "prepared", other.data),
        lambda layer, other: setattr(layer, "_buffers", {**layer._buffers, "prepared": other.data}),
        lambda layer, other: layer.__dict__.update(prepared=other.data),
    ],
    ids=[
        *("setattr", "update", "dict", "del", "functional_call", "another dict", "an attribute that hides it"),
        *("kernel name", "kernel name in another dict", "an attribute that hides a kernel name"),
    ],
)
def test_law_8_a_served_module_refuses_from_the_moment_on_that_a_name_is_replaced(put: Callable[[Any, Any], Any]) -> None:
    layer = Layer()
    process(layer)
    served = layer()

    with pytest.raises(StaleKernelError):
        put(layer, nn.Parameter(torch.full((6, 8), 5, dtype=torch.uint8), requires_grad=False))
        layer()

    process(layer)
    assert torch.equal(layer(), layer.prepared)
    assert torch.equal(layer.weight, counting(6, 8)) == torch.equal(layer(), served)


def test_law_8_a_kernel_name_that_was_replaced_is_refused_until_processed() -> None:
    layer = Layer()
    process(layer)
    ours = layer.prepared

    layer.prepared = torch.full((6, 8), 5, dtype=torch.uint8)
    with pytest.raises(StaleKernelError):
        layer()
    process(layer)

    assert layer.prepared is ours
    assert torch.equal(layer(), kernel(SWAP, layer.weight.clone()))


# -- raw exits ---------------------------------------------------------------------------------------------------------


def test_law_8_tvm_ffi_does_not_take_a_checkpoint_name_by_its_pointer() -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi")
    layer = Layer()
    process(layer)
    echo = tvm_ffi.get_global_func("testing.echo")

    for name in (layer.weight, layer.weight.data):
        with pytest.raises(Exception, match="DLPack"):
            echo(name)
    assert torch.equal(torch.from_dlpack(echo(layer.prepared)), layer.prepared)
    layer.weight[0] = 1
    with pytest.raises(Exception, match="open"):
        echo(layer.prepared)


DIRT: dict[str, Callable[[Any], Any]] = {
    "written past the library": lambda layer: layer.prepared.fill_(255),
    "lent": lambda layer: (invalidate(layer), storage_of(layer).buffer.fill_(255)),
}
LOADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "whole": lambda weight, values: weight.copy_(values),
    "shards": lambda weight, values: [weight.narrow(1, at, 3).copy_(values.narrow(1, at, 3)) for at in (0, 3)],
    "another dtype": lambda weight, values: weight.copy_(values.long()),
    "several at once": lambda weight, values: torch._foreach_copy_([*weight], [*values]),
    "steps": lambda weight, values: [weight[..., at::2].copy_(values[..., at::2]) for at in (0, 1)],
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dirt", DIRT)
def test_law_9_padding_that_other_code_wrote_is_zero_once_weights_are_loaded_again(dirt: str, load: str) -> None:
    layer, values = Layer((2, 6, 12), PAD8), counting(2, 6, 12)
    process(layer)
    DIRT[dirt](layer)
    with pytest.raises(StateError):
        layer.weight.clone()

    LOADS[load](layer.weight, values)
    process(layer)

    assert torch.equal(layer.weight, values) and torch.equal(layer.prepared, kernel(PAD8, values))
