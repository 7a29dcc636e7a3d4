"""Emulators: what a kernel computes, reading its bytes one by one by the kernel's index formula.

Independent of the layouts which wrote the bytes: here an element (row, k) asks where its nibble and its block scale lie.
Slow, exact (float64), for any device; used by the tests and by ``aliasparam-nvfp4 verify``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..quantize.codec import quantize_activation, scaled_codes
from ..quantize.format import BLOCK_SIZE, E2M1_VALUES

Reader = Callable[[Tensor, Tensor, int, int], Tensor]


def linear(
    layout: str, x: Tensor, weight: Tensor, scales: Tensor, alpha: Tensor, input_scale_inv: Tensor | None, *, n: int
) -> Tensor:
    """``[M, K] -> [M, n]`` float64 from kernel bytes.

    Args:
        layout: name of a :class:`~aliasparam_nvfp4.linear.backends.LinearLayout`.
        x: activations ``[M, K]``.
        weight: the kernel name of the weight.
        scales: the kernel name of its block scales.
        alpha: f32 ``[1]``, or ``[M, 1]`` with scales computed at run time.
        input_scale_inv: f32 ``[1]``, or ``[M, 1]``, for quantized activations; None to take them as they are.
        n: logical output features.
    """
    values = READERS[layout](weight, scales, n, x.shape[1])
    if input_scale_inv is not None:
        codes, blocks = quantize_activation(x, input_scale_inv)
        x = scaled_codes(codes, blocks)
    return (x.double() @ values.T) * alpha.double()


def read(weight: Tensor, scales: Tensor, place: Tensor, column: Tensor, *, swizzled: bool) -> Tensor:
    """``code * block scale``, float64, of the elements (kernel row ``place``, ``column``) of row-major codes.

    Block scales are row-major too, or in 128x4 tiles.
    """
    code = _code(weight.reshape(-1), place * weight.shape[-1] + column // 2, column)
    if swizzled:
        return code * _swizzled_scale(scales, place, column)
    return code * _e4m3(scales.view(torch.uint8).reshape(-1)[place * scales.shape[-1] + column // BLOCK_SIZE])


def shuffled(row: Tensor) -> Tensor:
    """Where the shuffle of 32 rows puts a row."""
    return 32 * (row // 32) + 8 * (row % 4) + (row % 32) // 4


def _by_rows(place: Callable[[Tensor], Tensor], *, swizzled: bool) -> Reader:
    def reader(weight: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
        row, column = grid(n, k, weight.device)
        return read(weight, scales, place(row), column, swizzled=swizzled)

    return reader


def _same(row: Tensor) -> Tensor:
    return row


def _fragments(weight: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    row, column = grid(n, k, weight.device)
    half_k, r = (column % 16) // 2, row % 64
    lane = 4 * (r % 8) + half_k % 4
    word = 64 * ((r // 8) % 2) + 2 * lane + r // 32
    byte = 4 * word + 2 * ((r // 16) % 2) + half_k // 4
    code = _code(weight.reshape(-1), (column // 16) * 8 * n + (row // 64) * 512 + byte, column)
    bits = scales.reshape(-1)[(column // BLOCK_SIZE) * n + row].to(torch.int16) << 7
    return code * bits.view(torch.float16).double()


#: How the bytes of each layout are read: (weight, scales, n, k) to ``code * block scale``, float64 ``[n, k]``.
READERS: dict[str, Reader] = {
    "plain": _by_rows(_same, swizzled=True),
    "shuffled": _by_rows(shuffled, swizzled=True),
    "swizzled": _by_rows(_same, swizzled=True),
    "checkpoint": _by_rows(_same, swizzled=False),
    "fragments": _fragments,
}


def grid(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) of every element, ``[n, k]`` each."""
    row, column = torch.meshgrid(torch.arange(n, device=device), torch.arange(k, device=device), indexing="ij")
    return row, column


def _code(flat: Tensor, byte: Tensor, column: Tensor) -> Tensor:
    """Values of the nibbles at ``byte``: low for even columns."""
    nibble = (flat[byte] >> (4 * (column % 2)).to(torch.uint8)) & 15
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64, device=flat.device)
    return table[nibble.long()]


def _swizzled_scale(scales: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Block scales in 128x4 tiles (``fp4Op.cpp``, ``computeSFIndex``)."""
    block, padded = column // BLOCK_SIZE, scales.shape[-1]
    place = (row // 128) * 128 * padded + (block // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + block % 4
    return _e4m3(scales.view(torch.uint8).reshape(-1)[place])


def _e4m3(byte: Tensor) -> Tensor:
    exponent, mantissa = ((byte >> 3) & 15).double(), (byte & 7).double()
    magnitude = torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * torch.exp2(exponent - 10))
    return torch.where(byte >= 128, -magnitude, magnitude)
