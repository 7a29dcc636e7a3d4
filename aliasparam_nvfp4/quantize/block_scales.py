"""What a block scale may be: the one check of linear layers, experts, folders and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aliasparam import AliasedStorage, AliasRegistry
from aliasparam.module.registry import registries
from aliasparam.reload.delta_apply import Check
from aliasparam.reload.live import Live
from aliasparam.reload.patch import Patch

from ..errors import ScaleError


def need_block_scales(block_scale: Tensor, name: str = "weight_scale", *, signed: bool = True) -> None:
    """Raise ScaleError where a block scale (e4m3, any shape) is NaN, or negative for a kernel format that has no sign."""
    codes = block_scale.view(torch.uint8)
    if first_nan([codes]) is not None:
        raise _nan(None, name, None)
    if not signed and codes.numel() and (negative := int((codes > 0x80).sum())):  # -0 is none
        raise ScaleError(
            "block scales are negative, and this kernel format has no sign",
            name=name,
            expected="scales which are 0 or positive",
            found=f"{negative} negative ones",
            remedy="Use another backend, or export the checkpoint with positive scales.",
        )


def first_nan(pieces: Sequence[Tensor]) -> tuple[int, int] | None:
    """(index of the piece, element in it) of the first NaN among e4m3 codes (u8); None where there is none.

    As int8 the two NaNs are 127, which is the largest value, and -1: only pieces with that largest value, or with signs, are
    looked at twice. Two reductions without a temporary, and one transfer from the device, whatever the number of pieces.
    """
    ends = [torch.stack(torch.aminmax(piece.view(torch.int8))) for piece in pieces if piece.numel()]
    if not ends:
        return None
    found = iter(torch.stack(ends).tolist())
    for index, piece in enumerate(pieces):
        low, high = next(found) if piece.numel() else (0, 0)
        if low < 0 or high == 0x7F:
            nan = (piece.reshape(-1) & 0x7F).view(torch.int8) == 0x7F
            if bool(nan.any()):
                return index, int(nan.view(torch.uint8).argmax())
    return None


#: Bytes looked at in one step; temporaries stay within it.
STEP_BYTES = 16 << 20


@dataclass
class FiniteBlockScales:
    """Refuses NaN among the block scales that were written since it looked last. Their order does not matter for that, so kernel
    memory is read as it lies; padding is zero.

    Attributes:
        names: checkpoint names of e4m3 ``[N, C]``, or ``[E, R, C]`` with an expert a region.
        first_expert: global number of this rank's first expert; None where the tensors are matrices.
    """

    names: tuple[str, ...]
    first_expert: int | None = None
    _passed: dict[str, list[int]] = field(default_factory=dict)  # writes of each region that were looked at

    def __call__(self, registry: AliasRegistry) -> None:
        """Raises ScaleError with tensor and expert; nothing is derived then."""
        for name in self.names:
            storage = registry.sources[name].storage
            if storage is None:
                raise AssertionError(f"{name}: checked before it has memory")
            writes = list(storage.states.writes)
            passed = self._passed.get(name, [-1] * len(writes))
            place = _first_nan(storage, [now != then for now, then in zip(writes, passed, strict=True)])
            if place is not None:
                bound = storage.bound
                expert = place // (bound.capacity // bound.shape[0])
                raise _nan(registry.label, name, None if self.first_expert is None else self.first_expert + expert)
            self._passed[name] = writes


def finite_after(model: nn.Module) -> Check:
    """For :func:`~aliasparam.reload.prepare_delta`: refuses what a delta would make of block scales, before it is written."""
    looked_at = {
        id(registry.sources[name].storage)
        for _, registry in registries(model)
        for check in registry.checks
        if isinstance(check, FiniteBlockScales)
        for name in check.names
    }

    def check(label: str, live: Live, patches: Sequence[Patch]) -> None:
        for patch in patches if id(live.storage) in looked_at else ():
            need_block_scales(patch.new, label)

    return check


def _first_nan(storage: AliasedStorage, written: list[bool]) -> int | None:
    """The byte of kernel memory where the first NaN of the regions that were written is. One transfer from the device."""
    size = storage.bound.region_capacity
    pieces = [
        (start, storage.buffer[start : min(start + STEP_BYTES, last * size)])
        for first, last in _runs(written)
        for start in range(first * size, last * size, STEP_BYTES)
    ]
    found = first_nan([piece for _, piece in pieces])
    return None if found is None else pieces[found[0]][0] + found[1]


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of every run of True."""
    first = None
    for index, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = index
        elif not flag and first is not None:
            yield first, index
            first = None


def _nan(module: str | None, name: str, expert: int | None) -> ScaleError:
    whose = "a tensor" if expert is None else "an expert"
    return ScaleError(
        "block scales are NaN",
        module=module,
        name=name if expert is None else f"{name}, expert {expert}",
        expected="finite e4m3 values",
        found=f"NaN, as ModelOpt writes for {whose} of zeros",
        remedy="Exclude this module from quantization and export again."
        if expert is None
        else "Store zeros instead, and 1.0 as its weight global scale: it then gives zeros.",
    )
