"""Transforms: declared bijections between checkpoint format and kernel format.

[Note: shapes and regions] A transform acts on the trailing dimensions it documents; every index of the dimensions before
them is an independent *region* (an expert, say). So one declaration serves a 2-D linear weight and a 3-D stack of experts,
and a storage can convert one expert without touching its neighbours.

[Note: bands] Inside a region a transform may further say that slices of rows (or of columns) convert independently. A storage
then converts a large region piece by piece in place, with a small scratch, instead of copying it as a whole.

[Note: inverse needs the spec] Padding forgets the checkpoint shape and a dtype view forgets the dtype, so `inverse` is
given the :class:`TensorSpec` of what it must rebuild.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import TransformError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor in one format."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Band:
    """A slice of a region which converts by itself. See [Note: bands].

    Attributes:
        dim: -2: source rows ``[k*size, (k+1)*size)`` alone make the k-th equal part of the kernel format's bytes, in order (the
            last part may be shorter in the source). -1: any ``size``-aligned range of columns maps to the same columns.
        size: rows or columns of the source in one band.
    """

    dim: int
    size: int


class Transform(ABC):
    """A bijection from checkpoint format to kernel format.

    Laws (checked by :func:`check_inverse`, and on a probe when a module declares the transform):
    ``inverse(forward(x), spec(x)) == x`` byte for byte, ``TensorSpec.of(forward(x)) == output_spec(spec(x))``, and
    ``forward(x)[e] == forward(x[e])`` for every leading index ``e`` (see [Note: shapes and regions]).

    ``forward`` and ``inverse`` are pure: they never write their input and never return a view of it which a later
    write could disturb, except where the result has the very same layout (identity).
    """

    #: Trailing dimensions the transform acts on; dimensions before them are regions.
    core_dims: int = 2
    #: False for steps that lose information (re-quantizing, rounding, clamping). They never share memory with their source:
    #: the kernel name gets memory of its own and is always computed from the kept source, so nothing drifts.
    lossless: bool = True
    #: True where the kernel format is larger by padding. Tells padding of a single row apart from a broadcast of it.
    pads: bool = False

    @abstractmethod
    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        """Kernel-format spec for a checkpoint-format spec. Raises TransformError where the format does not exist."""

    @abstractmethod
    def forward(self, tensor: Tensor) -> Tensor:
        """Checkpoint format to kernel format, out of place."""

    @abstractmethod
    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        """Kernel format back to the checkpoint format described by ``spec``, out of place."""

    def then(self, following: Transform) -> Transform:
        """This transform, then ``following``."""
        return Chain((self, following))

    def is_identity_for(self, spec: TensorSpec) -> bool:
        """Whether kernel format and checkpoint format are the same bytes for tensors of this spec."""
        return False

    def band(self, spec: TensorSpec) -> Band | None:
        """The smallest slice of a region that converts by itself, or None: the region converts as a whole."""
        return None

    @property
    def invertible(self) -> bool:
        """False only where kernel bytes came from code nobody declared (see the ported helpers)."""
        return True


@dataclass(frozen=True)
class Identity(Transform):
    """Kernel format equals checkpoint format."""

    core_dims: int = 0

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor

    def is_identity_for(self, spec: TensorSpec) -> bool:
        return True

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 1)


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms applied first to last; inverted last to first."""

    steps: tuple[Transform, ...]

    def __init__(self, steps: Sequence[Transform]) -> None:
        flat: list[Transform] = []
        for step in steps:
            flat.extend(step.steps if isinstance(step, Chain) else [step])
        object.__setattr__(self, "steps", tuple(flat))

    @property
    def core_dims(self) -> int:  # type: ignore[override]
        return max((step.core_dims for step in self.steps), default=0)

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        for step in self.steps:
            spec = step.output_spec(spec)
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        for step in self.steps:
            tensor = step.forward(tensor)
        return tensor

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        specs = [spec]
        for step in self.steps[:-1]:
            specs.append(step.output_spec(specs[-1]))
        for step, before in zip(reversed(self.steps), reversed(specs), strict=True):
            tensor = step.inverse(tensor, before)
        return tensor

    def is_identity_for(self, spec: TensorSpec) -> bool:
        for step in self.steps:
            if not step.is_identity_for(spec):
                return False
            spec = step.output_spec(spec)
        return True

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return all(step.lossless for step in self.steps)

    @property
    def pads(self) -> bool:  # type: ignore[override]
        return any(step.pads for step in self.steps)

    @property
    def invertible(self) -> bool:
        return all(step.invertible for step in self.steps)

    def band(self, spec: TensorSpec) -> Band | None:
        """The common band where every step has one along the same dim."""
        size, dim, whole_spec = 1, None, spec
        for step in self.steps:
            following = step.output_spec(spec)
            if not isinstance(step, (Identity, ViewDtype)):
                band = step.band(spec)
                if band is None or dim not in (None, band.dim):
                    return None
                dim, size = band.dim, math.lcm(size, band.size)
                # Rows may be added at the very end only, or the bands of the next step are not ours.
                whole = (spec.shape[-2], round_up(spec.shape[-2], band.size))
                if band.dim == -2 and step is not self.steps[-1] and following.shape[-2] not in whole:
                    return None
            spec = following
        if dim == -2 and not self._last_band_is_whole(whole_spec, size):
            return None
        return Band(-2 if dim is None else dim, size)

    def _last_band_is_whole(self, spec: TensorSpec, size: int) -> bool:
        """Whether the rows left over make as many kernel bytes as a whole band. Padding by 4 and then by 6 rows does not."""
        *lead, rows, columns = spec.shape
        if rows % size == 0:
            return True
        left, whole = (self.output_spec(TensorSpec((*lead, n, columns), spec.dtype)) for n in (rows % size, size))
        return left.nbytes == whole.nbytes


