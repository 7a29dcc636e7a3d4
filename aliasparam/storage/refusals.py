"""What a storage says when it refuses."""

from __future__ import annotations

from ..errors import MemoryFreedError, StateError
from ..layout.boxes import shown
from .states import RegionStates, State


def freed(label: str, expected: int, found: int) -> MemoryFreedError:
    return MemoryFreedError(
        "the memory of this name was freed",
        label=label,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        remedy="Call aliasparam.invalidate(model) before memory is lent; have it back at its address, and load again.",
    )


def exposed(label: str, doing: str, writer: str) -> StateError:
    return StateError(
        f"cannot {doing}: the raw bytes are exposed to {writer}",
        label=label,
        expected="written() or abandon() of the exposure first",
        found="an open exposure",
        remedy="Close it, or leave its `with` block.",
    )


def not_loaded(label: str, states: RegionStates, doing: str, region: int | None) -> StateError:
    region = min(states.missing) if region is None else region
    state, count = states.of(region), states.count
    missing = ", ".join(shown(box) for box in states.missing_boxes(region)[:3]) if state is State.PARTIAL else ""
    what = f"{state.value}: {states.why}" if states.why and state is State.INVALID else state.value
    return StateError(
        f"{doing}: region {region} of {count} is {state.value!r}" if count > 1 else f"{doing}: it is {state.value!r}",
        label=label,
        expected="every element of the tensor written",
        found=f"{what}, without {missing}" if missing else what,
        remedy="Load every shard of this tensor first.",
    )
