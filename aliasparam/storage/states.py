"""What has arrived in each region of a storage.

    EMPTY ──write──▶ PARTIAL ──every element written──▶ LOADED ──write──▶ LOADED
                        ▲                                  │
                        └── write ── INVALID ◀── fail, interrupt, sleep, foreign write (from any state)

    EMPTY     allocated, never written         reading refuses
    PARTIAL   some elements written            what was written can be read
    LOADED    every element written
    INVALID   nobody knows what the bytes are  reading refuses until the region is written whole again
    FOREIGN   kernel bytes of undeclared code  the kernel name is right; reading refuses as in INVALID (see ported.py)

A region is INVALID while its bytes are being written, so an interrupt between any two lines leaves a refusal.
"""

from __future__ import annotations

import math
from enum import Enum

from .coverage import Box, Coverage


class State(Enum):
    EMPTY = "empty"
    PARTIAL = "partly written"
    LOADED = "loaded"
    INVALID = "invalid"
    FOREIGN = "kernel bytes whose order was not declared"

    __hash__ = object.__hash__  # compared on every write: the hash of an Enum's name is slow


class RegionStates:
    """The state of every region of one storage, and which elements of the PARTIAL ones have arrived.

    Args:
        shape: of the checkpoint tensor; the first ``lead`` dims count regions.
        lead: how many dims count regions.
        state: of every region at the start. Regions without elements are LOADED whatever it is.
    """

    def __init__(self, shape: tuple[int, ...], lead: int, state: State) -> None:
        self._lead = lead
        self._outer, self._core = shape[:lead], shape[lead:]
        count = math.prod(self._outer)
        if math.prod(self._core) == 0:
            state = State.LOADED
        #: Regions which are not LOADED, with what they are: one entry changes by one assignment, so an interrupt leaves no doubt.
        self.missing: dict[int, State] = {} if state is State.LOADED else dict.fromkeys(range(count), state)
        self._count = count
        #: How often the bytes of each region were put in question: whoever keeps these knows which regions were written since.
        self.writes = [0] * count
        self._arrived: dict[int, Coverage] = {}
        #: What made regions INVALID, where that is not plain.
        self.why: str | None = None

    @property
    def common(self) -> State | None:
        """The state of all regions, or None where they differ. No regions are LOADED."""
        if not self.missing:
            return State.LOADED
        found = set(self.missing.values())
        return found.pop() if len(self.missing) == self._count and len(found) == 1 else None

    @property
    def each(self) -> list[State]:
        """The state of every region, in order."""
        return [self.of(region) for region in range(self._count)]

    def of(self, region: int) -> State:
        return self.missing.get(region, State.LOADED)

    def regions(self, box: Box) -> range | list[int]:
        """The numbers of the regions which a box of the whole tensor touches."""
        for start, stop in box:
            if start >= stop:
                return range(0)
        if self._lead == 0:
            return range(1)
        if self._lead == 1:
            return range(*box[0])
        found = [0]
        for (start, stop), size in zip(box[: self._lead], self._outer, strict=True):
            found = [r * size + i for r in found for i in range(start, stop)]
        return found

    def begin(self, box: Box) -> list[tuple[int, State]]:
        """Bytes under ``box`` are about to change. Returns what :meth:`arrived` or :meth:`undo` need."""
        before = [(r, self.of(r)) for r in self.regions(box)]
        for region, _ in before:
            self.writes[region] += 1
            self._put(region, State.INVALID)
        return before

    def arrived(self, box: Box, before: list[tuple[int, State]]) -> None:
        """Every element under ``box`` was written."""
        core = box[self._lead :]
        for region, state in before:
            if state is State.LOADED or self._add(region, state, core):
                self._put(region, State.LOADED)
                self._arrived.pop(region, None)
            else:
                self._put(region, State.PARTIAL)

    def undo(self, before: list[tuple[int, State]]) -> None:
        """No byte was changed after all."""
        for region, state in before:
            self._put(region, state)

    def _add(self, region: int, state: State, core: Box) -> bool:
        coverage = self._arrived.get(region)
        if coverage is None or state is not State.PARTIAL:
            coverage = self._arrived[region] = Coverage(self._core)
        coverage.add(core)
        return coverage.whole

    def readable(self, box: Box) -> int | None:
        """None where every element under ``box`` has arrived; else the first region which lacks some."""
        for region in self.regions(box):
            state = self.of(region)
            if state is State.LOADED or (state is State.PARTIAL and self._arrived[region].covers(box[self._lead :])):
                continue
            return region
        return None

    def missing_boxes(self, region: int) -> list[Box]:
        """What has not arrived of one region, in its own coordinates."""
        coverage = self._arrived.get(region) if self.of(region) is State.PARTIAL else None
        return [tuple((0, n) for n in self._core)] if coverage is None else coverage.missing()

    def put_all(self, state: State, why: str | None = None) -> None:
        """One state for every region that has elements."""
        if math.prod(self._core):
            for region in range(self._count):
                self._put(region, state)
        self.writes = [count + 1 for count in self.writes]
        self._arrived.clear()
        self.why = why

    def _put(self, region: int, to: State) -> None:
        if to is State.LOADED:
            self.missing.pop(region, None)
        else:
            self.missing[region] = to
