"""Writing delta folders, tensor by tensor; in memory are the compressed tensors of one file, twice while it is written."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

from ..host import host_bytes
from ..layout.bound import flat_bytes
from ..layout.boxes import tiles, whole
from .delta import ENCODINGS, PIECE
from .digest import Hashed, PositionalAdler32, new_digest, optional
from .errors import DeltaError
from .header import Entry
from .held_file import memory_of
from .live import Live
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
        max_shard_bytes: a file is written when it has as many bytes, which are in memory until then, and twice meanwhile.

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
        max_shard_bytes: int = 1 << 30,
    ) -> None:
        self.out = Path(out)
        if encoding not in ENCODINGS:
            raise DeltaError("unknown delta_encoding", expected=" or ".join(ENCODINGS), found=repr(encoding)[:80])
        new_digest(checksum_format)  # refuses what is none
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
        self._frames: dict[str, Tensor] = {}  # of the shard in the making
        self._checksums: dict[str, str] = {}
        self._held = self._files = 0  # bytes of them; files written
        self._shards: dict[str, int] = {}  # name -> number of its file

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
            shutil.rmtree(self._made, ignore_errors=True)

    def add(self, name: str, nbytes: int, chunks: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """One tensor from (old bytes, new bytes): uint8 [n] of equal length each, on the host, together ``nbytes``, in order.

        Returns whether anything changed; a tensor that did not is left out.

        Raises:
            DeltaError: chunks of other lengths; a tensor of 4 GiB or more as ``overwrite``; a name twice, ``__metadata__``, or
                half a surrogate pair.
        """
        if name in self._frames or name in self._shards:
            raise DeltaError("a tensor is written twice", name=name)
        if (text := name.encode(errors="replace").decode()) != name or name == "__metadata__":  # half a surrogate pair is no text
            raise DeltaError("no tensor of a safetensors file can have this name", name=text)
        digest, out = new_digest(self._index["checksum_format"]), io.BytesIO()
        encode = _encode_xor if self._index["delta_encoding"] == "xor" else _encode_overwrite
        compressor = optional("zstandard").ZstdCompressor(level=self._level)
        if not encode(_checked(chunks, nbytes, name, digest), nbytes, name, compressor, out):
            return False
        self._frames[name] = torch.frombuffer(out.getbuffer(), dtype=torch.uint8)
        self._checksums[name] = digest.hexdigest(nbytes)
        self._held += self._frames[name].numel()
        if self._held >= self._max_shard_bytes:
            self._close_shard()
        return True

    def _close_shard(self) -> None:
        if self._frames:
            _to_disk(self._made / str(self._files), save(self._frames, self._checksums))
            self._shards.update(dict.fromkeys(self._frames, self._files))
            self._frames, self._checksums, self._held, self._files = {}, {}, 0, self._files + 1

    def _publish(self) -> None:
        self._close_shard()
        shards = [f"model-{number:05d}-of-{self._files:05d}.safetensors" for number in range(self._files)]
        for number, shard in enumerate(shards):
            os.rename(self._made / str(number), self._made / shard)
        index = {"metadata": self._index, "weight_map": {name: shards[number] for name, number in self._shards.items()}}
        _to_disk(self._made / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
        os.rename(self._made, self.out)


#: What has tensors: an opened folder, or what a trainer holds by name, on any device.
Checkpoint: TypeAlias = SafetensorsFolder | Mapping[str, Tensor]


def diff(a: Checkpoint, b: Checkpoint, out: str | Path, version: int, base_version: int, **options: Any) -> tuple[int, int]:
    """Write the delta that makes checkpoint ``b`` of checkpoint ``a``; (changed tensors, all tensors).

    Each is an opened folder, or a trainer's tensors before or after a step. They are read once, in pieces of 1 MiB. ``options``
    are :class:`DeltaWriter`'s.

    Raises:
        DeltaError: the two do not have the same names, dtypes and shapes (then a full version is what to publish).
        SourceError: a file cannot be read, or changed meanwhile. Nothing is published then.
    """
    (before, old), (after, new) = (
        (str(one.path), one.tensors) if isinstance(one, SafetensorsFolder) else (step, one)
        for one, step in ((a, "the old step"), (b, "the new step"))
    )
    _need_same(before, after, old, new)
    buffers = [host_bytes(PIECE) for _ in range(2)]
    with DeltaWriter(out, version, base_version, **options) as writer:
        changed = 0
        for name, tensor in new.items():
            chunks = zip(_chunks(old[name], buffers[0]), _chunks(tensor, buffers[1]), strict=True)
            changed += writer.add(name, tensor.nbytes, chunks)
        for one in (a, b):
            if isinstance(one, SafetensorsFolder):
                one.check_unchanged()
    return changed, len(new)


def _chunks(tensor: Entry | Tensor, buffer: Tensor) -> Iterator[Tensor]:
    """All bytes, in order, on the host. Those of a file are read into ``buffer``."""
    if isinstance(tensor, Tensor):
        yield from (piece.cpu() for _, piece in Live(tensor).pieces(PIECE))
        return
    if 0 < tensor.nbytes <= PIECE:  # most are small
        tensor.fill(buffer[: tensor.nbytes], 0)
        yield buffer[: tensor.nbytes]
        return
    for box in tiles(whole(tensor.shape), PIECE // tensor.dtype.itemsize):
        yield flat_bytes(tensor.read(box, buffer))


def _need_same(a: str, b: str, old: Mapping[str, Entry | Tensor], new: Mapping[str, Entry | Tensor]) -> None:
    remedy = "Publish a full version."
    for name in sorted(old.keys() ^ new.keys()):
        found = f"in {a if name in old else b}"
        raise DeltaError("a tensor is in one checkpoint only", name=name, found=found, remedy=remedy)
    for name, was in old.items():
        now = new[name]
        if was.dtype != now.dtype or tuple(was.shape) != tuple(now.shape):
            expected, found = (f"{one.dtype} {list(one.shape)}" for one in (was, now))
            raise DeltaError("a tensor has another dtype or shape", name=name, expected=expected, found=found, remedy=remedy)


def _checked(
    chunks: Iterable[tuple[Tensor, Tensor]], nbytes: int, name: str, digest: PositionalAdler32 | Hashed
) -> Iterator[tuple[Tensor, Tensor]]:
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
            places.write(memory_of((where + start).to(torch.uint32).view(torch.uint8)))
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


def _to_disk(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
