"""Deltas as trainers write them (slime's ``update_weight_from_disk_delta.py``), on bytes: the oracle of the reader."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import blake3
import xxhash
import zstandard

from .folders import entry, raw

CHECKSUMS = {
    "adler32": lambda data: f"{zlib.adler32(data, 1):08x}",
    "xxh3-128": lambda data: xxhash.xxh3_128(data).hexdigest(),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
}


def encoded(encoding: str, old: bytes, new: bytes) -> bytes:
    if encoding == "xor":
        return bytes(a ^ b for a, b in zip(old, new, strict=True))
    where = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return struct.pack(f"<I{len(where)}I", len(where), *where) + bytes(new[i] for i in where)


def trainer_writes(
    folder: Path, old: dict[str, bytes], new: dict[str, bytes], version: int, encoding: str, checksum: str, files: int = 1
) -> Path:
    """One file a rank of those that have something, and the index."""
    folder.mkdir(parents=True)
    changed = [name for name in new if old[name] != new[name]]
    weight_map: dict[str, str] = {}
    for rank in range(files):
        names = changed[rank::files]
        if names:
            shard = f"model-{rank:05d}-of-{files:05d}.safetensors"
            frames = {name: zstandard.ZstdCompressor(level=1).compress(encoded(encoding, old[name], new[name])) for name in names}
            delta_file(folder / shard, frames, {name: CHECKSUMS[checksum](new[name]) for name in names})
            weight_map |= dict.fromkeys(names, shard)
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def delta_file(path: Path, frames: dict[str, bytes], checksums: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": checksums}
    data = b""
    for name, frame in frames.items():
        header[name] = entry([len(frame)], len(data), len(data) + len(frame))
        data += frame
    raw(path, header, data)


def trainer_reads(folder: Path, old: dict[str, bytes]) -> dict[str, bytes]:
    """The receiver of slime and SGLang: one ``decompress`` a tensor, checksum compared."""
    from safetensors.torch import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    new = dict(old)
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                diff = zstandard.ZstdDecompressor().decompress(bytes(file.get_tensor(name).tolist()))
                if index["metadata"]["delta_encoding"] == "xor":
                    new[name] = bytes(a ^ b for a, b in zip(old[name], diff, strict=True))
                else:
                    (count,) = struct.unpack_from("<I", diff)
                    data = bytearray(old[name])
                    for place, value in zip(struct.unpack_from(f"<{count}I", diff, 4), diff[4 + 4 * count :], strict=True):
                        data[place] = value
                    new[name] = bytes(data)
                assert CHECKSUMS[index["metadata"]["checksum_format"]](new[name]) == file.metadata()[name]
    return new
