"""What a linear backend is: the layouts it wants, where it runs, and its call."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aliasparam import Layout, Reencoding

from ...errors import BackendError, ShapeError
from ...kernels.base import Kernel
from ...quantize.missing import RunTimeScales


@dataclass(frozen=True)
class LinearLayout:
    """Kernel formats of the two big tensors of a linear layer.

    ``weight``: of u8 ``[N, K/2]``, the order of ``weight_prepared``.
    ``weight_scale``: of e4m3 ``[N, K/16]``, the format of ``weight_scale_interleaved``.
    """

    name: str
    weight: Layout
    weight_scale: Layout | Reencoding
    #: N is a multiple of this: the kernel knows no padded rows.
    whole_rows: int = 1
    #: Whether block scales keep their sign.
    signed_scales: bool = True


@dataclass(frozen=True)
class LinearShape:
    """Logical dims of a linear layer on this rank."""

    n: int
    k: int
    partitions: tuple[int, ...]


class KernelNames(Protocol):
    """What a backend reads of a layer.

    ``alpha`` is ``input_scale * weight_scale_2``, for kernels that take quantized activations; ``weight_alpha`` is
    ``weight_scale_2`` alone, for those that take them as they are. Both f32 ``[1]``.
    """

    weight_prepared: Tensor
    weight_scale_interleaved: Tensor
    alpha: Tensor
    weight_alpha: Tensor
    input_scale_inv: Tensor
    run_time_scales: RunTimeScales | None


def quantizer_scales(layer: KernelNames, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the quantizer of ``x [M, K]`` multiplies with, what sums are multiplied with): f32 ``[1]``, or ``[M, 1]`` where they
    are computed here.

    For backends with ``dynamic_scales``.
    """
    stored: Tensor | None = getattr(layer, "input_scale_inv", None)
    if layer.run_time_scales is None:
        return layer.input_scale_inv, layer.alpha
    inverse = layer.run_time_scales.inverse(x, stored)
    own = layer.weight_alpha / inverse
    return inverse, own if stored is None else torch.where(stored > 0, layer.alpha, own)


class LinearBackend(Kernel):
    """One GEMM path for NVFP4 linear layers."""

    what, folder, constant = "backend", __package__, "BACKEND"

    layout: LinearLayout
    #: True where activations are not quantized (W4A16).
    weight_only: bool = False
    #: True where the checkpoint must have activation scales, unless they are computed at run time.
    needs_input_scale: bool = True

    def check_shape(self, shape: LinearShape) -> None:
        """Raise ShapeError for dims the kernel cannot take. Default: those its layout does not have."""
        if shape.n % self.layout.whole_rows:
            raise ShapeError(
                "this backend does not take these dims",
                name=self.name,
                expected=f"N % {self.layout.whole_rows} == 0",
                found=f"N={shape.n}, K={shape.k}",
                remedy='Use another backend, or "auto".',
            )

    def check_scales(self, *, input_scale: bool, dynamic: bool) -> None:
        """Raise BackendError where it needs scales of activations that there are not.

        Args:
            input_scale: whether the checkpoint has them.
            dynamic: whether those that are missing are to be computed at run time.
        """
        if dynamic and not (self.weight_only or self.dynamic_scales):
            raise BackendError(
                "this backend cannot compute activation scales at run time",
                name=self.name,
                expected="a W4A16 backend (triton, flashinfer_cudnn_w4a16, flashinfer_cutedsl_w4a16), triton_w4a4 or reference",
                remedy='Use one of these, or missing_input_scale="max".',
            )
        if not input_scale and not dynamic and self.needs_input_scale:
            raise BackendError(
                "this backend quantizes activations, and the checkpoint has no activation scales",
                name=self.name,
                expected="a W4A16 backend (triton, flashinfer_cudnn_w4a16, flashinfer_cutedsl_w4a16) or reference",
            )

    @abstractmethod
    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        """``x [M, K] -> [M, N]`` from the layer's kernel-format names, in ``x.dtype``, without bias. M is not 0."""
