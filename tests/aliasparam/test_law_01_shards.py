"""Law 1 for shards: a value of any form lands in a view of any kind as torch would have it, and exactly that has arrived."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from aliasparam import Alias, checkpoint_state_dict, declare, process
from aliasparam.errors import AliasError, DeclarationError, LayoutError, StateError
from aliasparam.layout import IndexLayout, Layout, execute
from aliasparam.storage.shards import planned
from aliasparam.testing import same_bytes

from .small import INTERLEAVE, PAD8, SWAP, counting, kernel, layer_of, storage_of

LINES = ["r k -> k r", SWAP, INTERLEAVE, PAD8, f"{SWAP} | {PAD8}"]
SHAPES = [(4, 6), (3, 4, 6), (2, 3, 2, 8)]
FORMS = ["plain", "at an odd address", "transposed", "of one row", "negative", "conjugate", "without bytes"]
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex64]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype) * 1j if dtype.is_complex else drawn.to(dtype)


def has_negative(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.itemsize > 1


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """A function that takes a view: indices and ranges of leading dims, then perhaps an exchange of two dims or a step."""
    indices: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size - 1))
        indices.append(draw(st.sampled_from([start, slice(start, draw(st.integers(start, size)))])))
    further = draw(st.sampled_from(["as it is", "transposed", "every second", "flat", "negated"]))

    def view(tensor: Any) -> Any:
        for dim, index in reversed(list(enumerate(indices))):
            part = slice(index, index + 1) if isinstance(index, int) else index
            tensor = tensor.narrow(dim, part.start, part.stop - part.start)
            tensor = tensor.select(dim, 0) if isinstance(index, int) else tensor
        if further == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, -1)
        if further == "every second" and tensor.dim():
            return tensor[::2]
        if further == "flat" and torch.empty_strided(tensor.shape, tensor.stride(), device="meta").is_contiguous():
            return tensor.view(-1)
        return torch._neg_view(tensor) if further == "negated" and has_negative(tensor) else tensor

    return view


def of_form(value: Tensor, form: str) -> Tensor:
    """The same numbers with other strides, at another address, or with a bit that changes what its bytes mean."""
    if form == "at an odd address":
        room = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
        return room.copy_(value)
    if form == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if form == "of one row" and value.dim() > 1:
        return value[:1]
    if form == "without bytes":  # zeros that autograd makes
        return torch._efficientzerotensor(value.shape, dtype=value.dtype)
    if form == "negative" and has_negative(value):
        return torch._neg_view(-value)
    return value.conj() if form == "conjugate" else value


@given(st.data())
def test_law_1_a_shard_lands_as_torch_would_have_it(data: st.DataObject) -> None:
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    line = data.draw(st.sampled_from(LINES))
    plain = numbers(shape, dtype, 0)
    layer = layer_of(plain, line, loaded=data.draw(st.booleans()))
    arrived = torch.zeros(shape, dtype=torch.bool)
    if not storage_of(layer).states.missing:
        arrived.fill_(True)
    for seed in range(1, 4):
        view = data.draw(views(shape))
        target = view(plain)
        form = data.draw(st.sampled_from(FORMS))
        if not target.numel():
            continue
        value = of_form(numbers(tuple(target.shape), dtype, seed), form)

        target.copy_(value)
        view(arrived).fill_(True)
        view(layer.weight).copy_(value)

    for at in arrived.nonzero().tolist():
        assert same_bytes(layer.weight[tuple(at)].clone(), plain[tuple(at)].clone())
    states = storage_of(layer).states
    missing = [box for region in states.missing for box in states.missing_boxes(region)]
    assert sum(math.prod(stop - start for start, stop in box) for box in missing) == int((~arrived).sum())
    if arrived.all():
        process(layer)
        assert same_bytes(layer.prepared, kernel(line, plain))


@pytest.mark.parametrize("layout", [INTERLEAVE, IndexLayout(torch.arange(32).flip(0).view(4, 8))])
@pytest.mark.parametrize("form, dtype", [("negative", torch.bfloat16), ("conjugate", torch.complex64)])
def test_law_1_bits_of_a_value_that_is_moved_as_integers(layout: Any, form: str, dtype: torch.dtype) -> None:
    plain, value = torch.zeros(4, 8, dtype=dtype), torch.arange(32).view(4, 8).to(dtype)
    value = value * 1j if dtype.is_complex else value
    layer = layer_of(plain, layout)

    layer.weight.copy_(of_form(value, form))

    assert same_bytes(layer.weight.clone(), plain.copy_(of_form(value, form)))


def test_law_1_a_negative_value_lands_in_a_view_of_another_dtype() -> None:
    layer, plain = layer_of(torch.zeros(4, 8, dtype=torch.bfloat16)), torch.zeros(4, 8, dtype=torch.bfloat16)

    for target in (plain, layer.weight):
        target.view(torch.int16)[1:].copy_(torch._neg_view(torch.arange(24, dtype=torch.int16).view(3, 8)))

    assert same_bytes(layer.weight.clone(), plain)


class Subclass(Tensor):
    """As of other libraries: torch makes what an operator returns one of these too."""


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.copy_(5),
        lambda w: w.copy_(torch.full((6, 8), 5, dtype=torch.uint8).as_subclass(Subclass)),
        lambda w: w.copy_(torch.full((6, 8), 5).as_subclass(Subclass)),
        lambda w: w[2:].add_(torch.full((4, 8), 5, dtype=torch.uint8).as_subclass(Subclass)),
    ],
    ids=["a number", "a subclass", "a subclass of another dtype", "a subclass added"],
)
def test_law_1_what_torch_takes_for_a_value_lands(write: Callable[[Any], Any]) -> None:
    layer, plain = layer_of(counting(6, 8)), counting(6, 8)

    write(plain)
    write(layer.weight)

    assert torch.equal(layer.weight, plain)


@pytest.mark.parametrize("write", [lambda w, v: w.copy_(v), lambda w, v: w.fill_(1), lambda w, v: w.copy_(v.float())])
def test_law_8_a_write_among_stand_ins_is_none(write: Callable[[Any, Tensor], Any]) -> None:
    layer = layer_of(torch.zeros(2, 4, 8, dtype=torch.uint8))
    first, second, value = layer.weight[:1], layer.weight[1], torch.ones(4, 8, dtype=torch.uint8)

    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(StateError, match="lands nowhere"):
        write(first, value)
    assert not layer.weight.any()
    second.copy_(value)

    assert torch.equal(layer.weight[1], value)


AMONG_STAND_INS: dict[str, Callable[[Any], Any]] = {
    "clone": lambda layer: layer.weight.clone(),
    "arithmetic": lambda layer: layer.weight + 1,
    "a conversion": lambda layer: layer.weight.float(),
    "a copy into another": lambda layer: torch.empty(4, 8, dtype=torch.uint8).copy_(layer.weight),
    "slice": lambda layer: layer.weight[:2],
    "narrow": lambda layer: layer.weight.narrow(0, 0, 2),
    "view": lambda layer: layer.weight.view(-1),
    "detach": lambda layer: layer.weight.detach(),
    "item": lambda layer: layer.weight[0, 0].item(),
    "numpy": lambda layer: layer.weight.numpy(),
    "tolist": lambda layer: layer.weight.tolist(),
    "state dict": checkpoint_state_dict,
    "deepcopy": copy.deepcopy,
    "declare": lambda layer: layer_of(torch.zeros(4, 8, dtype=torch.uint8)),
}
READS = ("clone", "arithmetic", "a conversion", "a copy into another")


@pytest.mark.parametrize("takes_real", [False, True])
@pytest.mark.parametrize("what", AMONG_STAND_INS)
def test_law_8_a_name_among_stand_ins_is_a_stand_in_or_refused_by_name(what: str, takes_real: bool) -> None:
    layer = layer_of(numbers((4, 8), torch.uint8, 0), INTERLEAVE)
    process(layer)
    before = layer.weight.clone()

    with FakeTensorMode(allow_non_fake_inputs=takes_real):
        if takes_real and what in READS:
            found = AMONG_STAND_INS[what](layer)
            assert isinstance(found, FakeTensor) and found.shape == layer.weight.shape
        else:
            with pytest.raises(AliasError, match="FakeTensorMode"):
                AMONG_STAND_INS[what](layer)

    assert torch.equal(layer.weight, before)


def test_law_8_a_stand_in_for_a_tensor_is_not_declared() -> None:
    layer = nn.Module()
    with FakeTensorMode():
        layer.weight = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
    with pytest.raises(DeclarationError, match="FakeTensor"):
        declare(layer, Alias("weight", "prepared", SWAP))


def test_law_1_a_write_lands_after_wide_elements_were_first_moved_among_stand_ins() -> None:
    layer, value = layer_of(torch.zeros(2, 4, 8, dtype=torch.uint8), INTERLEAVE), torch.ones(2, 4, 8, dtype=torch.uint8)
    weight = layer.weight
    execute._empty.cache_clear()

    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(RuntimeError, StateError):
        weight.copy_(value)
    weight.copy_(value)

    assert torch.equal(weight, value)


def test_law_1_a_view_behind_the_tensor_is_no_shard_of_it() -> None:
    layer = layer_of(numbers((2, 3, 5), torch.uint8, 0), PAD8)
    before = layer.weight.clone()

    with pytest.raises(LayoutError, match="does not fit a layout"):
        layer.weight.as_strided((3, 5), (5, 1), 60).copy_(torch.ones(3, 5, dtype=torch.uint8))

    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("region", [1, None])
def test_a_shard_write_is_twenty_calls(region: int | None) -> None:
    """What every loader pays for every shard, or a whole: the steps in CONTRIBUTING.md, and none that was planned before."""
    layer, value = layer_of(torch.zeros(3, 4, 8, dtype=torch.uint8)), torch.ones(4, 8, dtype=torch.uint8)
    (layer.weight.data if region is None else layer.weight.data[0]).copy_(value)
    weight, calls = layer.weight, []

    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        (weight.data if region is None else weight.data[region]).copy_(value)
    finally:
        sys.setprofile(None)

    assert len(calls) <= 20, calls


@pytest.mark.parametrize("columns", [1, 8, 16])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_shard_in_one_run_is_copied_as_it_is(columns: int, by_kernel: bool) -> None:
    """In elements of their own, on a GPU too: a view of another width takes three calls."""
    bound = Layout(SWAP).bind((3, 4, columns), torch.float8_e4m3fn)
    rows, strides = (2, columns), (columns, 1)

    planned_shard = planned(bound, (0, rows, strides, rows, strides, 16, by_kernel))

    assert planned_shard is not None
    (move,) = planned_shard[1]
    assert move.as_it_is and move.by_kernel is None and move.copy.dtype is torch.float8_e4m3fn
