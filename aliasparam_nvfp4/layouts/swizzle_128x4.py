"""The 128x4 block-scale swizzle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import Band, PadLast2, TensorSpec, Transform
from aliasparam.errors import TransformError

_PAD = PadLast2(rows=128, cols=4)


@dataclass(frozen=True)
class Swizzle128x4(Transform):
    """Block scales ``[..., R, C]`` to tiles of 128 rows by 4 columns, padded with zero bytes.

    With P the padded column count, byte (r, c) of a region goes to
    ``(r//128)*128*P + (c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4``
    (TensorRT-LLM ``computeSFIndex``, FlashInfer ``csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp``). Any dtype of one byte.
    A panel of 128 rows maps to itself; the buffer grows unless R % 128 == 0 and C % 4 == 0.
    """

    core_dims: int = 2
    pads = True

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        if spec.dtype.itemsize != 1:
            raise TransformError("block scales are one byte each", expected="float8_e4m3fn or uint8", found=spec)
        return _PAD.output_spec(spec)

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 128)

    def forward(self, tensor: Tensor) -> Tensor:
        padded = self.output_spec(TensorSpec.of(tensor)).shape
        tiles = _PAD.forward(tensor.view(torch.uint8)).view(*padded[:-2], padded[-2] // 128, 4, 32, padded[-1] // 4, 4)
        return _exchange(tiles).reshape(padded).view(tensor.dtype)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        padded = self.output_spec(spec).shape
        tiles = tensor.view(torch.uint8).reshape(*padded[:-2], padded[-2] // 128, padded[-1] // 4, 32, 4, 4)
        rows = _exchange(tiles).reshape(padded)
        return _PAD.inverse(rows, TensorSpec(spec.shape, torch.uint8)).view(spec.dtype)


def offset(row: Tensor, col: Tensor, cols: int) -> Tensor:
    """Byte offset of block scale (row, col) in a region with ``cols`` unpadded columns: the kernel's index formula."""
    padded = -(-cols // 4) * 4
    return (row // 128) * 128 * padded + (col // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + col % 4


def _exchange(tiles: Tensor) -> Tensor:
    """Axes (row tile, row//32, row%32, col tile, col%4) to (row tile, col tile, row%32, row//32, col%4), or back."""
    lead = range(tiles.dim() - 5)
    n = len(lead)
    return tiles.permute(*lead, n, n + 3, n + 2, n + 1, n + 4)
