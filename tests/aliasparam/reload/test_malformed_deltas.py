"""Malformed deltas: each is refused when it is opened or, in its compressed bytes, when it is decoded, with its message."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from torch import nn

from aliasparam import apply_delta
from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.errors import DeltaError, SourceError
from aliasparam.spec import TensorSpec

from .delta_cases import delta_file
from .folders import entry, raw

OLD = bytes(range(10))
SUM = "0" * 8
METADATA = {
    "version": "000002",
    "base_version": "000001",
    "delta_encoding": "xor",
    "compression_format": "zstd",
    "checksum_format": "adler32",
}


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def streamed(data: bytes) -> bytes:
    """A frame that does not say how long it is."""
    frame = zstandard.ZstdCompressor(level=1).compressobj()
    return frame.compress(data) + frame.flush()


def delta(frame: bytes = compress(OLD), checksums: dict[str, Any] | None = None, **metadata: object) -> Callable[[Path], object]:
    """A delta of one tensor; None as metadata leaves the field out."""

    def build(folder: Path) -> None:
        delta_file(folder / "s", {"w": frame}, {"w": SUM} if checksums is None else checksums)
        write_index(folder, **metadata)

    return build


def write_index(folder: Path, **metadata: object) -> None:
    fields = {key: value for key, value in {**METADATA, **metadata}.items() if value is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": fields, "weight_map": {"w": "s"}}))


def stored_as(dtype: str, shape: list[int], nbytes: int) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        raw(folder / "s", {"__metadata__": {"w": SUM}, "w": entry(shape, 0, nbytes, dtype)}, bytes(nbytes))
        write_index(folder)

    return build


def no_metadata(folder: Path) -> None:
    raw(folder / "s", {"w": entry([1], 0, 1)}, b"0")
    write_index(folder)


def index_only(fields: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(fields))


def full_checkpoint(folder: Path) -> None:
    raw(folder / "model.safetensors", {"w": entry([1], 0, 1)}, b"0")


OPENED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a full checkpoint": (full_checkpoint, "delta_encoding in the index is wrong\n.*xor or overwrite\n.*None"),
    "no encoding": (delta(delta_encoding=None), "delta_encoding in the index is wrong\n.*\n.*None"),
    "unknown encoding": (delta(delta_encoding="add"), "delta_encoding in the index is wrong\n.*xor or overwrite\n.*'add'"),
    "encoding a list": (delta(delta_encoding=["xor"]), "delta_encoding in the index is wrong"),
    "encoding an object": (delta(delta_encoding={}), "delta_encoding in the index is wrong"),
    "no compression": (delta(compression_format=None), "compression_format in the index is wrong\n.*zstd\n.*None"),
    "unknown compression": (delta(compression_format="gzip"), "compression_format in the index is wrong\n.*zstd\n.*'gzip'"),
    "no checksum format": (delta(checksum_format=None), "checksum_format in the index is wrong\n.*adler32 or xxh3-128 or blake3"),
    "unknown checksum format": (delta(checksum_format="md5"), "checksum_format in the index is wrong\n.*\n.*'md5'"),
    "no version": (delta(version=None), "version in the index is wrong\n.*a version as digits\n.*None"),
    "version a word": (delta(version="latest"), "version in the index is wrong\n.*digits\n.*'latest'"),
    "version negative": (delta(version=-1), "version in the index is wrong\n.*digits\n.*-1"),
    "version signed": (delta(version="+2"), "version in the index is wrong"),
    "version in other digits": (delta(version="٢"), "version in the index is wrong"),
    "version a fraction": (delta(version=2.0), "version in the index is wrong"),
    "version true": (delta(version=True), "version in the index is wrong"),
    "version of 19 digits": (delta(version="1" * 19), "version in the index is wrong"),
    "no base": (delta(base_version=None), "base_version in the index is wrong\n.*digits\n.*None"),
    "base a path": (delta(base_version="../1"), "base_version in the index is wrong"),
    "its own base": (delta(base_version="000002"), "base_version in the index is wrong\n.*a version before 2\n.*2"),
    "base after it": (delta(base_version="000003"), "base_version in the index is wrong\n.*a version before 2\n.*3"),
    "no __metadata__": (no_metadata, "w: no checksum of the tensor's new bytes\n.*8 hex digits .*adler32.\n.*None"),
    "no checksum": (delta(checksums={"format": "pt"}), "w: no checksum of the tensor's new bytes"),
    "checksum too short": (delta(checksums={"w": "0" * 7}), "w: no checksum .*\n.*8 hex digits .*\n.*'0000000'"),
    "checksum too long": (delta(checksums={"w": "0" * 9}), "w: no checksum of the tensor's new bytes"),
    "checksum no hex": (delta(checksums={"w": "0000000g"}), "w: no checksum of the tensor's new bytes"),
    "checksum a number": (delta(checksums={"w": 1}), "__metadata__ is not text by text"),
    "checksum of another format": (delta(checksum_format="blake3"), "w: no checksum .*\n.*64 hex digits .*blake3"),
    "tensor of floats": (stored_as("F32", [2], 8), "w: no compressed delta\n.*uint8 .n.\n.*float32 .2."),
    "tensor of two dims": (stored_as("U8", [2, 4], 8), r"w: no compressed delta\n.*\n.*uint8 .2, 4."),
    "tensor of no dims": (stored_as("U8", [], 1), "w: no compressed delta"),
    "shard missing": (lambda folder: write_index(folder), "s: the file is missing"),
    "shard outside": (index_only({"metadata": METADATA, "weight_map": {"w": "../s"}}), "not a plain file name"),
    "metadata missing": (index_only({"weight_map": {}}), "the index says of no tensor where it is"),
    "weight_map missing": (index_only({"metadata": METADATA}), "the index says of no tensor where it is"),
    "index not there": (lambda folder: None, "the file is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPENED)
def test_a_malformed_delta_is_refused_when_it_is_opened(case: str, tmp_path: Path) -> None:
    build, message = OPENED[case]
    folder = tmp_path / "weight_v000002"
    folder.mkdir()
    build(folder)
    with pytest.raises(SourceError, match=message) as caught:
        DeltaFolder(folder)
    assert str(folder) in str(caught.value)


def overwrite(count: int, positions: list[int], values: bytes) -> bytes:
    return struct.pack(f"<I{len(positions)}I", count, *positions) + values


def flip(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 0xFF]) + frame[at + 1 :]


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 25))  # 32 MiB in a kB
WIDE = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=30)).compressobj()
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(OLD)
DECODED: dict[str, tuple[str, bytes, str]] = {
    "not zstd": ("xor", b"not zstd at all", "w: the delta cannot be decompressed: .*Unknown frame descriptor"),
    "nothing": ("xor", b"", "w: the delta is too short\n.*10 bytes, as the tensor has\n.*0 bytes"),
    "a frame of nothing": ("xor", compress(b""), "w: the delta is of a tensor of another dtype or shape\n.*\n.*0 bytes"),
    "cut frame": ("xor", compress(OLD)[:-3], "w: the delta is too short"),
    "cut header": ("xor", compress(OLD)[:5], "w: the delta is too short"),
    "damaged header": ("xor", flip(compress(OLD), 0), "w: the delta cannot be decompressed"),
    "damaged, with a checksum": ("xor", flip(CHECKED, len(CHECKED) - 1), "w: the delta cannot be decompressed: .*checksum"),
    "a byte too few": ("xor", streamed(OLD[:9]), "w: the delta is too short\n.*10 bytes, as the tensor has\n.*9 bytes"),
    "a byte too many": ("xor", streamed(OLD + b"0"), "w: the delta is too long\n.*10 bytes, as the tensor has"),
    "of a narrower dtype": ("xor", compress(OLD[:5]), r"another dtype or shape\n.*\(uint8\[10\]\)\n.*5 bytes, 0.5 for each"),
    "of a wider dtype": ("xor", compress(OLD + OLD), r"w: .*another dtype or shape\n.*\(uint8\[10\]\)\n.*20 bytes, 2 for each"),
    "a bomb": ("xor", streamed(bytes(1 << 25)), "w: the delta is too long"),
    "a bomb that says so": ("xor", BOMB, "w: the delta is of a tensor of another dtype or shape"),
    "a window of 1 GiB": ("xor", WIDE.compress(OLD) + WIDE.flush(), "w: the delta cannot be decompressed: .*too much memory"),
    "overwrite of nothing": ("overwrite", compress(b""), "w: the delta is too short\n.*a count of 4 bytes\n.*0 bytes"),
    "half a count": ("overwrite", compress(b"\0\0"), "w: the delta is too short\n.*a count of 4 bytes\n.*2 bytes"),
    "count beyond the tensor": ("overwrite", compress(overwrite(11, [], b"")), "more positions than .*\n.*at most 10\n.*11"),
    "count of 2^32 - 1": ("overwrite", compress(overwrite((1 << 32) - 1, [], b"")), "more positions than .*\n.*\n.*4294967295"),
    "positions missing": ("overwrite", compress(overwrite(3, [1, 2], b"")), "too short\n.*19 bytes for 3 positions\n.*12 bytes"),
    "values missing": ("overwrite", compress(overwrite(2, [1, 2], b"a")), "too short\n.*14 bytes for 2 positions\n.*13 bytes"),
    "values too many": ("overwrite", compress(overwrite(2, [1, 2], b"abc")), "too long\n.*14 bytes for 2 positions"),
    "position at the end": ("overwrite", compress(overwrite(2, [1, 10], b"ab")), "a position outside .*\n.*below 10\n.*10"),
    "position far outside": ("overwrite", compress(overwrite(1, [(1 << 32) - 1], b"a")), "position outside .*\n.*\n.*4294967295"),
    "a position twice": ("overwrite", compress(overwrite(2, [3, 3], b"ab")), "not ascending\n.*every position once"),
    "positions backwards": ("overwrite", compress(overwrite(3, [1, 5, 4], b"abc")), "positions are not ascending"),
    "backwards between pieces": ("overwrite", compress(overwrite(3, [1, 5, 5], b"abc")), "positions are not ascending"),
    "overwrite of a bomb": ("overwrite", compress(overwrite(1, [1], b"a") + bytes(1 << 25)), "w: the delta is too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECODED)
def test_malformed_bytes_are_refused_when_they_are_decoded(case: str, tmp_path: Path) -> None:
    encoding, frame, message = DECODED[case]
    delta(frame, delta_encoding=encoding)(tmp_path)
    start = time.process_time()
    with DeltaFolder(tmp_path) as opened, pytest.raises(DeltaError, match=message) as caught:
        changes = opened.changes("w", TensorSpec((len(OLD),), torch.uint8))
        for first, stop in ((0, 4), (4, 10)):
            change = changes.read(first, stop)
            if change is not None:
                change.of(torch.zeros(stop - first, dtype=torch.uint8))  # whatever is read can be applied without harm
        changes.finish()
    assert str(tmp_path) in str(caught.value) and time.process_time() - start < 2
    model = nn.Module()
    model.w = nn.Parameter(torch.arange(10, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(DeltaError, match=message):
        apply_delta(model, tmp_path)
    assert bytes(model.w.tolist()) == OLD and model.w._version == 0


def test_a_wrong_digest_names_both_and_what_it_may_mean(tmp_path: Path) -> None:
    delta()(tmp_path)
    with DeltaFolder(tmp_path) as opened, pytest.raises(DeltaError) as caught:
        opened.check("w", "12345678")
    assert str(caught.value) == (
        f"{tmp_path}: w: the checksum of the new bytes differs (adler32)\n  expected: 00000000\n  found:    12345678\n"
        "  The weights are not version 1, or of another dtype, or the delta is damaged."
    )


def test_what_is_allowed_is_taken(tmp_path: Path) -> None:
    """Versions as numbers, digests in capitals, other entries in __metadata__, I8 for bytes: other trainers write them."""
    delta(checksums={"w": "0000ABCD", "format": "pt"}, version=2, base_version=1)(tmp_path)
    with DeltaFolder(tmp_path) as opened:
        assert (opened.version, opened.base_version, opened.checksums) == (2, 1, {"w": "0000abcd"})
        opened.check("w", "0000ABCD")
    stored_as("I8", [4], 4)(tmp_path)
    DeltaFolder(tmp_path).close()


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta()(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with (
        DeltaFolder(tmp_path) as opened,
        pytest.raises(DeltaError, match=r"zstandard is not installed\n  pip install 'aliasparam.delta.'"),
    ):
        opened.changes("w", TensorSpec((10,), torch.uint8))
