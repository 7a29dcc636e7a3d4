"""The 8x4 block-scale swizzle, for activations of few rows in TRT-LLM's GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import Band, PadLast2, TensorSpec, Transform
from aliasparam.errors import TransformError

_PAD = PadLast2(rows=8, cols=4)


@dataclass(frozen=True)
class Swizzle8x4(Transform):
    """Block scales ``[..., R, C]`` to tiles of 8 rows by 4 columns, padded with zero bytes.

    With P the padded column count, byte (r, c) of a region goes to ``(r//8)*8*P + (c//4)*32 + (r%8)*4 + c%4``
    (FlashInfer ``csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp``, ``computeSFIndex`` for the 8x4 layout).
    """

    core_dims: int = 2
    pads = True

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        if spec.dtype.itemsize != 1:
            raise TransformError("block scales are one byte each", expected="float8_e4m3fn or uint8", found=spec)
        return _PAD.output_spec(spec)

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 8)

    def forward(self, tensor: Tensor) -> Tensor:
        padded = self.output_spec(TensorSpec.of(tensor)).shape
        tiles = _PAD.forward(tensor.view(torch.uint8)).view(*padded[:-2], padded[-2] // 8, 8, padded[-1] // 4, 4)
        return tiles.transpose(-3, -2).reshape(padded).view(tensor.dtype)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        padded = self.output_spec(spec).shape
        tiles = tensor.view(torch.uint8).reshape(*padded[:-2], padded[-2] // 8, padded[-1] // 4, 8, 4)
        rows = tiles.transpose(-3, -2).reshape(padded)
        return _PAD.inverse(rows, TensorSpec(spec.shape, torch.uint8)).view(spec.dtype)
