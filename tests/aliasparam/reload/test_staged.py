"""Values that wait on the host for the commit, in chunks: laws 1 and 4."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam.layout.boxes import Box, sizes, tiles, whole
from aliasparam.reload import staged
from aliasparam.reload.staged import StagedValues
from aliasparam.reload.targets import find_targets
from aliasparam.testing import same_bytes

_CHUNK = 1 << 12
_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128)
_shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_shapes, st.sampled_from(_DTYPES), st.booleans()), min_size=1, max_size=6), st.integers(0, 9))
def test_law_1_what_comes_out_is_what_went_in(
    device: torch.device, tensors: list[tuple[tuple[int, ...], torch.dtype, bool]], first: int
) -> None:
    model = nn.Module()
    for number, (shape, dtype, _) in enumerate(tensors):
        model.register_buffer(f"b{number}", torch.zeros(shape, dtype=dtype, device=device))
    random, values, want = torch.Generator().manual_seed(first), StagedValues(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK", _CHUNK)
        for target, (shape, dtype, turned) in zip(find_targets(model).values(), tensors, strict=True):
            value = torch.randint(0, 100, shape, generator=random).to(dtype)
            value = value.mT.contiguous().mT if turned and len(shape) > 1 else value
            box = tuple((min(first, n), n) for n in shape)
            part = value[tuple(slice(a, b) for a, b in box)]
            values.add(target, box, part)
            want.append((target, box, part.clone()))
            value.zero_()  # nothing of it is kept
        for _ in range(2):  # a commit that failed is made again
            out = {target.label: torch.zeros_like(target.tensor) for target, _, _ in want}
            for target, box, value in values:
                assert value.shape == sizes(box) and value.device == target.tensor.device and value.nbytes <= _CHUNK
                out[target.label][tuple(slice(a, b) for a, b in box)].copy_(value)
            for target, box, part in want:
                found = out[target.label][tuple(slice(a, b) for a, b in box)].cpu()
                assert same_bytes(found, part), (target.label, box)


def test_law_4_many_small_values_take_few_chunks(device: torch.device) -> None:
    model = nn.Module()
    for number in range(300):
        model.register_buffer(f"b{number}", torch.zeros(1024, device=device))
    values = StagedValues()
    for target in find_targets(model).values():
        values.add(target, ((0, 1024),), torch.zeros(1024))
    assert len({id(chunk) for chunk, _ in values._values}) <= 10 and values.nbytes <= 2 * 300 * 4096


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3 * _CHUNK)), st.sampled_from(_DTYPES))
def test_law_4_values_that_are_alike_leave_at_most_a_third_of_their_chunks_empty(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Also of rows that are a little more than half of a chunk."""
    model, values = nn.Module(), StagedValues()
    for number in range(12):
        model.register_buffer(f"b{number}", torch.zeros(shape, dtype=dtype, device=device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK", _CHUNK)
        for target in find_targets(model).values():
            values.add(target, whole(shape), torch.zeros(shape, dtype=dtype))
    of_values = sum(-(-sizes_bytes(box, dtype) // 256) * 256 for _, box, _ in values)
    assert values.nbytes <= of_values * 3 / 2 + _CHUNK


def test_law_10_a_value_that_cannot_be_staged_whole_is_not_staged_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = nn.Module(), StagedValues()
    model.register_buffer("b", torch.zeros(8, _CHUNK))
    [target] = find_targets(model).values()
    monkeypatch.setattr(staged, "CHUNK", _CHUNK)
    place, calls = staged._Value.within, itertools.count()

    def failing(value: staged._Value, chunk: Tensor) -> Tensor:
        if next(calls) == 5:
            raise MemoryError
        return place(value, chunk)

    monkeypatch.setattr(staged._Value, "within", failing)
    with pytest.raises(MemoryError):
        values.add(target, whole((8, _CHUNK)), torch.ones(8, _CHUNK))
    assert list(values) == []
    values.add(target, whole((8, _CHUNK)), torch.full((8, _CHUNK), 2.0))
    assert all((value == 2).all() for _, _, value in values) and sum(value.numel() for _, _, value in values) == 8 * _CHUNK


@given(st.integers(1, 40_000), st.integers(1, 20_000), st.sampled_from([1, 2, 4]))
def test_law_4_pieces_of_a_value_are_whole_tiles_of_any_layout(rows: int, columns: int, itemsize: int) -> None:
    """So that few kernels are compiled: all pieces of tensors that are alike but the last are alike, and cut no digit of rows."""
    pieces = list(tiles(whole((rows, columns)), staged._elements((rows, columns), itemsize)))
    first = sizes(pieces[0])
    assert all(sizes(piece) == first or piece[0][1] == rows or piece[1][1] == columns for piece in pieces)
    assert first[0] == rows or first[0] < 128 or first[0] % 128 == 0
    assert math.prod(first) * itemsize <= staged.CHUNK


def sizes_bytes(box: Box, dtype: torch.dtype) -> int:
    return math.prod(sizes(box)) * dtype.itemsize
