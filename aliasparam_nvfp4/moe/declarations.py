"""What an MoE layer declares for a runner, and for those it may be moved to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aliasparam import Alias, Derivation, Layout

from ..checkpoint.format import CheckpointFormat
from ..errors import BackendError
from ..quantize.format import BLOCK_SIZE
from .layouts import MoELayout
from .runners import MoEShape
from .stored import Stored

Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]


def parameters(
    shape: MoEShape, names: CheckpointFormat, stored: Stored, *, input_scale: bool, bias: torch.dtype | None
) -> Parameters:
    """Checkpoint names with their shapes and dtypes; ``bias``: the dtype of the experts' biases, None where they have none."""
    e, h, i, rows, gated = shape.experts, shape.hidden, shape.intermediate, shape.w13_rows, shape.expert_activation.gated
    u8, e4m3, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    found: Parameters = {
        f"w13_{names.weight}": ((e, *stored.matrix(rows, h // 2)), u8),
        f"w2_{names.weight}": ((e, *stored.matrix(h, i // 2)), u8),
        f"w13_{names.block_scale}": ((e, *stored.matrix(rows, h // BLOCK_SIZE)), e4m3),
        f"w2_{names.block_scale}": ((e, *stored.matrix(h, i // BLOCK_SIZE)), e4m3),
    }
    of_all = shape.all_experts, 2 if gated else 1
    scalars = {f"w13_{names.weight_global}": (e, 2) if gated else (e,), f"w2_{names.weight_global}": (e,)}
    if input_scale:
        scalars |= {f"w13_{names.input_global}": of_all, f"w2_{names.input_global}": of_all[:1]}
    found |= {name: ((1,) if stored.one_scale else dims, f32) for name, dims in scalars.items()}
    if bias is not None:
        found |= {"w13_bias": ((e, rows), bias), "w2_bias": ((e, h), bias)}
    return found


def formats(checkpoint: CheckpointFormat, layout: MoELayout, stored: Stored, *, gated: bool) -> dict[str, tuple[str, Layout]]:
    """Checkpoint name to (kernel name, its order) of the four large tensors."""
    return {
        f"w13_{checkpoint.weight}": ("w13_weight_prepared", stored.order(layout.w13, halves=gated)),
        f"w2_{checkpoint.weight}": ("w2_weight_prepared", stored.order(layout.w2, halves=False)),
        f"w13_{checkpoint.block_scale}": ("w13_blockscale_swizzled", stored.order(layout.w13_scale, halves=gated)),
        f"w2_{checkpoint.block_scale}": ("w2_blockscale_swizzled", stored.order(layout.w2_scale, halves=False)),
    }


def aliases(
    checkpoint: CheckpointFormat, stored: Stored, layout: MoELayout, others: Iterable[MoELayout], *, gated: bool
) -> list[Alias]:
    """The four pairs of ``layout``, with room for those of ``others``."""
    rooms = [formats(checkpoint, other, stored, gated=gated) for other in others]
    return [
        Alias(source, kernel, order, room_for=tuple(room[source][1] for room in rooms))
        for source, (kernel, order) in formats(checkpoint, layout, stored, gated=gated).items()
    ]


def biases(stored: Stored, *, gated: bool) -> list[Alias]:
    """The pairs of the biases: gate above up, as runners that take them read them."""
    return [Alias("w13_bias", "gemm1_bias", stored.bias_order(halves=gated)), Alias("w2_bias", "gemm2_bias")]


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
