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
from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

from ..layout.boxes import whole
from .coverage import Box, Coverage


class State(Enum):
    EMPTY = "empty"
    PARTIAL = "partly written"
    LOADED = "loaded"
    INVALID = "invalid"
    FOREIGN = "kernel bytes whose order was not declared"

    __hash__ = object.__hash__  # compared on every write: the hash of an Enum's name is slow


_INVALID = State.INVALID  # for every write: Python 3.11 looks a member of an Enum up by its name each time

#: The regions of one write, and those of them that were not LOADED before.
Begun: TypeAlias = tuple[Sequence[int], dict[int, State]]


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
        self.count = count
        self._whole = whole(self._core)
        #: When the bytes of each region were last put in question: whoever keeps these knows which regions were written since.
        self.writes = [0] * count
        self.clock = 0
        self._arrived: dict[int, Coverage] = {}
        #: What made regions INVALID, where that is not plain.
        self.why: str | None = None

    @property
    def common(self) -> State | None:
        """The state of all regions, or None where they differ. No regions are LOADED."""
        if not self.missing:
            return State.LOADED
        found = set(self.missing.values())
        return found.pop() if len(self.missing) == self.count and len(found) == 1 else None

    @property
    def each(self) -> list[State]:
        """The state of every region, in order."""
        return [self.of(region) for region in range(self.count)]

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

    def begin(self, box: Box) -> Begun:
        """Bytes under ``box`` are about to change. Returns what :meth:`arrived` or :meth:`rollback` need."""
        return self.begin_regions(self.regions(box))

    def begin_regions(self, regions: Sequence[int]) -> Begun:
        """:meth:`begin` for some bytes of these regions."""
        missing = self.missing
        before = {r: missing[r] for r in regions if r in missing} if missing else {}
        self.clock += 1
        if len(regions) == 1:
            missing[regions[0]] = _INVALID
            self.writes[regions[0]] = self.clock
        else:
            missing.update(dict.fromkeys(regions, _INVALID))
            for region in regions:
                self.writes[region] = self.clock
        return regions, before

    def arrived(self, box: Box, begun: Begun) -> None:
        """Every element under ``box`` was written, in all regions that were begun: which ones ``box`` names does not matter."""
        core, (regions, before) = box[self._lead :], begun
        for region in regions:
            if region not in before:
                del self.missing[region]
            elif self._add(region, before[region], core):
                del self.missing[region]
                self._arrived.pop(region, None)
            else:
                self.missing[region] = State.PARTIAL

    def rollback(self, begun: Begun) -> None:
        """No byte was changed after all."""
        regions, before = begun
        for region in regions:
            self._put(region, before.get(region, State.LOADED))

    def _add(self, region: int, state: State, core: Box) -> bool:
        if core == self._whole:
            return True
        coverage = self._arrived.get(region)
        if coverage is None or state is not State.PARTIAL:
            coverage = self._arrived[region] = Coverage(self._core)
        coverage.take(core)
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
        return [self._whole] if coverage is None else coverage.missing()

    def put_all(self, state: State, why: str | None = None) -> None:
        """One state for every region that has elements."""
        if math.prod(self._core):
            for region in range(self.count):
                self._put(region, state)
        self.clock += 1
        self.writes = [self.clock] * self.count
        self._arrived.clear()
        self.why = why

    def _put(self, region: int, to: State) -> None:
        if to is State.LOADED:
            self.missing.pop(region, None)
        else:
            self.missing[region] = to
