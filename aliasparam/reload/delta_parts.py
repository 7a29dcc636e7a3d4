"""Digests of tensors that several processes hold in parts: adler32 is a sum over positions, so parts add up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .delta_folder import DeltaFolder
from .delta_held import Part, Places, fits
from .digest import PositionalAdler32
from .errors import DeltaError
from .hashers import Digest
from .live import Live


class _Held(NamedTuple):
    digest: Digest
    nbytes: int


class PartDigests:
    """What this process has summed of each tensor that is held in parts."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._held: dict[str, _Held] = {}

    def part_of(self, name: str, live: Live) -> Part | None:
        """
        Raises:
            DeltaError: the live tensor is another part.
        """
        part = self._places.parts.get(name)
        if part is not None and not fits(live, part):
            expected = f"{part.box} of {list(part.shape)}"
            raise DeltaError("the live tensor is not this part", name=name, expected=expected, found=str(list(live.shape)))
        return part

    def digest(self, name: str, part: Part | None, last: DeltaFolder, itemsize: int) -> Digest:
        """
        Raises:
            DeltaError: a part, and a checksum that parts do not add up to.
        """
        digest = Digest(last.checksum_format)
        if part is None:
            return digest
        if digest.sums is None:
            raise DeltaError(
                "this checksum cannot be verified where a tensor is held in parts",
                name=f"{last.path}: {name}",
                expected="adler32, a sum over positions that processes add up",
                found=last.checksum_format,
                remedy="Publish with checksum_format adler32, or a full version.",
            )
        self._held[name] = _Held(digest, math.prod(part.shape) * itemsize)
        return digest

    def check(self, deltas: list[DeltaFolder]) -> None:
        """Every process calls it, with the same deltas, after its last tensor.

        Raises:
            DeltaError: the parts of all processes together are not what was promised.
        """
        last = {name: delta for delta in deltas for name in delta.checksums}
        names = sorted(last.keys() & set(self._places.divided))
        if not names:
            return
        rows = torch.zeros(len(names), 3, dtype=torch.int64)
        for row, name in zip(rows, names, strict=True):
            sums = self._held[name].digest.sums if name in self._held else None
            if sums is not None:
                row.copy_(torch.tensor([sums.count, *sums.sums()]))
        if self._places.add_up is not None:
            self._places.add_up(rows)
        for name, (count, plain, weighted) in zip(names, rows.tolist(), strict=True):
            if name in self._held:
                total = PositionalAdler32()
                total.merge_sums(count, (plain, weighted))
                last[name].check(name, total.hexdigest(self._held[name].nbytes))
