"""A folder of safetensors files as a source of new weights: opened once, read by byte ranges, and unchanged at the end."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout.boxes import Box, tiles
from .errors import SourceError
from .header import MAX_JSON_BYTES, Entry, parse_json, read_header
from .held_file import HeldFile, Opened

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: Parts of a buffer: one piece is used while the others are read, as one thread reads slower than a disk or a GPU takes.
_SLOTS = 4
#: Each begins at a multiple of this, which every element width divides.
_ALIGNED = 64


class SafetensorsFolder(Opened):
    """The tensors of a checkpoint folder (``model.safetensors``, or shards with an index).

    Opening reads and checks headers alone, and keeps one file object a shard until :meth:`close`; what is read later comes
    from these files, whatever happens to their names. :meth:`check_unchanged` says at the end whether they are still the
    folder's files, unwritten. A context manager; an object that is dropped closes its files too.

    Attributes:
        tensors: what there is, by name.
        metadata: ``__metadata__`` of every file, by file name.
        index_metadata: ``metadata`` of the index ({} without one).
        bytes_read: bytes of tensors handed out so far.

    Raises:
        SourceError: names the file, and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.metadata: dict[str, dict[str, str]] = {}
        self.index_metadata: dict[str, Any] = {}
        self.bytes_read = 0
        with self.opening():
            self.tensors: Mapping[str, Entry] = self._open()

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """One tensor, or a box of it, in memory of its own (on the host). Of the rest of it no bytes are read.

        Raises:
            SourceError: no such tensor or part; the file was truncated or cannot be read.
        """
        entry = self.entry(name)
        values = entry.read(entry.checked(box))
        self.bytes_read += values.nbytes
        return values

    def stream(self, parts: Iterable[tuple[str, Box | None]], buffer: Tensor) -> Iterator[tuple[int, Box, Tensor]]:
        """(index in ``parts``, box, its values) of many tensors, or boxes of them, in order and read ahead.

        Use a piece before asking for the next one: its memory is read into again.

        Args:
            parts: (name, box; None: the whole tensor). All are checked before the first is read.
            buffer: uint8 [n], contiguous, on the host (pinned, for copies to a device); n at least one element. A piece is at
                most a quarter of it, and three are read while one is used; of less than 256 bytes, all of it.

        Raises:
            SourceError: as :meth:`read`; the buffer is something else.
        """
        wanted = [(entry := self.entry(name), entry.checked(box)) for name, box in parts]
        _check_buffer(buffer, (entry for entry, _ in wanted))
        each = buffer.numel() // _SLOTS // _ALIGNED * _ALIGNED
        slots = [buffer[i * each : (i + 1) * each] for i in range(_SLOTS)] if each else [buffer]
        coming: deque[tuple[int, Box, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(len(slots)) as readers:
            for slot, (index, entry, piece) in zip(itertools.cycle(slots), _pieces(wanted, slots[0].numel()), strict=False):
                if len(coming) == len(slots):  # the first is used before its slot takes the next
                    yield self._counted(*coming.popleft())
                coming.append((index, piece, readers.submit(entry.read, piece, slot)))
            while coming:
                yield self._counted(*coming.popleft())

    def entry(self, name: str) -> Entry:
        """
        Raises:
            SourceError: no tensor of this name.
        """
        found = self.tensors.get(name)
        if found is None:
            raise SourceError("the checkpoint has no tensor of this name", name=f"{self.path}: {name}")
        return found

    def _counted(self, index: int, box: Box, coming: Future[Tensor]) -> tuple[int, Box, Tensor]:
        values = coming.result()
        self.bytes_read += values.nbytes
        return index, box, values

    # -- opening -------------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> HeldFile:
        return self.hold(HeldFile(self.path / name, self.path))

    def _open(self) -> dict[str, Entry]:
        if "\0" in str(self.path) or not self.path.is_dir():
            raise SourceError("this is not a folder", name=str(self.path)[:200], expected="a checkpoint folder")
        if not lexists(self.path / _INDEX):
            return self._tensors_of([_SINGLE])
        weight_map = self._weight_map(self._file(_INDEX))
        entries = self._tensors_of(sorted(set(weight_map.values())))
        for name, shard in weight_map.items():
            if name not in entries or entries[name].file.path.name != shard:
                found = f"in {entries[name].file.path.name}" if name in entries else "in no shard"
                where = f"{self.path / _INDEX}: {name}"
                raise SourceError("the index and its shards disagree", name=where, expected=f"in {shard}", found=found)
        return entries

    def _tensors_of(self, shards: list[str]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for shard in shards:
            found, self.metadata[shard] = read_header(self._file(shard))
            for entry in found:
                if entry.name in entries:
                    both = f"{entries[entry.name].file.path.name} and {shard}"
                    raise SourceError("a tensor is in two shards", name=f"{self.path}: {entry.name}", found=both)
                entries[entry.name] = entry
        return entries

    def _weight_map(self, index: HeldFile) -> dict[str, str]:
        """Tensor name to shard; every shard a plain file name, and nothing opened yet."""
        fields = parse_json(index.read_all(MAX_JSON_BYTES), index.path)
        weight_map, self.index_metadata = fields.get("weight_map"), fields.get("metadata", {})
        if not isinstance(self.index_metadata, dict):
            found = repr(self.index_metadata)[:80]
            raise SourceError("metadata of the index is no object", name=str(index.path), expected="an object", found=found)
        if (
            not isinstance(weight_map, dict)
            or not all(isinstance(shard, str) for shard in weight_map.values())
            or not (weight_map or "delta_encoding" in self.index_metadata)  # a delta may say that nothing changed
        ):
            raise SourceError(
                "the index says of no tensor where it is",
                name=str(index.path),
                expected="a weight_map from tensor names to file names",
                found=repr(weight_map)[:80],
                remedy="Copy or export the checkpoint again.",
            )
        for name, shard in weight_map.items():
            if not _is_plain(shard):
                where = f"{index.path}: {name[:120]}"
                found = repr(shard[:80])
                raise SourceError(
                    "a shard's name is not a plain file name", name=where, expected="a file in the folder", found=found
                )
        return weight_map


def _check_buffer(buffer: Tensor, entries: Iterable[Entry]) -> None:
    element = max((entry.dtype.itemsize for entry in entries), default=1)
    is_plain = buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous() and buffer.device.type == "cpu"
    if not is_plain or buffer.numel() < element or buffer.data_ptr() % element:
        raise SourceError(
            "a buffer for pieces is bytes, has room for one element, and is aligned to it",
            expected=f"uint8 [n], contiguous, on the host, at least {element} bytes at a multiple of {element}",
            found=f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}",
        )


def _pieces(wanted: Iterable[tuple[Entry, Box]], most_bytes: int) -> Iterator[tuple[int, Entry, Box]]:
    for index, (entry, box) in enumerate(wanted):
        for piece in list(tiles(box, most_bytes // entry.dtype.itemsize)) or [box]:  # of what is empty, itself
            yield index, entry, piece


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name.encode()) <= 255
