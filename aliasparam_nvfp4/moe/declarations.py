"""What an MoE layer declares for a runner, and for those it may be moved to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aliasparam import Alias, Derivation, Layout

from ..checkpoint_format import CheckpointFormat
from ..errors import BackendError
from .layouts import MoELayout


def formats(checkpoint: CheckpointFormat, layout: MoELayout) -> dict[str, tuple[str, Layout]]:
    """Checkpoint name to (kernel name, its order) of the four large tensors."""
    return {
        f"w13_{checkpoint.weight}": ("w13_weight_prepared", layout.w13),
        f"w2_{checkpoint.weight}": ("w2_weight_prepared", layout.w2),
        f"w13_{checkpoint.block_scale}": ("w13_blockscale_swizzled", layout.w13_scale),
        f"w2_{checkpoint.block_scale}": ("w2_blockscale_swizzled", layout.w2_scale),
    }


def aliases(checkpoint: CheckpointFormat, layout: MoELayout, others: Iterable[MoELayout]) -> list[Alias]:
    """The four pairs of ``layout``, with room for those of ``others``."""
    rooms = [formats(checkpoint, other) for other in others]
    return [
        Alias(source, kernel, order, room_for=tuple(room[source][1] for room in rooms))
        for source, (kernel, order) in formats(checkpoint, layout).items()
    ]


def scalars(own: Iterable[Derivation], others: Iterable[Derivation], runner: str) -> list[Derivation]:
    """The scalars of a runner, and memory for those which only others read: zeros until the layer is moved.

    Raises:
        BackendError: one name has another shape on another runner.
    """
    found = {d.name: d for d in own}
    for other in others:
        mine = found.setdefault(other.name, unread(other))
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            raise BackendError(
                "two of these runners want another shape of one scalar",
                name=runner,
                expected=f"{other.name} {list(mine.shape)}",
                found=list(other.shape),
                remedy="Create layers for these runners apart.",
            )
    return list(found.values())


def unread(derivation: Derivation) -> Derivation:
    """The same name and memory, computed from nothing: what no kernel reads cannot be refused."""
    return replace(derivation, function=_Zeros(derivation.shape, derivation.dtype))


class _Zeros:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __call__(self, *sources: Tensor) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=sources[0].device)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Zeros) and (self.shape, self.dtype) == (other.shape, other.dtype)

    def __hash__(self) -> int:
        return hash((self.shape, self.dtype))
