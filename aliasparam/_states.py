"""The states of a storage's regions, and the only place where they change.

[Note: state] Each region is in one state, and its bytes mean nothing without it:

    EMPTY ──write──▶ PARTIAL ──all bytes written──▶ CHECKPOINT ──process──▶ KERNEL
      │                 ▲ │                            ▲ │                    │ │
      │                 │ │       INVALID ──load──▶────┤ │                    │ │
      │                 │ │        ▲ │                 │ └──── fail ──▶ INVALID │
      └──write whole────┼─┼────────┼─┼────────────────▶┘                    │ │
                        │ └─ fail ─┘ │                 └──── write, restore ──┘ │
                        ├────write───┘                                          │
                        └──────────── write whole, or without an inverse ───────┘

    EMPTY       allocated, never written          names refuse to be read
    PARTIAL     some checkpoint bytes written     only what was written can be read
    CHECKPOINT  checkpoint-format bytes           checkpoint names are plain memory; kernel names are stale
    KERNEL      kernel-format bytes               kernel names are plain memory; checkpoint names read a converted copy
    INVALID     a failed load, write or conversion, sleep, or a kernel name written by other code
                                                  everything refuses until it is written whole again

Any state may become INVALID. A move that nothing followed may be taken back (see :meth:`RegionStates.set_known`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from .errors import StateError


class State(Enum):
    EMPTY = "empty"
    PARTIAL = "partly written"
    CHECKPOINT = "checkpoint format"
    KERNEL = "kernel format"
    INVALID = "invalid"

    __hash__ = object.__hash__  # counted by state on every write: the hash of an Enum's name is slow


#: The legal moves; `RegionStates.move` is their only executor.
_MOVES: dict[State, frozenset[State]] = {
    State.EMPTY: frozenset({State.PARTIAL, State.CHECKPOINT, State.INVALID}),
    State.PARTIAL: frozenset({State.CHECKPOINT, State.KERNEL, State.INVALID}),
    State.CHECKPOINT: frozenset({State.CHECKPOINT, State.KERNEL, State.INVALID}),
    State.KERNEL: frozenset({State.KERNEL, State.CHECKPOINT, State.PARTIAL, State.INVALID}),
    State.INVALID: frozenset({State.PARTIAL, State.CHECKPOINT, State.INVALID}),
}


class RegionStates:
    """The state of every region, counted, so that asking for all of them costs nothing."""

    def __init__(self, regions: int, state: State) -> None:
        self.each = [state] * regions
        self._counts = dict.fromkeys(State, 0)
        self._counts[state] = regions

    def all_are(self, state: State) -> bool:
        return self._counts[state] == len(self.each)

    def any_is(self, state: State) -> bool:
        return self._counts[state] > 0

    @property
    def common(self) -> State | None:
        """The state of all regions, or None where they differ. No regions are in checkpoint format."""
        first = self.each[0] if self.each else State.CHECKPOINT
        return first if self.all_are(first) else None

    def move(self, regions: Sequence[int], to: State, doing: str, label: str) -> None:
        """Change state: the only place. Refuses illegal moves before any is made."""
        each = self.each
        for region in regions:
            if to not in _MOVES[each[region]]:
                raise StateError(
                    f"cannot {doing}: region {region} is {each[region].value!r}",
                    label=label,
                    expected=f"a state from which {to.value!r} can be reached",
                    found=each[region].value,
                    remedy="Load the whole tensor first.",
                )
        for region in regions:
            self._put(region, to)

    def set_known(self, changes: Iterable[tuple[int, State]]) -> None:
        """Set states without a move: one that nothing followed is taken back, or kernel bytes came whole from elsewhere."""
        for region, state in changes:
            self._put(region, state)

    def _put(self, region: int, to: State) -> None:
        self._counts[self.each[region]] -= 1
        self._counts[to] += 1
        self.each[region] = to
