"""Where a model holds what a delta changes: under other names, in parts, in other processes, or as other tensors.

Digests of tensors that several processes hold in parts add up: adler32 is a sum over positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..host import HOST
from ..layout.boxes import Box, row_major, sizes, tiles, whole, within
from .delta_folder import DeltaFolder
from .digest import Hashed, PositionalAdler32, new_digest
from .errors import DeltaError
from .live import Live
from .patch import PIECE


class Part(NamedTuple):
    """What this process holds of a tensor whose parts are in several.

    Attributes:
        shape: of the whole tensor, as files have it.
        box: this process's part of it.
    """

    shape: tuple[int, ...]
    box: Box


class Converted(Protocol):
    """Tensors of files that are others in the model, by a function that goes both ways.

    Attributes:
        sources: names in the files.
        targets: names in the model.
    """

    @property
    def sources(self) -> Collection[str]: ...

    @property
    def targets(self) -> Collection[str]: ...

    def revert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The files' tensors from the model's."""
        ...

    def convert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The model's tensors from the files'."""
        ...


#: Adds int64 [n, 3] up over all processes that hold parts, in place; each calls it once.
AddUp = Callable[[Tensor], None]


@dataclass(frozen=True)
class Places:
    """
    Attributes:
        names: name in the files -> name in the model, where they differ.
        parts: by the files' names, what is not whole here.
        divided: the files' names of all that is held in parts, the same in every process.
        elsewhere: the files' names of what this process holds nothing of, or nobody does.
        converted: tensors that are others in the model.
        add_up: how the digests of parts become those of tensors.
        inside: by the files' names, what lies whole, row by row, in larger tensors: (name in the model, rectangle of it) of each
            place. For deltas that begin with no full version.

    Raises:
        DeltaError: a part of a tensor that is not among ``divided``.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    divided: Collection[str] = ()
    elsewhere: Collection[str] = ()
    converted: Sequence[Converted] = ()
    add_up: AddUp | None = None
    inside: Mapping[str, Sequence[tuple[str, Box]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unverified := sorted(self.parts.keys() - set(self.divided)):
            raise DeltaError(
                "a tensor is held in parts, and not among those that all processes verify",
                name=unverified[0],
                expected="a name in `divided`, the same in every process",
            )

    def here(self, stored: str) -> str:
        return self.names.get(stored, stored)

    def where(self, stored: str) -> Sequence[tuple[str, Box | None]]:
        """(name in the model, rectangle of it or None) of every place."""
        return self.inside.get(stored) or [(self.here(stored), None)]


class Span(NamedTuple):
    """Some rows of a tensor: bytes that lie together in its files, of which this process has some.

    Attributes:
        start: first byte in the files.
        shape: of the rows in the files; bytes of an element are the last dim.
        box: in the live tensor.
        own: which of them are here; None: all.
    """

    start: int
    shape: tuple[int, ...]
    box: Box
    own: tuple[slice, ...] | None

    @property
    def nbytes(self) -> int:
        """In the files."""
        return math.prod(self.shape)

    def put(self, own: Tensor) -> Tensor:
        """uint8 [nbytes] with ``own`` in its place, and zeros beside it."""
        if self.own is None:
            return own
        rows = own.new_zeros(self.shape)
        rows[self.own].copy_(own.view(rows[self.own].shape))
        return rows.view(-1)

    def take(self, rows: Tensor) -> Tensor:
        """What is here of ``rows``, uint8 [nbytes]."""
        return rows if self.own is None else rows.view(self.shape)[self.own].reshape(-1)


def spans(live: Live, part: Part) -> Iterator[Span]:
    """All that is here, in the order of the files, in pieces of 2 MiB (of what is no whole rows at least one row), or 4 on a GPU,
    where a piece costs what its calls cost."""
    shape, box = part
    rows, strides, size = (*box[:1], *whole(shape[1:])), row_major(shape), live.dtype.itemsize
    most = (PIECE if live.device.type == "cpu" else 2 * PIECE) // size
    own = None
    if rows != box:
        own, most = (slice(None), *(slice(a, b) for a, b in box[1:])), max(most, strides[0])
    for tile in tiles(rows, max(most, 1)):
        start = sum(a * stride for (a, _), stride in zip(tile, strides, strict=True))
        here = *((a - box[0][0], b - box[0][0]) for a, b in tile[:1]), *(tile[1:] if own is None else whole(live.shape[1:]))
        yield Span(start * size, (*sizes(tile), size), here, own)


class PartDigests:
    """What this process has summed of each tensor that is held in parts.

    Attributes:
        held: its name -> sums of what is here, bytes of the whole tensor.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self.held: dict[str, tuple[PositionalAdler32, int]] = {}

    def part_of(self, name: str, live: Live) -> Part:
        """
        Raises:
            DeltaError: the live tensor is another part.
        """
        part = self._places.parts.get(name)
        if part is None:
            return Part(live.shape, live.box)
        if not (live.nbytes and within(part.box, part.shape) and sizes(part.box) == live.shape):
            expected = f"{part.box} of {list(part.shape)}"
            raise DeltaError("the live tensor is not this part", name=name, expected=expected, found=str(list(live.shape)))
        return part

    def digest(self, name: str, last: DeltaFolder, nbytes: int) -> PositionalAdler32 | Hashed:
        """
        Raises:
            DeltaError: a part, and a checksum that parts do not add up to.
        """
        digest = new_digest(last.checksum_format)
        if name not in self._places.parts:
            return digest
        if not isinstance(digest, PositionalAdler32):
            raise DeltaError(
                "this checksum cannot be verified where a tensor is held in parts",
                name=f"{last.path}: {name}",
                expected="adler32, a sum over positions that processes add up",
                found=last.checksum_format,
                remedy="Publish with checksum_format adler32, or a full version.",
            )
        self.held[name] = digest, nbytes
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
        held = [self.held[name][0] if name in self.held else PositionalAdler32() for name in names]
        rows = torch.tensor([[sums.count, *sums.sums()] for sums in held], device=HOST)
        if self._places.add_up is not None:
            self._places.add_up(rows)
        for name, (count, plain, weighted) in zip(names, rows.tolist(), strict=True):
            if name in self.held:
                total = PositionalAdler32()
                total.merge_sums(count, (plain, weighted))
                last[name].check(name, total.hexdigest(self.held[name][1]))
