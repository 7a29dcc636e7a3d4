"""What an MoE layer declares for a runner, and for those it may be moved to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aliasparam import Alias, Derivation, Layout

from ..checkpoint.format import MODELOPT, CheckpointFormat
from ..errors import BackendError
from ..quantize.format import BLOCK_SIZE
from ..quantize.missing import Missing
from .runners import MoERunner, MoEShape, Needs, needs_of
from .stored import ROWS, Stored

Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Declared:
    """What a layer's checkpoint has: from this its names are declared, for one runner or another.

    Attributes:
        shape: of the layer on this rank.
        names: of the checkpoint.
        stored: the form of its tensors.
        input_scale: whether it has activation scales.
        missing: what counts for those that are missing.
        bias: dtype of the experts' biases; None where they have none.
    """

    shape: MoEShape
    names: CheckpointFormat = MODELOPT
    stored: Stored = ROWS
    input_scale: bool = True
    missing: Missing = "refuse"
    bias: torch.dtype | None = None

    @property
    def gated(self) -> bool:
        return self.shape.expert_activation.gated

    @property
    def needs(self) -> Needs:
        """What is asked of a runner."""
        return needs_of(self.shape.expert_activation, self.missing, input_scale=self.input_scale, bias=self.bias is not None)

    def parameters(self) -> Parameters:
        """Checkpoint names with their shapes and dtypes."""
        shape, names, stored = self.shape, self.names, self.stored
        e, h, i, rows = shape.experts, shape.hidden, shape.intermediate, shape.w13_rows
        u8, e4m3, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
        found: Parameters = {
            f"w13_{names.weight}": ((e, *stored.matrix(rows, h // 2)), u8),
            f"w2_{names.weight}": ((e, *stored.matrix(h, i // 2)), u8),
            f"w13_{names.block_scale}": ((e, *stored.matrix(rows, h // BLOCK_SIZE)), e4m3),
            f"w2_{names.block_scale}": ((e, *stored.matrix(h, i // BLOCK_SIZE)), e4m3),
        }
        for name, halves in (("w13", self.gated), ("w2", False)):
            found[f"{name}_{names.weight_global}"] = stored.scales(e, halves=halves, inputs=False), f32
            if self.input_scale:
                dims = stored.scales(shape.all_experts, halves=halves, inputs=True)
                column = name == "w13" and not (self.gated or stored.columns)  # as SGLang has it
                found[f"{name}_{names.input_global}"] = (*dims, 1) if column else dims, f32
        if self.bias is not None:
            found |= {"w13_bias": ((e, rows), self.bias), "w2_bias": ((e, h), self.bias)}
        return found

    def formats(self, runner: MoERunner) -> dict[str, tuple[str, Layout]]:
        """Checkpoint name to (kernel name, its order) of the four large tensors, and of biases."""
        layout, stored, gated = runner.layout.of(self.shape.expert_activation), self.stored, self.gated
        found = {
            f"w13_{self.names.weight}": ("w13_weight_prepared", stored.order(layout.w13, halves=gated)),
            f"w2_{self.names.weight}": ("w2_weight_prepared", stored.order(layout.w2, halves=False)),
            f"w13_{self.names.block_scale}": ("w13_blockscale_swizzled", stored.order(layout.w13_scale, halves=gated)),
            f"w2_{self.names.block_scale}": ("w2_blockscale_swizzled", stored.order(layout.w2_scale, halves=False)),
        }
        biases = runner.biases if self.bias is not None else None
        return found if biases is None else found | biases.formats(stored, gated=gated)

    def aliases(self, runner: MoERunner, others: Iterable[MoERunner]) -> list[Alias]:
        """The pairs of ``runner``, with room for those of ``others``."""
        rooms = [self.formats(other) for other in others]
        return [
            Alias(source, kernel, order, room_for=tuple(room[source][1] for room in rooms))
            for source, (kernel, order) in self.formats(runner).items()
        ]

    def derivations(self, runner: MoERunner) -> list[Derivation]:
        """What ``runner`` reads besides."""
        shape = self.shape
        scales = runner.scales(shape, self.names, input_scale=self.input_scale, missing=self.missing)
        found = scales.derivations()
        if self.bias is None or runner.biases is None:
            return found
        return found + runner.biases.derivations(scales.stored, self.stored, shape.w13_rows, shape.hidden)


def try_out(derivations: Iterable[Derivation], values: Mapping[str, Tensor]) -> None:
    """Compute from ``values`` what will be computed after loading: it refuses what float32 does not hold."""
    for derived in derivations:
        derived.function(*(values[source].clone() for source in derived.sources))


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
