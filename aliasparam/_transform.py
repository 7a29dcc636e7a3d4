"""Transforms: declared bijections between checkpoint format and kernel format.

[Note: shapes and regions] A transform acts on the trailing dimensions it documents; every index of the dimensions before
them is an independent *region* (an expert, say). So one declaration serves a 2-D linear weight and a 3-D stack of experts,
and a storage can convert one expert without touching its neighbours.

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
    def invertible(self) -> bool:
        return all(step.invertible for step in self.steps)


@dataclass(frozen=True)
class PadLast2(Transform):
    """Pad rows and columns (the last two dims) with zeros up to multiples of ``rows`` and ``cols``.

    ``[..., R, C] -> [..., ceil(R/rows)*rows, ceil(C/cols)*cols]``; any dtype with byte-wise zero.
    """

    rows: int = 1
    cols: int = 1
    core_dims: int = 2

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        _need_dims(self, spec, 2)
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


@dataclass(frozen=True)
class SwapHalves(Transform):
    """Exchange the two halves of the rows (dim -2): ``[gate; up] <-> [up; gate]``. An involution."""

    core_dims: int = 2

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        _need_dims(self, spec, 2)
        if spec.shape[-2] % 2:
            raise TransformError("cannot swap the halves of an odd number of rows", expected="an even row count", found=spec)
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        self.output_spec(TensorSpec.of(tensor))
        half = tensor.shape[-2] // 2
        return torch.cat([tensor[..., half:, :], tensor[..., :half, :]], dim=-2)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return self.forward(tensor)


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


def check_inverse(transform: Transform, spec: TensorSpec, *, device: torch.device | str = "cpu") -> None:
    """Raise TransformError unless ``transform`` inverts on a probe of ``spec``.

    The probe holds distinct bytes wherever the size allows, so any lost, doubled or moved byte shows.
    """
    probe_bytes = (torch.arange(spec.nbytes, device=device, dtype=torch.int64) * 131 + 7) % 251
    probe = probe_bytes.to(torch.uint8).view(spec.dtype).reshape(spec.shape)
    after = transform.forward(probe.clone())
    promised = transform.output_spec(spec)
    if TensorSpec.of(after) != promised:
        raise TransformError(f"{transform} gives another spec than it promises", expected=promised, found=TensorSpec.of(after))
    back = transform.inverse(after.contiguous(), spec)
    if TensorSpec.of(back) != spec:
        raise TransformError(f"the inverse of {transform} gives another spec", expected=spec, found=TensorSpec.of(back))
    wrong = as_bytes(back) != as_bytes(probe)
    if bool(wrong.any()):
        raise TransformError(
            f"the inverse of {transform} does not invert",
            expected="inverse(forward(x)) == x for every byte",
            found=f"{int(wrong.sum())} of {spec.nbytes} bytes differ, first at byte {int(wrong.nonzero()[0])} ({spec})",
            remedy="Declare the step as lossy with a kept source, or mend the inverse.",
        )


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat uint8, copied only where it is not contiguous. NaN payloads and -0 count."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _need_dims(transform: Transform, spec: TensorSpec, dims: int) -> None:
    if len(spec.shape) < dims:
        raise TransformError(f"{type(transform).__name__} needs at least {dims} dimensions", expected="[..., R, C]", found=spec)
