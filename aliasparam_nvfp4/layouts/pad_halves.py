"""Padding of gate and up rows, each for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import Band, PadLast2, TensorSpec, Transform
from aliasparam.errors import TransformError


@dataclass(frozen=True)
class PadHalves(Transform):
    """``[..., 2*I, C]`` to ``[..., 2*ceil(I/rows)*rows, ceil(C/cols)*cols]``: zeros after gate and after up, and right of both.

    Padding the stack as a whole would put up rows where a kernel looks for gate rows.
    """

    rows: int = 1
    cols: int = 1
    core_dims: int = 2
    pads = True

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        if len(spec.shape) < 2 or spec.shape[-2] % 2:
            raise TransformError("gate and up are two halves of the rows", expected="[..., 2*I, C]", found=spec)
        half = self._pad.output_spec(TensorSpec((*spec.shape[:-2], spec.shape[-2] // 2, spec.shape[-1]), spec.dtype)).shape
        return TensorSpec((*half[:-2], 2 * half[-2], half[-1]), spec.dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        if self.output_spec(TensorSpec.of(tensor)).shape == tuple(tensor.shape):
            return tensor
        halves = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        padded = self._pad.forward(_two(halves))
        return padded.flatten(-3, -2).view(tensor.dtype)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        halves: Tensor = _two(tensor)[..., : spec.shape[-2] // 2, : spec.shape[-1]]
        return halves.flatten(-3, -2).contiguous()

    def is_identity_for(self, spec: TensorSpec) -> bool:
        return self.output_spec(spec) == spec

    def band(self, spec: TensorSpec) -> Band | None:
        # Never a slice of rows: its two halves would be others.
        return Band(-1, self.cols) if self.is_identity_for(spec) else None

    @property
    def _pad(self) -> PadLast2:
        return PadLast2(rows=self.rows, cols=self.cols)


def _two(rows: Tensor) -> Tensor:
    *lead, count, columns = rows.shape
    return rows.reshape(*lead, 2, count // 2, columns)
