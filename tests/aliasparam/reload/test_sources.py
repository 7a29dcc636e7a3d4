"""Reading checkpoint folders: the bytes, the ranges, and laws 8 and 10 for a folder that changes while it is read."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam.layout.boxes import Box, tiles
from aliasparam.reload import held_file, sources
from aliasparam.reload.errors import SourceError
from aliasparam.reload.sources import SafetensorsFolder

from .folders import index, raw, safetensors
from .interrupted import interrupted


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "m": torch.randn(37, 53),
        "e4m3": torch.randn(16, 32).to(torch.float8_e4m3fn),
        "experts": torch.randint(0, 255, (3, 40, 6000), dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "one": torch.ones(1),
        "none": torch.zeros(0, 3),
        "bits": torch.tensor([True, False, True]),
        "bf16": torch.randn(5, 1, 7).bfloat16(),
        "i64": torch.arange(5),
        "cube": torch.randn(4, 5, 6).half(),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Two shards with an index, as transformers writes them; what safetensors itself reads of them."""
    folder = tmp_path_factory.mktemp("sharded")
    all_of_it = tensors()
    first = {name: all_of_it[name] for name in list(all_of_it)[:4]}
    rest = {name: all_of_it[name] for name in list(all_of_it)[4:]}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(rest, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    both = {**dict.fromkeys(first, "model-00001-of-00002.safetensors"), **dict.fromkeys(rest, "model-00002-of-00002.safetensors")}
    index(folder, both, metadata={"total_size": 1})
    return folder, {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    return st.tuples(*(st.lists(st.integers(0, n), min_size=2, max_size=2).map(sorted).map(tuple) for n in shape))


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*dim) for dim in box)]


def test_whole_tensors_are_what_safetensors_reads(files: tuple[Path, dict[str, Tensor]]) -> None:
    with SafetensorsFolder(files[0]) as folder:
        assert set(folder.tensors) == set(files[1])
        assert all(equal(folder.read(name), value) for name, value in files[1].items())
        assert folder.bytes_read == sum(value.nbytes for value in files[1].values())
        assert folder.index_metadata == {"total_size": 1} and {"format": "pt"} in folder.metadata.values()
        folder.check_unchanged()


