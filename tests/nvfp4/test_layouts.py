"""Layouts against their index formulas and FlashInfer's own functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam import TensorSpec, check_inverse
from aliasparam_nvfp4.layouts import (
    PackFragments,
    ShuffleRows,
    Swizzle8x4,
    Swizzle128x4,
    mma_view,
    up_gate_blocks,
    up_gate_shuffled,
)

from .backend_cases import flashinfer

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 40))
RAGGED = [(960, 36), (576, 36), (3072, 36), (576, 96), (128, 4), (1, 1), (129, 5), (7168, 32)]


def by_formula(scales: torch.Tensor) -> bytes:
    """Every byte put where the kernel looks for it; loops on purpose."""
    rows, cols = scales.shape
    padded_rows, padded = -(-rows // 128) * 128, -(-cols // 4) * 4
    out = bytearray(padded_rows * padded)
    for r in range(rows):
        for c in range(cols):
            place = (r // 128) * 128 * padded + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            out[place] = int(scales[r, c])
    return bytes(out)


@given(SHAPES, st.integers(0, 1 << 16))
def test_every_byte_is_where_the_index_formula_says(shape: tuple[int, int], seed: int) -> None:
    scales = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    assert Swizzle128x4().forward(scales).numpy().tobytes() == by_formula(scales)


@pytest.mark.parametrize("shape", RAGGED)
def test_flashinfers_own_unswizzle_reads_our_bytes(shape: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flashinfer = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4", exc_type=ImportError)
    scales = torch.randint(0, 256, shape, dtype=torch.uint8)

    swizzled = Swizzle128x4().forward(scales)

    assert torch.equal(flashinfer._unswizzle_sf_128x4(swizzled.flatten(), *shape).view(torch.uint8).view(shape), scales)


@given(SHAPES)
def test_padding_is_zero_bytes(shape: tuple[int, int]) -> None:
    ones = torch.full(shape, 255, dtype=torch.uint8)

    swizzled = Swizzle128x4().forward(ones)

    assert int((swizzled == 255).sum()) == ones.numel()
    assert int((swizzled == 0).sum()) == swizzled.numel() - ones.numel()


def test_a_stack_is_its_experts() -> None:
    stack = torch.randint(0, 256, (3, 130, 6), dtype=torch.uint8).view(torch.float8_e4m3fn)

    whole = Swizzle128x4().forward(stack)

    assert all(torch.equal(whole[e].view(torch.uint8), Swizzle128x4().forward(stack[e]).view(torch.uint8)) for e in range(3))
    back = Swizzle128x4().inverse(whole, TensorSpec.of(stack))
    assert torch.equal(back.view(torch.uint8), stack.view(torch.uint8))


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_gate_up_orders_are_flashinfers(rows: int) -> None:
    core = flashinfer("flashinfer.fused_moe.core")
    prepare = flashinfer("flashinfer.fused_moe.prepare")
    gate_up = torch.randint(0, 256, (rows, 8), dtype=torch.uint8)
    up_gate = gate_up.roll(rows // 2, 0)

    indices = core._maybe_get_cached_w3_w1_permute_indices({}, up_gate, 128)
    assert torch.equal(up_gate_shuffled().forward(gate_up), up_gate[indices])
    assert torch.equal(up_gate_blocks(64).forward(gate_up), prepare._interleave_linear_and_gate(up_gate[None], 64, 1)[0])
    assert torch.equal(ShuffleRows(128).forward(gate_up), gate_up[core.get_w2_permute_indices_with_cache({}, gate_up, 128)])
    assert torch.equal(ShuffleRows(64).forward(gate_up), flashinfer("flashinfer").shuffle_matrix_a(gate_up, 64))


def test_the_mma_view_moves_nothing_and_reads_by_its_formula() -> None:
    scales = torch.randint(0, 256, (300, 10), dtype=torch.uint8)
    swizzled = Swizzle128x4().forward(scales)

    view = mma_view(swizzled, 300, 10)

    assert view.shape == (32, 4, 3, 4, 3, 1) and view.data_ptr() == swizzled.data_ptr()
    r, c = torch.meshgrid(torch.arange(300), torch.arange(10), indexing="ij")
    assert torch.equal(view[r % 32, (r % 128) // 32, r // 128, c % 4, c // 4, 0], scales)


@pytest.mark.parametrize("shape", [(8, 4), (13, 5), (1, 1), (128, 12)])
def test_8x4_tiles_by_their_formula(shape: tuple[int, int]) -> None:
    scales = torch.randint(1, 256, shape, dtype=torch.uint8)
    flat, padded = Swizzle8x4().forward(scales).reshape(-1), -(-shape[1] // 4) * 4

    for r in range(shape[0]):
        for c in range(shape[1]):
            assert flat[(r // 8) * 8 * padded + (c // 4) * 32 + (r % 8) * 4 + c % 4] == scales[r, c]
    check_inverse(Swizzle8x4(), TensorSpec(shape, torch.uint8))


@pytest.mark.parametrize(
    "transform", [PackFragments(), ShuffleRows(128), ShuffleRows(64), up_gate_blocks(64), up_gate_shuffled()]
)
def test_layouts_invert(transform: Any) -> None:
    check_inverse(transform, TensorSpec((3, 256, 24), torch.uint8))


@pytest.mark.parametrize("transform", [up_gate_shuffled(), up_gate_blocks(64), ShuffleRows(128)], ids=str)
def test_a_band_converts_by_itself(transform: Any) -> None:
    """Any aligned columns map to the same columns; a block of rows to the same part of the bytes."""
    spec = TensorSpec((256, 24), torch.uint8)
    source = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
    band, whole = transform.band(spec), transform.forward(source)

    assert band is not None
    if band.dim == -1:
        pieces = [transform.forward(source[:, c : c + 8].contiguous()) for c in range(0, 24, 8)]
        assert torch.equal(torch.cat(pieces, -1), whole)
    else:
        pieces = [transform.forward(source[r : r + band.size]) for r in range(0, 256, band.size)]
        assert torch.equal(torch.cat(pieces), whole)


def test_fragments_have_no_band_and_say_so() -> None:
    assert PackFragments().band(TensorSpec((4096, 2048), torch.uint8)) is None
    assert "no bands" in (PackFragments.__doc__ or "")
