"""The 128x4 swizzle against its index formula and FlashInfer's own un-swizzle."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam import TensorSpec
from aliasparam_nvfp4.layouts import Swizzle128x4

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