@given(data=st.data())
def test_any_box_is_read_alone_and_in_pieces(files: tuple[Path, dict[str, Tensor]], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files[1])))
    value = files[1][name]
    box = data.draw(boxes(tuple(value.shape)))
    room = data.draw(st.integers(1 + value.nbytes // 100, 1 + value.nbytes))
    with SafetensorsFolder(files[0]) as folder:
        assert equal(folder.read(name, box), cut(value, box))
        assert folder.bytes_read == cut(value, box).nbytes
        buffer = torch.empty(max(room, value.element_size()), dtype=torch.uint8)
        got = torch.zeros_like(value.view(torch.uint8) if value.dim() else value[None].view(torch.uint8)).flatten()
        got = got.view(value.dtype).view(value.shape)
        seen = 0
        for _, part, piece in folder.stream([(name, box)], buffer):
            assert piece.nbytes <= buffer.numel() and piece.untyped_storage().data_ptr() == buffer.data_ptr()
            cut(got, part).copy_(piece)
            seen += piece.numel()
        assert seen == cut(value, box).numel() and equal(cut(got, box), cut(value, box))


def test_no_piece_is_read_into_the_memory_of_one_in_use(
    files: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    submit = sources.ThreadPoolExecutor.submit
    monkeypatch.setattr(sources.ThreadPoolExecutor, "submit", lambda *asked: begun.append(asked) or submit(*asked))
    with SafetensorsFolder(files[0]) as folder:
        for number, _ in enumerate(folder.stream([("m", None)], torch.empty(1024, dtype=torch.uint8))):
            assert len(begun) <= number + 4  # it, and three ahead
    assert number > 20


@given(data=st.data())
def test_pieces_are_in_order_and_as_large_as_may_be(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    box, most = data.draw(boxes(shape)), data.draw(st.integers(1, 40))
    marks = torch.arange(max(torch.Size(shape).numel(), 1)).view(shape)
    parts = [cut(marks, part).flatten() for part in tiles(box, most)]
    assert [mark for part in parts for mark in part.tolist()] == cut(marks, box).flatten().tolist()
    assert all(len(part) <= most for part in parts)
    assert all(len(a) + len(b) > most for a, b in pairwise(parts) if len(shape) == 1)


@pytest.mark.parametrize("writes", [1, 2, 1000])
def test_law_8_a_file_that_is_written_while_it_is_opened(writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is a tick old when it is taken, so that whoever writes to it then changes it; or it is refused."""
    path, left = tmp_path / "model.safetensors", writes
    safetensors(path, {"w": torch.zeros(4)})
    sleep = time.sleep

    def slept(seconds: float) -> None:
        nonlocal left
        sleep(seconds / 10 if writes > 2 else seconds)
        if left:
            os.utime(path)
            left -= 1

    monkeypatch.setattr(time, "sleep", slept)
    with pytest.raises(SourceError, match="is being written to") if writes > 2 else contextlib.nullcontext():
        SafetensorsFolder(tmp_path).close()
        assert time.time() - path.stat().st_mtime >= held_file._TICK


def test_a_rank_reads_its_own_ranges_alone(files: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns a page apart by themselves, rows as one range; columns closer than a page with what lies between."""
    asked: list[int] = []
    preadv = os.preadv
    with SafetensorsFolder(files[0]) as folder:
        monkeypatch.setattr(os, "preadv", lambda fd, to, at: asked.append(len(to[0])) or preadv(fd, to, at))
        folder.read("experts", ((1, 2), (10, 20), (0, 6000)))
        assert asked == [60_000]
        asked.clear()
        folder.read("experts", ((0, 3), (0, 40), (100, 600)))
        assert asked == [500] * 120
        asked.clear()
        folder.read("experts", ((2, 3), (0, 40), (0, 3000)))
        assert asked == [39 * 6000 + 3000]


@pytest.mark.parametrize(
    ("name", "box", "message"),
    [
        ("x", None, "the checkpoint has no tensor of this name"),
        ("m", ((0, 38), (0, 53)), r"does not have this part\n  expected: .* each dim of \[37, 53\]\n  found:    \(\(0, 38"),
        ("m", ((0, 37),), "does not have this part"),
        ("m", 5, "does not have this part"),
        ("m", ((0, 1.5), (0, 53)), "does not have this part"),
        ("m", ((-1, 3), (0, 53)), "does not have this part"),
        ("m", ((3, 2), (0, 53)), "does not have this part"),
        ("scalar", ((0, 1),), "does not have this part"),
    ],
)
def test_what_is_not_there_is_refused(files: tuple[Path, dict[str, Tensor]], name: str, box: Box | None, message: str) -> None:
    with SafetensorsFolder(files[0]) as folder, pytest.raises(SourceError, match=message):
        folder.read(name, box)


def test_buffers_and_bytes_in_order(files: tuple[Path, dict[str, Tensor]]) -> None:
    with SafetensorsFolder(files[0]) as folder:
        out = torch.empty(100, dtype=torch.uint8)
        pieces = [piece.flatten().clone() for _, _, piece in folder.stream([("m", None)], out)]
        assert folder.bytes_read == 7844 and torch.equal(torch.cat(pieces), files[1]["m"].flatten())
        for bad in (out[:3], out[::2], out.float(), out.view(10, 10), out.to("meta"), out[1:]):
            with pytest.raises(SourceError, match="buffer"):
                next(folder.stream([("m", None)], bad))
    with pytest.raises(SourceError, match="the file was closed"):
        folder.read("m")
    with pytest.raises(SourceError, match="the file was closed"):
        folder.check_unchanged()


# -- laws 8 and 10: a folder that changes while it is read ----------------------------------------------------------------


def save_next(folder: Path) -> None:
    save_file({"w": torch.ones(1 << 16)}, folder / "next")
    os.replace(folder / "next", folder / "model.safetensors")


def rewrite(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


CHANGES = {
    save_next: "the file was replaced while it was read",
    rewrite: "the file changed while it was read\n.*it was written to",
    remove: "the file was removed while it was read",
    append: "the file changed while it was read\n.*bytes before, .* now",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_law_8_a_file_that_changes_under_its_reader_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1 << 16)}, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        buffer = torch.empty(1 << 16, dtype=torch.uint8)
        values = set()
        for _, box, piece in folder.stream([("w", None)], buffer):
            values.update(piece.unique().tolist())
            if box[0][0] == 0:
                change(tmp_path)
        if change is not rewrite:
            assert values == {0.0}  # the open file, never a mixture
        with pytest.raises(SourceError, match=CHANGES[change]):
            folder.check_unchanged()


def test_law_8_a_file_as_young_as_a_tick_of_the_clock_is_looked_at_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mtime would be the same if it were written to now."""
    slept: list[float] = []
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4)}, file)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or sleep(seconds))
    for age, expected in ((3600, []), (0, [0.02])):
        os.utime(file, (time.time() - age,) * 2)
        SafetensorsFolder(tmp_path).close()
        assert slept == expected


def test_law_10_a_truncated_file_is_an_error_not_a_signal(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 10), "b": torch.ones(1 << 20)}, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        pieces = folder.stream([("b", None)], torch.empty(1 << 20, dtype=torch.uint8))
        next(pieces)
        os.truncate(tmp_path / "model.safetensors", 1 << 16)
        with pytest.raises(SourceError, match="the file was truncated while it was read"):
            list(pieces)


def test_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.arange(3)}, blobs / "abcd")
    os.symlink("../../blobs/abcd", snapshot / "model.safetensors")
    os.symlink(tmp_path / "models--a--b", tmp_path / "linked")
    for folder in (snapshot, tmp_path / "linked" / "snapshots" / "rev1"):
        with SafetensorsFolder(folder) as opened:
            assert opened.read("w").tolist() == [0, 1, 2]
            opened.check_unchanged()
    with SafetensorsFolder(snapshot) as opened:  # the link moves to the next revision's blob
        save_file({"w": torch.arange(3) + 1}, blobs / "ef01")
        os.unlink(snapshot / "model.safetensors")
        os.symlink("../../blobs/ef01", snapshot / "model.safetensors")
        with pytest.raises(SourceError, match="replaced"):
            opened.check_unchanged()


def test_a_header_of_many_entries_costs_the_same_few_lines_for_each(tmp_path: Path) -> None:
    """Lines that Python runs, and passes of its collector, which is paused meanwhile: both counted, as times are not certain."""
    lines = passes = 0

    def traced(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return traced

    def collected(when: str, _: Any) -> None:
        nonlocal passes
        passes += when == "start"

    def counted(count: int) -> tuple[int, int]:
        nonlocal lines, passes
        header = {f"model.layers.{i}.w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
        raw(tmp_path / "model.safetensors", json.dumps(header).encode())
        gc.collect()
        gc.callbacks.append(collected)
        before, lines, passes = sys.gettrace(), 0, 0
        sys.settrace(traced)
        try:
            SafetensorsFolder(tmp_path).close()
        finally:
            sys.settrace(before)
            gc.callbacks.remove(collected)
        return lines, passes

    (small, _), (large, collections) = counted(500), counted(8_000)
    assert small < large < 16 * small and large < 60 * 8_000
    assert collections < 10 and gc.isenabled()


@pytest.mark.parametrize(("what", "why"), [("link", "symbolic links"), ("pipe", "this is not a file")])
def test_a_file_that_becomes_another_thing_while_it_is_opened_is_refused(
    what: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    safetensors(tmp_path.parent / "secret", {"w": torch.ones(4)})
    file = held_file._File

    def replaced(path: str, **how: Any) -> Any:
        os.unlink(path)
        os.mkfifo(path) if what == "pipe" else os.symlink(tmp_path.parent / "secret", path)
        return file(path, **how)

    monkeypatch.setattr(held_file, "_File", replaced)
    with pytest.raises(SourceError, match=why):
        SafetensorsFolder(tmp_path)


def test_law_10_an_interrupt_at_any_line_leaves_no_file_open(files: tuple[Path, dict[str, Tensor]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for at in itertools.count():
        again = interrupted(at, (held_file, sources), lambda: SafetensorsFolder(files[0]).close())
        assert len(os.listdir("/proc/self/fd")) == before, at
        if not again:
            break
    assert at > 30


def test_files_are_closed_with_the_folder(files: tuple[Path, dict[str, Tensor]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    folder = SafetensorsFolder(files[0])
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del folder
    assert len(os.listdir("/proc/self/fd")) == before
