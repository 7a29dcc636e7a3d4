"""Writing delta folders, tensor by tensor and in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from .delta import ENCODINGS, PIECE
from .digest import Digest, optional
from .errors import DeltaError
from .held_file import memory_of
from .sources import SafetensorsFolder

_SPOOL = 16 << 20


class DeltaWriter:
    """A delta version in the making: :meth:`add` each tensor, then leave the ``with`` block. ``out`` appears whole or not at all.

    Args:
        out: the folder to make (``.../weight_v000007``); it must not exist, or be empty.
        version, base_version: what the delta makes, of what.
        encoding: "xor" (as long as the tensor, compresses to what changed) or "overwrite" (positions and bytes; tensors < 4 GiB).
        checksum_format: "xxh3-128", "blake3" or "adler32".
        level: of zstd.
        max_shard_bytes: a file is closed when it has as many bytes.

    Raises:
        DeltaError: an unknown encoding or format, versions out of order, ``out`` is there already.
    """

    def __init__(
        self,
        out: str | Path,
        version: int,
        base_version: int,
        *,
        encoding: str = "xor",
        checksum_format: str = "xxh3-128",
        level: int = 1,
        max_shard_bytes: int = 4 << 30,
    ) -> None:
        self.out = Path(out)
        if encoding not in ENCODINGS:
            raise DeltaError("unknown delta_encoding", expected=" or ".join(ENCODINGS), found=repr(encoding)[:80])
        Digest(checksum_format)  # refuses what is none
        if not 0 <= base_version < version:
            raise DeltaError("versions out of order", name=str(out), expected="0 <= base_version < version")
        if self.out.is_symlink() or (self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))):
            raise DeltaError("the folder is there already", name=str(out), remedy="Versions are never changed: write a new one.")
        self._index: dict[str, Any] = {
            "version": f"{version:06d}",
            "base_version": f"{base_version:06d}",
            "delta_encoding": encoding,
            "compression_format": "zstd",
            "checksum_format": checksum_format,
        }
        self._level, self._max_shard_bytes = level, max_shard_bytes
        self._made = self.out.with_name(f".{self.out.name}.{os.getpid()}.tmp")
        self._data: IO[bytes] | None = None
        self._entries: dict[str, tuple[int, int, str]] = {}  # of the shard in the making: begin, end, checksum
        self._shards: list[list[str]] = []

    def __enter__(self) -> Self:
        try:
            self._made.mkdir(parents=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.out)) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            try:
                if self._data is not None:
                    self._data.close()  # which writes what is buffered, and fails on a full disk
            finally:
                shutil.rmtree(self._made, ignore_errors=True)

    def add(self, name: str, nbytes: int, chunks: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """One tensor from (old bytes, new bytes): uint8 [n] of equal length each, on the host, together ``nbytes``, in order.

        Returns whether anything changed; a tensor that did not is left out.

        Raises:
            DeltaError: chunks of other lengths; a tensor of 4 GiB or more as ``overwrite``; a name twice.
        """
        if name in self._entries or any(name in shard for shard in self._shards):
            raise DeltaError("a tensor is written twice", name=name)
        if self._data is None:
            self._data = tempfile.TemporaryFile(dir=self._made)  # noqa: SIM115 - closed with its shard
        digest = Digest(self._index["checksum_format"])
        begin = self._data.tell()
        encode = _encode_xor if self._index["delta_encoding"] == "xor" else _encode_overwrite
        compressor = optional("zstandard").ZstdCompressor(level=self._level)
        changed = False
        try:
            changed = encode(_checked(chunks, nbytes, name, digest), nbytes, name, compressor, self._data)
        finally:
            if not changed:
                self._data.seek(begin)
                self._data.truncate()
        if not changed:
            return False
        self._entries[name] = (begin, self._data.tell(), digest.hexdigest(nbytes))
        if self._data.tell() >= self._max_shard_bytes:
            self._close_shard()
        return True

    def _close_shard(self) -> None:
        """The collected data behind the header that describes it."""
        if self._data is None or not self._entries:
            return
        header: dict[str, Any] = {"__metadata__": {name: checksum for name, (_, _, checksum) in self._entries.items()}}
        for name, (begin, end, _) in self._entries.items():
            header[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with (self._made / str(len(self._shards))).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, PIECE)
            _to_disk(file)
        self._shards.append(list(self._entries))
        self._data.close()
        self._data, self._entries = None, {}

    def _publish(self) -> None:
        self._close_shard()
        weight_map = {}
        for number, names in enumerate(self._shards):
            shard = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.rename(self._made / str(number), self._made / shard)
            weight_map.update(dict.fromkeys(names, shard))
        if self._data is not None:  # nothing changed
            self._data.close()
        with (self._made / "model.safetensors.index.json").open("wb") as file:
            file.write(json.dumps({"metadata": self._index, "weight_map": weight_map}, indent=2).encode())
            _to_disk(file)
        os.rename(self._made, self.out)


def diff(
    a: SafetensorsFolder, b: SafetensorsFolder, out: str | Path, version: int, base_version: int, **options: Any
) -> tuple[int, int]:
    """Write the delta that makes checkpoint ``b`` of checkpoint ``a``; (changed tensors, all tensors).

    Both are read once, in pieces of 1 MiB. ``options`` are :class:`DeltaWriter`'s.

    Raises:
        DeltaError: the two do not have the same names, dtypes and shapes (then a full version is what to publish).
        SourceError: a file cannot be read, or changed meanwhile. Nothing is published then.
    """
    check_same(*((str(one.path), {n: (e.dtype, e.shape) for n, e in one.tensors.items()}) for one in (a, b)))
    old, new = (torch.empty(PIECE, dtype=torch.uint8) for _ in range(2))

    def chunks(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        nbytes = b.entry(name).nbytes
        for start in range(0, nbytes, PIECE):
            pair = (old[: min(PIECE, nbytes - start)], new[: min(PIECE, nbytes - start)])
            a.raw(name, start, pair[0])
            b.raw(name, start, pair[1])
            yield pair

    with DeltaWriter(out, version, base_version, **options) as writer:
        changed = sum(writer.add(name, entry.nbytes, chunks(name)) for name, entry in b.tensors.items())
        a.check_unchanged()
        b.check_unchanged()
    return changed, len(b.tensors)


def check_same(*two: tuple[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]) -> None:
    """
    Args:
        two: what a checkpoint is called, and (dtype, shape) of its tensors by name.

    Raises:
        DeltaError: they do not have the same tensors.
    """
    (a, old), (b, new) = two
    for name in sorted(old.keys() ^ new.keys()):
        found, remedy = f"in {a if name in old else b}", "Publish a full version."
        raise DeltaError("a tensor is in one checkpoint only", name=name, found=found, remedy=remedy)
    for name, spec in old.items():
        if spec != new[name]:
            expected, found = (f"{dtype} {list(shape)}" for dtype, shape in (spec, new[name]))
            raise DeltaError(
                "a tensor has another dtype or shape", name=name, expected=expected, found=found, remedy="Publish a full version."
            )


def _checked(chunks: Iterable[tuple[Tensor, Tensor]], nbytes: int, name: str, digest: Digest) -> Iterator[tuple[Tensor, Tensor]]:
    """The chunks, while their new bytes are hashed and their lengths counted."""
    count = 0
    for old, new in chunks:
        memory_of(new)  # refuses what is not plain bytes
        digest.add(new, count)
        count += new.numel()
        if old.numel() != new.numel() or count > nbytes:
            break
        yield old, new
    else:
        if count == nbytes:
            return
    raise DeltaError(
        "chunks of other lengths", name=name, expected=f"old and new bytes, {nbytes} in all", found=f"{count} at least"
    )


def _encode_xor(chunks: Iterator[tuple[Tensor, Tensor]], nbytes: int, name: str, compressor: Any, out: IO[bytes]) -> bool:
    changed = False
    # receivers decompress in one go, for which the frame must say how long it is
    frame = compressor.stream_writer(out, size=nbytes, closefd=False)
    for old, new in chunks:
        difference = old ^ new
        changed = changed or bool(difference.any())
        frame.write(memory_of(difference))
    frame.close()
    return changed


def _encode_overwrite(chunks: Iterator[tuple[Tensor, Tensor]], nbytes: int, name: str, compressor: Any, out: IO[bytes]) -> bool:
    if nbytes >= 1 << 32:
        raise DeltaError("a tensor too large for positions of 32 bits", name=name, found=f"{nbytes} bytes", remedy="Use xor.")
    start = count = 0
    with tempfile.SpooledTemporaryFile(_SPOOL) as places, tempfile.SpooledTemporaryFile(_SPOOL) as values:
        for old, new in chunks:
            where = (old != new).nonzero().view(-1)
            places.write(_little_endian(where + start))
            values.write(memory_of(new[where]))
            start, count = start + new.numel(), count + where.numel()
        if count == 0:
            return False
        with compressor.stream_writer(out, size=4 + 5 * count, closefd=False) as frame:
            frame.write(struct.pack("<I", count))
            for spool in (places, values):
                spool.seek(0)
                shutil.copyfileobj(spool, frame, PIECE)
    return True


def _little_endian(positions: Tensor) -> bytes:
    """int64 [n] below 2**32 as u32."""
    raw = torch.stack([(positions >> shift & 0xFF) for shift in (0, 8, 16, 24)], 1).to(torch.uint8).view(-1)
    return bytes(memory_of(raw))


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
