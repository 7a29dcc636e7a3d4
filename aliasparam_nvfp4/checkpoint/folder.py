"""A folder of safetensors files: headers first, bytes only when asked, never a whole file in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aliasparam import TensorSpec
from aliasparam.layout.boxes import Box
from aliasparam.reload.errors import SourceError
from aliasparam.reload.sources import SafetensorsFolder

from .errors import CheckpointError
from .special import need_plain_files

#: All rows, or all columns.
WHOLE = slice(None)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def part(self, rows: slice = WHOLE, columns: slice = WHOLE) -> TensorSpec:
        """What rows (dim 0) and columns (dim 1) of the tensor are.

        Raises:
            CheckpointError: beyond the tensor's dims, or with steps.
        """
        shape = list(self.shape)
        for dim, (what, asked) in enumerate((("rows", rows), ("columns", columns))):
            if asked == WHOLE:
                continue
            size = shape[dim] if dim < len(shape) else 0
            begin, end = asked.start or 0, size if asked.stop is None else asked.stop
            if not 0 <= begin <= end <= size or asked.step not in (None, 1):
                raise CheckpointError(
                    f"the tensor does not have these {what}",
                    name=f"{self.file}: {self.name}",
                    expected=f"a range within {list(self.shape)}",
                    found=f"{what} {asked.start} to {asked.stop}",
                )
            shape[dim] = end - begin
        return TensorSpec(tuple(shape), self.dtype)


class CheckpointFolder:
    """The tensors of a checkpoint folder (``model.safetensors``, or shards with an index).

    Opening reads and checks headers alone: a truncated file, a shard that is missing or an index that disagrees with its
    shards is found before a single byte is loaded. The files are held open and read by ranges, never mapped: see
    :class:`aliasparam.reload.sources.SafetensorsFolder`.

    Raises:
        CheckpointError: names the file, and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        need_plain_files(self.path)
        with _as_checkpoint_error():
            self._source = SafetensorsFolder(path)
        self.tensors: Mapping[str, TensorEntry] = {
            name: TensorEntry(name, entry.file.path, entry.dtype, entry.shape) for name, entry in self._source.tensors.items()
        }

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read, for progress and for ranks which must read their own part alone."""
        return self._source.bytes_read

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """One tensor, or rows (dim 0) and columns (dim 1) of it, in memory of its own. No other bytes are read.

        Raises:
            CheckpointError: no such tensor, a part which it does not have, or a file that was truncated meanwhile.
        """
        box = self._box(self._entry(name), rows, columns)
        with _as_checkpoint_error():
            return self._source.read(name, box)

    def chunks(
        self, name: str, max_bytes: int = 8 << 20, *, rows: slice = WHOLE, columns: slice = WHOLE
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of one tensor or of a part of it, each piece at most ``max_bytes`` (but at least one row).

        Rows are counted from where the part begins. A part without rows is one piece.
        """
        entry = self._entry(name)
        part = entry.part(rows, columns)
        if not entry.shape:
            yield 0, self.read(name)
            return
        begin, count = rows.start or 0, part.shape[0]
        step = max(1, max_bytes // max(part.nbytes // max(count, 1), 1))
        for first in range(0, max(count, 1), step):
            yield first, self.read(name, slice(begin + first, begin + min(first + step, count)), columns)

    def stream(self, parts: Iterable[tuple[str, slice, slice]], buffer: Tensor) -> Iterator[tuple[int, Box, Tensor]]:
        """(index in ``parts``, box, values) of many tensors, or (name, rows, columns) of them, read ahead into ``buffer``.

        Boxes are counted from where the part begins. Otherwise as :meth:`aliasparam.reload.sources.SafetensorsFolder.stream`.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        boxes = [(name, self._box(self._entry(name), rows, columns)) for name, rows, columns in parts]
        with _as_checkpoint_error():
            for index, piece, values in self._source.stream(boxes, buffer):
                begin = boxes[index][1]
                yield index, tuple((a - first, b - first) for (a, b), (first, _) in zip(piece, begin, strict=True)), values

    def check_unchanged(self) -> None:
        """To be called after the last read, before what was read is served.

        Raises:
            CheckpointError: a file was replaced, truncated or written to since it was opened.
        """
        with _as_checkpoint_error():
            self._source.check_unchanged()

    def close(self) -> None:
        """Let go of the files. Nothing is read afterwards."""
        self._source.close()

    @staticmethod
    def _box(entry: TensorEntry, rows: slice, columns: slice) -> Box:
        entry.part(rows, columns)
        asked = (rows, columns)[: len(entry.shape)]
        box = [(s.start or 0, n if s.stop is None else s.stop) for s, n in zip(asked, entry.shape, strict=False)]
        return (*box, *((0, n) for n in entry.shape[2:]))

    def _entry(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError("the checkpoint has no tensor of this name", name=f"{self.path}: {name}")
        return entry


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        facts = {key: getattr(error, key) for key in ("module", "name", "expected", "found", "remedy")}
        raise CheckpointError(error.message, **facts) from None