@dataclass(frozen=True)
class PadLast2(Transform):
    """Pad rows and columns (the last two dims) with zeros up to multiples of ``rows`` and ``cols``.

    ``[..., R, C] -> [..., ceil(R/rows)*rows, ceil(C/cols)*cols]``; any dtype with byte-wise zero.
    """

    rows: int = 1
    cols: int = 1
    core_dims: int = 2
    pads = True

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        need_dims(self, spec, 2)
        *lead, r, c = spec.shape
        return TensorSpec((*lead, round_up(r, self.rows), round_up(c, self.cols)), spec.dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        out_shape = self.output_spec(TensorSpec.of(tensor)).shape
        if out_shape == tuple(tensor.shape):
            return tensor
        out = torch.zeros(out_shape, dtype=tensor.dtype, device=tensor.device)
        out[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
        return out

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor[..., : spec.shape[-2], : spec.shape[-1]].contiguous()

    def is_identity_for(self, spec: TensorSpec) -> bool:
        return self.output_spec(spec) == spec

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, self.rows)


@dataclass(frozen=True)
class ViewDtype(Transform):
    """The same bytes under another dtype of the same element width (e4m3 block scales as uint8, say)."""

    dtype: torch.dtype
    core_dims: int = 0

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        if spec.dtype.itemsize != self.dtype.itemsize:
            raise TransformError(
                "a dtype view must keep the element width",
                expected=f"{spec.dtype.itemsize}-byte elements, as {spec.dtype}",
                found=f"{self.dtype} ({self.dtype.itemsize} bytes)",
            )
        return TensorSpec(spec.shape, self.dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.output_spec(TensorSpec.of(tensor)).dtype)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.view(spec.dtype)

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 1)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat uint8, copied only where it is not contiguous. NaN payloads and -0 count."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def need_dims(transform: Transform, spec: TensorSpec, dims: int) -> None:
    if len(spec.shape) < dims:
        raise TransformError(f"{type(transform).__name__} needs at least {dims} dimensions", expected="[..., R, C]", found=spec)


def contiguous_strides(shape: tuple[int, ...]) -> list[int]:
    """Element strides of a contiguous tensor of ``shape``."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
