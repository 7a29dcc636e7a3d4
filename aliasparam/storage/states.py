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

from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

from ..layout import BoundLayout
from .coverage import Box, Coverage


class State(Enum):
    EMPTY = "empty"
    PARTIAL = "partly written"
    LOADED = "loaded"
    INVALID = "invalid"
    FOREIGN = "kernel bytes whose order was not declared"

    __hash__ = object.__hash__  # compared on every write: the hash of an Enum's name is slow


_INVALID = State.INVALID  # for every write: Python 3.11 looks a member of an Enum up by its name each time

#: What a region is that is not LOADED; a PARTIAL one is what has arrived of it.
Lacking: TypeAlias = State | Coverage
#: The regions of one write, and those of them that were not LOADED before.
Begun: TypeAlias = tuple[Sequence[int], dict[int, Lacking]]


class RegionStates:
    """The state of every region of one storage, and which elements of the PARTIAL ones have arrived.

    Args:
        bound: the layout, which says what the regions are.
        state: of every region at the start. Regions without elements are LOADED whatever it is.
    """

    def __init__(self, bound: BoundLayout, state: State) -> None:
        self._lead, self._outer, self._core = bound.lead, bound.shape[: bound.lead], bound.shape[bound.lead :]
        self._whole, self._has_elements, self.count = bound.whole[bound.lead :], bound.region_elements > 0, bound.regions
        #: Regions which are not LOADED, with what they are: one entry changes by one assignment, so an interrupt leaves no doubt.
        self.missing: dict[int, Lacking] = {}
        if state is not State.LOADED and self._has_elements:
            self.missing = dict.fromkeys(range(self.count), state)
        #: How often the bytes of each region were put in question: whoever keeps these knows which regions were written since.
        self.writes = [0] * self.count
        #: What made regions INVALID, where that is not plain.
        self.why: str | None = None

    @property
    def common(self) -> State | None:
        """The state of all regions, or None where they differ. No regions are LOADED."""
        if not self.missing:
            return State.LOADED
        found = {_state(lacking) for lacking in list(self.missing.values())}  # a forward asks while others write
        return found.pop() if len(self.missing) == self.count and len(found) == 1 else None

    @property
    def each(self) -> list[State]:
        """The state of every region, in order."""
        return [self.of(region) for region in range(self.count)]

    def of(self, region: int) -> State:
        return _state(self.missing.get(region, State.LOADED))

    def begin(self, box: Box) -> Begun:
        """Bytes under ``box`` are about to change. Returns what :meth:`arrived` or :meth:`rollback` need."""
        return self.begin_regions(self.under(box))

    def under(self, box: Box) -> Sequence[int]:
        """The regions that ``box`` touches."""
        return regions_under(box, self._outer)

    def begin_regions(self, regions: Sequence[int]) -> Begun:
        """:meth:`begin` for some bytes of these regions."""
        missing = self.missing
        before = {r: missing[r] for r in regions if r in missing} if missing else {}
        if len(regions) == 1:
            missing[regions[0]] = _INVALID
            self.writes[regions[0]] += 1
        else:
            missing.update(dict.fromkeys(regions, _INVALID))
            for region in regions:
                self.writes[region] += 1
        return regions, before

    def arrived(self, box: Box, begun: Begun) -> None:
        """Every element under ``box`` was written, in all regions that were begun: which ones ``box`` names does not matter."""
        core, (regions, before) = box[self._lead :], begun
        for region in regions:
            if before and region in before and core != self._whole:
                lacking = before[region]
                found = lacking if isinstance(lacking, Coverage) else Coverage(self._core)
                found.take(core)
                if not found.whole:
                    self.missing[region] = found
                    continue
            del self.missing[region]

    def rollback(self, begun: Begun) -> None:
        """No byte was changed after all."""
        regions, before = begun
        for region in regions:
            self._put(region, before.get(region, State.LOADED))

    def readable(self, box: Box) -> int | None:
        """None where every element under ``box`` has arrived; else the first region which lacks some."""
        for region in self.under(box):
            lacking = self.missing.get(region)
            if lacking is not None and not (isinstance(lacking, Coverage) and lacking.covers(box[self._lead :])):
                return region
        return None

    def missing_boxes(self, region: int) -> list[Box]:
        """What has not arrived of one region, in its own coordinates."""
        lacking = self.missing.get(region)
        return lacking.missing() if isinstance(lacking, Coverage) else [self._whole]

    def put_all(self, state: State, why: str | None = None) -> None:
        """One state for every region that has elements."""
        if self._has_elements:
            for region in range(self.count):
                self._put(region, state)
        self.writes = [count + 1 for count in self.writes]
        self.why = why

    def _put(self, region: int, to: Lacking) -> None:
        if to is State.LOADED:
            self.missing.pop(region, None)
        else:
            self.missing[region] = to


def regions_under(box: Box, outer: Sequence[int]) -> Sequence[int]:
    """The numbers of the regions, which the dims ``outer`` count, that a box of the whole tensor touches."""
    for start, stop in box:
        if start >= stop:
            return range(0)
    if len(outer) == 1:
        return range(*box[0])
    found = [0]
    for (start, stop), size in zip(box, outer, strict=False):
        found = [r * size + i for r in found for i in range(start, stop)]
    return found


def _state(lacking: Lacking) -> State:
    return lacking if isinstance(lacking, State) else State.PARTIAL
