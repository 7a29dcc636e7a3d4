"""What a linear backend is: the layouts it wants, where it runs, and its call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aliasparam import Transform


@dataclass(frozen=True)
class LinearLayout:
    """Kernel formats of the two big tensors of a linear layer.

    ``weight``: u8 ``[N, K/2]`` to the format of ``weight_prepared``.
    ``weight_scale``: e4m3 ``[N, K/16]`` to the format of ``weight_scale_interleaved``.
    """

    weight: Transform
    weight_scale: Transform


@dataclass(frozen=True)
class LinearShape:
    """Logical dims of a linear layer on this rank."""

    n: int
    k: int
    partitions: tuple[int, ...]


class KernelNames(Protocol):
    """What a backend reads of a layer."""

    weight_prepared: Tensor
    weight_scale_interleaved: Tensor
    alpha: Tensor
    input_scale_inv: Tensor


class LinearBackend(ABC):
    """One GEMM path for NVFP4 linear layers. A file in this folder defines one, as ``BACKEND``."""

    #: Public name, see the fixed list in the docs.
    name: str
    layout: LinearLayout
    #: ``auto`` takes the runnable backend with the highest rank.
    rank: int = 0

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``, or None where it can."""

    def check_shape(self, shape: LinearShape) -> None:  # noqa: B027  (optional, not abstract)
        """Raise ShapeError for dims the kernel cannot take. Default: what the layouts take."""

    @abstractmethod
    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        """``x [..., K] -> [..., N]`` from the layer's kernel-format names, in ``x.dtype``, without bias."""
