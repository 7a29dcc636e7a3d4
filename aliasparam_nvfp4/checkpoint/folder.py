"""A folder of safetensors files: headers first, bytes only when asked, never a whole file in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aliasparam import TensorSpec

from .errors import CheckpointError
from .quant_config import read_json

#: How much of a file may be touched before it is closed and opened again (a larger piece is read by itself).
_MAPPED_BYTES = 8 << 20

#: All rows, or all columns.
WHOLE = slice(None)

_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


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
    shards is found before a single byte is loaded.

    Raises:
        CheckpointError: names the file, and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: Mapping[str, TensorEntry] = self._entries()
        #: Bytes of tensors that were read, for progress and for ranks which must read their own part alone.
        self.bytes_read = 0
        self._mapped: tuple[Path, Any, int] | None = None

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """One tensor, or rows (dim 0) and columns (dim 1) of it, in memory of its own. No other bytes are read.

        Raises:
            CheckpointError: no such tensor, or a part which it does not have.
        """
        entry = self._entry(name)
        part = entry.part(rows, columns)
        self.bytes_read += part.nbytes
        file = self._open(entry.file, part.nbytes)
        if part == entry.spec:
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]
        index = (rows, columns)[: len(entry.shape)]
        return file.get_slice(name)[index].clone()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of the mapped file. Reading afterwards opens it again."""
        if self._mapped is not None:
            self._mapped[1].__exit__(None, None, None)
            self._mapped = None

    def _open(self, path: Path, nbytes: int) -> Any:
        """The file from which ``nbytes`` are about to be read.

        Pages of a mapped file count as resident until it is closed, so it is opened afresh after every few MiB; not for each
        tensor, because that parses the header each time.
        """
        if self._mapped is None or self._mapped[0] != path or self._mapped[2] + nbytes > _MAPPED_BYTES:
            self.close()
            file = safe_open(path, framework="pt")
            self._mapped = (path, file.__enter__(), 0)  # type: ignore[no-untyped-call]
        _, file, count = self._mapped
        self._mapped = (path, file, count + nbytes)
        return file

    def chunks(
        self, name: str, max_bytes: int = 8 << 20, *, rows: slice = WHOLE, columns: slice = WHOLE
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of one tensor or of a part of it, each piece at most ``max_bytes`` (but at least one row).

        Rows are counted from where the part begins.
        """
        entry = self._entry(name)
        part = entry.part(rows, columns)
        if not entry.shape:
            yield 0, self.read(name)
            return
        begin, count = rows.start or 0, part.shape[0]
        step = max(1, max_bytes // max(part.nbytes // max(count, 1), 1))
        for first in range(0, count, step):
            yield first, self.read(name, slice(begin + first, begin + min(first + step, count)), columns)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError("the checkpoint has no tensor of this name", name=f"{self.path}: {name}")
        return entry

    # -- headers -------------------------------------------------------------------------------------------------------

    def _entries(self) -> dict[str, TensorEntry]:
        if not self.path.is_dir():
            raise CheckpointError("this is not a folder", name=str(self.path), expected="a checkpoint folder")
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return {e.name: e for e in _header(self.path / "model.safetensors")}
        weight_map = _weight_map(index)
        entries: dict[str, TensorEntry] = {}
        for file in sorted(set(weight_map.values())):
            for entry in _header(self.path / file):
                if entry.name in entries:
                    raise CheckpointError(
                        "a tensor is in two shards", name=entry.name, found=f"{entries[entry.name].file.name} and {file}"
                    )
                entries[entry.name] = entry
        for name, file in weight_map.items():
            if name not in entries or entries[name].file.name != file:
                raise CheckpointError(
                    "the index and its shards disagree",
                    name=f"{index}: {name}",
                    expected=f"in {file}",
                    found=f"in {entries[name].file.name}" if name in entries else "in no shard",
                )
        return entries


def _header(file: Path) -> list[TensorEntry]:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise CheckpointError("the file is missing", name=str(file), remedy="Copy or export the checkpoint again.") from None
    if not file.is_file():
        raise CheckpointError("this is not a file", name=str(file), expected="a safetensors file")
    header, data_start = _read_header(file, size)
    entries = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (begin, end) = _entry_fields(file, name, info)
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise CheckpointError("unknown dtype", name=f"{file}: {name}", found=kind)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                "a tensor's bytes do not match its shape",
                name=f"{file}: {name}",
                expected=f"{math.prod(shape) * dtype.itemsize} bytes",
                found=f"{end - begin} bytes",
            )
        if data_start + end > size:
            raise CheckpointError(
                "the file is truncated",
                name=f"{file}: {name}",
                expected=f"at least {data_start + end} bytes in the file",
                found=f"{size} bytes",
                remedy="Copy or export the checkpoint again.",
            )
        entries.append(TensorEntry(name, file, dtype, shape))
    try:
        with safe_open(file, framework="pt"):
            pass  # the library's own checks: overlaps, gaps, alignment
    except SafetensorError as error:
        raise CheckpointError(f"safetensors refuses the file: {error}", name=str(file)) from None
    return entries


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """(parsed header, offset of the data). Format: 8 bytes little-endian length, JSON, data."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(
                "the file is truncated or not a safetensors file",
                name=str(file),
                expected=f"a header of {length} bytes after the first 8",
                found=f"{size} bytes in the file",
            )
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise CheckpointError("the file is not a safetensors file: its header is not JSON", name=str(file)) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            "the file is not a safetensors file", name=str(file), expected="a JSON object as header", found=type(header).__name__
        )
    return header, 8 + length


def _entry_fields(file: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, data offsets) of one entry of a header."""
    fields = info if isinstance(info, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            "the file is not a safetensors file: an entry of its header is not one",
            name=f"{file}: {name}",
            expected="dtype, shape and data_offsets",
            found=repr(info)[:80],
        )
    return kind, tuple(shape), (offsets[0], offsets[1])


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and v >= 0 for v in value)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(
            "the index says of no tensor where it is",
            name=str(index),
            expected="a weight_map from tensor names to file names",
            found=repr(weight_map)[:80],
            remedy="Copy or export the checkpoint again.",
        )
    return weight_map
