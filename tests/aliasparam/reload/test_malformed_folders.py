"""Malformed checkpoint folders: each is refused when it is opened, with its message."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from aliasparam.reload import held_file
from aliasparam.reload.errors import SourceError
from aliasparam.reload.sources import SafetensorsFolder

from .folders import entry, index, raw, safetensors

GIB = 1 << 30


def single(header: object, data: bytes = b"", **lies: int) -> Callable[[Path], object]:
    return lambda folder: raw(folder / "model.safetensors", header, data, **lies)


def one(
    shape: list[object], begin: object, end: object, dtype: object = "U8", data: bytes = b"0000", **more: object
) -> Callable[[Path], object]:
    return single({"w": entry(shape, begin, end, dtype, **more)}, data)


def shards(weight_map: object, **fields: object) -> Callable[[Path], object]:
    """Two good shards s1 (a, b) and s2 (c), and this index."""

    def build(folder: Path) -> None:
        safetensors(folder / "s1", {"a": torch.zeros(2), "b": torch.ones(3)})
        safetensors(folder / "s2", {"c": torch.ones(1)})
        index(folder, weight_map, **fields)

    return build


def text_index(text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_bytes(text)


def link(target: str) -> Callable[[Path], object]:
    return lambda folder: os.symlink(target, folder / "model.safetensors")


def outside(folder: Path) -> None:
    safetensors(folder.parent / "elsewhere", {"w": torch.zeros(2)})
    os.symlink("../elsewhere", folder / "model.safetensors")


def blob_of_another_model(folder: Path) -> None:
    blobs = folder.parent / "other" / "blobs"
    blobs.mkdir(parents=True)
    safetensors(blobs / "1234", {"w": torch.zeros(2)})
    os.symlink("../other/blobs/1234", folder / "model.safetensors")


def twice(folder: Path) -> None:
    safetensors(folder / "s1", {"a": torch.zeros(2)})
    safetensors(folder / "s2", {"a": torch.zeros(2), "b": torch.ones(1)})
    index(folder, {"a": "s1", "b": "s2"})


GOOD = {"a": "s1", "b": "s1", "c": "s2"}
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing in it": (lambda folder: None, "the file is missing"),
    "no folder": (lambda folder: folder.rmdir(), "this is not a folder"),
    "empty file": (lambda folder: (folder / "model.safetensors").touch(), "truncated or not a safetensors file\n.*0 bytes"),
    "seven bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"7 bytes"), "7 bytes in the file"),
    "a pickle": (lambda folder: torch.save({"w": torch.zeros(1)}, folder / "model.safetensors"), "its header is too long"),
    "header of 12 GiB, sparse": (single(b"{}", length=12 * GIB, size=12 * GIB + 99), "at most 100000000 bytes\n.*12884901888"),
    "header of 2^64 - 1": (single(b"{}", length=(1 << 64) - 1), "its header is too long"),
    "header beyond the file": (single(b"{}", length=3), "a header of 3 bytes after the first 8\n.*10 bytes"),
    "header not JSON": (single(b"{'w': 1}"), "its JSON cannot be read: Expecting property name"),
    "header not UTF-8": (single(b'{"\xff": 1}'), "its JSON cannot be read: 'utf-8' codec"),
    "header empty": (single(b""), "its JSON cannot be read: Expecting value"),
    "header a list": (single(b"[]"), "its JSON is not an object\n.*list"),
    "nested deeply": (single(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nothing but brackets"),
    "nested in spaces": (single(b'{"a":' + (b"[" + b" " * 9) * 20_000 + b"]" * 20_000 + b"}"), "nested too deeply"),
    "a million lists": (single(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "nothing but brackets"),
    "integer of 5000 digits": (single(b'{"w":{"shape":[' + b"1" * 5000 + b']}}'), "4300 digits"),
    "NaN as a size": (single(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN is not a JSON number"),
    "half a surrogate pair": (single(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogates not allowed"),
    "a name twice": (single(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{}}'), "w: a name is there twice"),
    "a field twice": (single(b'{"w":{"dtype":"U8","dtype":"I8","shape":[0]}}'), "dtype: a name is there twice"),
    "entry a number": (single({"w": 3}), "w: an entry of the header is not one\n.*\n.*3"),
    "entry without a dtype": (single({"w": {"shape": [1], "data_offsets": [0, 1]}}), "w: an entry of the header is not one"),
    "entry with more": (one([4], 0, 4, strides=[1]), "w: an entry of the header is not one"),
    "dtype a number": (one([4], 0, 4, 8), "w: an entry of the header is not one"),
    "dtype unknown": (one([4], 0, 4, "F7"), "w: unknown dtype\n.*\n.*F7"),
    "shape negative": (one([-4], 0, 4), "w: an entry of the header is not one"),
    "shape fractional": (one([4.0], 0, 4), "w: an entry of the header is not one"),
    "shape true": (one([True], 0, 1, data=b"0"), "w: an entry of the header is not one"),
    "shape text": (one(["4"], 0, 4), "w: an entry of the header is not one"),
    "65 dims": (one([1] * 65, 0, 1, data=b"0"), "w: an entry of the header is not one"),
    "many dims": (one([3 << 60] * 100_000, 0, 4), "w: an entry of the header is not one"),
    "nothing times too much": (one([0, 1 << 62, 1 << 62], 0, 0, data=b""), "w: a tensor of this size cannot be"),
    "offsets three": (single({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}), "entry of the header is not one"),
    "offsets reversed": (one([4], 4, 0), "do not match its shape\n.*4 bytes for U8 .4.\n.*-4 bytes"),
    "offsets too far apart": (one([1], 0, 4), "do not match its shape\n.*1 bytes for U8 .1.\n.*4 bytes"),
    "offsets of another dtype": (one([4], 0, 4, "F32"), "do not match its shape\n.*16 bytes for F32"),
    "overlap": (single({"a": entry([3], 0, 3), "b": entry([2], 2, 4)}, b"0000"), "b: two tensors overlap\n.*3 on, where a ends"),
    "the same bytes twice": (single({"a": entry([4], 0, 4), "b": entry([4], 0, 4)}, b"0000"), "b: two tensors overlap"),
    "a hole": (single({"a": entry([1], 0, 1), "b": entry([2], 2, 4)}, b"0000"), "b: there is a hole between tensors\n.*1 on"),
    "a hole at the begin": (one([3], 1, 4), "w: there is a hole between tensors\n.*byte 0 on, where the header ends"),
    "data missing": (one([9], 0, 9), "w: the file is truncated"),
    "data 2^50 bytes": (one([1 << 50], 0, 1 << 50), "w: the file is truncated"),
    "data too long": (one([3], 0, 3), "w: the file goes on behind its last tensor"),
    "metadata of numbers": (single({"__metadata__": {"a": 1}}), "__metadata__ is not text by text"),
    "metadata a list": (single({"__metadata__": []}), "__metadata__ is not text by text"),
    "a folder as the file": (lambda folder: (folder / "model.safetensors").mkdir(), "this is not a file"),
    "a pipe as the file": (lambda folder: os.mkfifo(folder / "model.safetensors"), "this is not a file"),
    "a link to a device": (link("/dev/zero"), "a link leaves the checkpoint folder\n.*\n.*/dev/zero"),
    "a link to itself": (link("model.safetensors"), "cannot be opened: Too many levels of symbolic links"),
    "a link to nothing": (link("nothing"), "the file is missing"),
    "a link out of the folder": (outside, "a link leaves the checkpoint folder"),
    "a link to blobs of another model": (blob_of_another_model, "a link leaves the checkpoint folder"),
    "index not JSON": (text_index(b"weight_map"), "index.json: its JSON cannot be read"),
    "index a list": (text_index(b"[]"), "index.json: its JSON is not an object"),
    "index nested": (text_index(b'{"weight_map":' + (b'{"a":     ' * 20_000) + b"}" * 20_001), "nested too deeply"),
    "index without a map": (text_index(b"{}"), "the index says of no tensor where it is"),
    "index of a list": (shards(["s1"]), "the index says of no tensor where it is"),
    "index of nothing": (shards({}), "the index says of no tensor where it is"),
    "index of numbers": (shards({"a": 1}), "the index says of no tensor where it is"),
    "index with a name twice": (text_index(b'{"weight_map":{"a":"s1","a":"s2"}}'), "a: a name is there twice"),
    "index metadata a text": (shards(GOOD, metadata="x"), "metadata of the index is no object"),
    "index too long": (lambda folder: raw(folder / "model.safetensors.index.json", b"{", size=GIB), "the file is too long"),
    "index a link to nothing": (lambda folder: os.symlink("x", folder / "model.safetensors.index.json"), "the file is missing"),
    "shard missing": (shards({**GOOD, "d": "s3"}), "s3: the file is missing"),
    "shard has not got it": (shards({**GOOD, "d": "s2"}), "d: the index and its shards disagree\n.*in s2\n.*in no shard"),
    "shard exchanged": (shards({**GOOD, "a": "s2"}), "a: the index and its shards disagree\n.*in s2\n.*in s1"),
    "a tensor in two shards": (twice, "a: a tensor is in two shards\n.*s1 and s2"),
    "shard above": (shards({**GOOD, "a": "../s1"}), "a: a shard's name is not a plain file name\n.*\n.*'../s1'"),
    "shard absolute": (shards({**GOOD, "a": "/etc/passwd"}), "a shard's name is not a plain file name"),
    "shard below": (shards({**GOOD, "a": "sub/s1"}), "a shard's name is not a plain file name"),
    "shard of two dots": (shards({**GOOD, "a": ".."}), "a shard's name is not a plain file name"),
    "shard of no name": (shards({**GOOD, "a": ""}), "a shard's name is not a plain file name"),
    "shard with NUL": (shards({**GOOD, "a": "s1\0"}), "a shard's name is not a plain file name"),
    "shard of 5000 letters": (shards({**GOOD, "a": "x" * 5000}), "a shard's name is not a plain file name"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_folder_is_refused_when_it_is_opened(case: str, tmp_path: Path) -> None:
    build, message = CASES[case]
    folder = tmp_path / "models--a" / "snapshots" / "rev"
    folder.mkdir(parents=True)
    build(folder)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(SourceError, match=message) as caught:
        SafetensorsFolder(folder)
    assert len(str(caught.value)) < 2000 and str(tmp_path) in str(caught.value)
    assert not before or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(("shard", "index", "a link"))])
def test_what_safetensors_refuses_is_refused_and_what_it_takes_is_taken(case: str, tmp_path: Path) -> None:
    """The peer as oracle: of single files it refuses all that is refused here, but for some of these, which it takes."""
    CASES[case][0](tmp_path)
    file = tmp_path / "model.safetensors"
    if not file.is_file():
        pytest.skip("no file")
    stricter = {"a name twice", "a field twice", "entry with more", "65 dims", "many dims", "nothing times too much"}
    try:
        with safe_open(file, framework="pt"):
            taken = True
    except SafetensorError:
        taken = False
    assert not taken or case in stricter


def test_names_are_checked_before_anything_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards({**GOOD, "z": "../../secret"})(tmp_path)
    opened: list[str] = []
    file = held_file._File
    monkeypatch.setattr(held_file, "_File", lambda path, **how: opened.append(str(path)) or file(path, **how))
    with pytest.raises(SourceError, match="plain file name"):
        SafetensorsFolder(tmp_path)
    assert [Path(path).name for path in opened] == ["model.safetensors.index.json"]


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A header that says 12 GiB is not read; one of nothing but brackets is not turned into objects, of 20 bytes a byte."""
    for build, most in (
        (CASES["header of 12 GiB, sparse"][0], 1 << 20),
        (single(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), 20 << 20),
    ):
        build(tmp_path)
        tracemalloc.start()
        with pytest.raises(SourceError):
            SafetensorsFolder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()
