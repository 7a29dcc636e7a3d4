"""What a linear backend is: the layouts it wants, where it runs, and its call."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aliasparam import Layout, Reencoding

from ..errors import ShapeError


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


class LinearBackend(ABC):
    """One GEMM path for NVFP4 linear layers. A file in this folder defines one, as ``BACKEND``."""

    #: Public name, see the fixed list in the docs.
    name: str
    layout: LinearLayout
    #: True where activations are not quantized (W4A16).
    weight_only: bool = False
    #: True where the checkpoint must have activation scales.
    needs_input_scale: bool = True
    #: Compute capabilities it runs on; empty for any device.
    capabilities: frozenset[tuple[int, int]] = frozenset()
    #: Dtypes of activations.
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    #: Packages it needs, besides torch.
    packages: tuple[str, ...] = ()
    #: ``auto`` takes the runnable backend with the highest rank on a device.
    rank: int = 0
    #: What is proven without the hardware; rows of the table in docs/nvfp4/backends.md.
    call: str = ""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``, or None where it can."""
        if self.capabilities:
            wanted = ", ".join(f"{major}.{minor}" for major, minor in sorted(self.capabilities))
            if device.type != "cuda":
                return f"needs a GPU of compute capability {wanted}"
            found = torch.cuda.get_device_capability(device)
            if found not in self.capabilities:
                return f"needs a GPU of compute capability {wanted}; this one has {found[0]}.{found[1]}"
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{', '.join(missing)} is not installed" if missing else None

    def __reduce__(self) -> Any:
        """By name: a layer that is copied or saved names the same backend."""
        return _called, (self.name,)

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

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ShapeError for activations the kernel cannot take."""
        if dtype not in self.dtypes:
            raise ShapeError(
                "this backend does not take activations of this dtype",
                name=self.name,
                expected=" or ".join(str(d).removeprefix("torch.") for d in self.dtypes),
                found=dtype,
                remedy="Cast the activations, or use another backend.",
            )

    @abstractmethod
    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        """``x [M, K] -> [M, N]`` from the layer's kernel-format names, in ``x.dtype``, without bias. M is not 0."""


def _called(name: str) -> LinearBackend:
    from . import linear_backends

    return linear_backends()[name]
