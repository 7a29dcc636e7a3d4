"""Law 12 for delta folders: read as trainers write them, written as receivers read them, in bounded memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aliasparam.reload.delta import ENCODINGS, PIECE
from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.delta_writer import DeltaWriter, diff
from aliasparam.reload.digest import FORMATS, digest_of
from aliasparam.reload.errors import DeltaError, SourceError
from aliasparam.reload.live_digest import digest_of_folder
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam.spec import TensorSpec

from .delta_cases import CHECKSUMS, trainer_reads, trainer_writes
from .folders import plain, safetensors


def changed(old: bytes, share: float, seed: int) -> bytes:
    rng = random.Random(seed)
    return bytes(rng.randrange(256) if rng.random() < share else value for value in old)


def apply(delta: DeltaFolder, old: dict[str, bytes], piece_bytes: int) -> dict[str, bytes]:
    """What an engine does: pieces to the live bytes, the digest of the new ones compared."""
    new = dict(old)
    for name in delta.checksums:
        flat = patched(delta, name, torch.tensor(list(old[name]), dtype=torch.uint8), piece_bytes)
        new[name] = plain(flat)
        delta.check(name, digest_of(flat, delta.checksum_format))
    return new


def patched(delta: DeltaFolder, name: str, old: Tensor, piece_bytes: int) -> Tensor:
    changes, new = delta.changes(name, TensorSpec.of(old)), old.clone()
    for start in range(0, len(old), piece_bytes):
        piece = old[start : start + piece_bytes]
        change = changes.read(start, start + len(piece))
        new[start : start + piece_bytes] = piece if change is None else change.of(piece)
    changes.finish()
    return new


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    checksum=st.sampled_from(sorted(FORMATS)),
    files=st.integers(1, 3),
    piece_bytes=st.sampled_from([1, 7, 64, 1 << 20]),
    seed=st.integers(0, 1 << 30),
)
def test_law_12_what_a_trainer_writes_is_what_is_applied(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int], share: float, encoding: str, checksum: str, files: int, piece_bytes: int, seed: int,
) -> None:  # fmt: skip
    old = {f"t{i}": random.Random(seed + i).randbytes(size) for i, size in enumerate(sizes)}
    new = {name: changed(value, share, seed) for name, value in old.items()}
    folder = trainer_writes(tmp_path_factory.mktemp("d") / "weight_v000001", old, new, 1, encoding, checksum, files)
    with DeltaFolder(folder) as delta:
        assert (delta.version, delta.base_version, delta.encoding) == (1, 0, encoding)
        assert set(delta.checksums) == {name for name in new if new[name] != old[name]}
        assert apply(delta, old, piece_bytes) == new
        if encoding == "xor":  # twice, it is undone
            for name in delta.checksums:
                flat = torch.tensor(list(new[name]), dtype=torch.uint8)
                assert plain(patched(delta, name, flat, piece_bytes)) == old[name]
        delta.check_unchanged()


def random_tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "w": torch.randint(0, 255, (50, 40), dtype=torch.uint8),
        "s": torch.randn(30, 7).to(torch.float8_e4m3fn),
        "g": torch.randn(()),
        "n": torch.randn(64).bfloat16(),
        "same": torch.ones(9),
        "none": torch.zeros(0, 3),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[SafetensorsFolder, SafetensorsFolder]:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        safetensors(tmp_path / name / "model.safetensors", random_tensors(seed))
    return SafetensorsFolder(tmp_path / "a"), SafetensorsFolder(tmp_path / "b")


@pytest.mark.parametrize("checksum", FORMATS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("max_shard_bytes", [1, 1 << 30])
def test_law_12_what_diff_writes_receivers_read(
    pair: tuple[SafetensorsFolder, SafetensorsFolder], tmp_path: Path, encoding: str, checksum: str, max_shard_bytes: int
) -> None:
    a, b = pair
    old, new = ({name: plain(folder.read(name)) for name in folder.tensors} for folder in pair)
    out = tmp_path / "weight_v000004"
    counts = diff(a, b, out, 4, 3, encoding=encoding, checksum_format=checksum, max_shard_bytes=max_shard_bytes)
    assert counts == (4, 6)
    assert trainer_reads(out, old) == new
    with DeltaFolder(out) as delta:
        assert apply(delta, old, 100) == new and len(delta.folder.metadata) == (4 if max_shard_bytes == 1 else 1)
        assert delta.checksums == {
            name: digest for name, digest in digest_of_folder(b, checksum).tensors.items() if old[name] != new[name]
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "weight_v000004"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_law_12_of_a_trainers_tensors_diff_writes_what_it_writes_of_folders(
    pair: tuple[SafetensorsFolder, SafetensorsFolder], tmp_path: Path, encoding: str
) -> None:
    strided = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in random_tensors(1).items()}
    assert diff(*pair, tmp_path / "of folders", 4, 3, encoding=encoding) == (4, 6)
    for old in (random_tensors(0), pair[0]):
        assert diff(old, strided, tmp_path / type(old).__name__, 4, 3, encoding=encoding) == (4, 6)
        with DeltaFolder(tmp_path / "of folders") as one, DeltaFolder(tmp_path / type(old).__name__) as two:
            assert one.checksums == two.checksums and one.folder.index_metadata == two.folder.index_metadata
            assert all(torch.equal(one.folder.read(name), two.folder.read(name)) for name in one.checksums)
    with pytest.raises(DeltaError, match=r"x: a tensor is in one checkpoint only\n.*in the new step"):
        diff({}, {"x": torch.ones(1)}, tmp_path / "d", 4, 3)


def test_a_delta_of_nothing_is_empty(pair: tuple[SafetensorsFolder, SafetensorsFolder], tmp_path: Path) -> None:
    assert diff(pair[0], pair[0], tmp_path / "d", 1, 0) == (0, 6)
    with DeltaFolder(tmp_path / "d") as delta:
        assert delta.checksums == {}


def test_checksums_are_those_of_the_formats(pair: tuple[SafetensorsFolder, SafetensorsFolder]) -> None:
    for checksum, function in CHECKSUMS.items():
        assert digest_of_folder(pair[0], checksum).tensors == {
            name: function(plain(pair[0].read(name))) for name in pair[0].tensors
        }


def other(**change: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in {**random_tensors(1), **change}.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (other(g=None), "g: a tensor is in one checkpoint only\n.*in .*a\n.*Publish a full version"),
        (other(x=torch.ones(1)), "x: a tensor is in one checkpoint only\n.*in .*b"),
        (
            other(w=torch.zeros(40, 50, dtype=torch.uint8)),
            r"w: a tensor has another dtype or shape\n.*uint8 \[50, 40\]\n.*\[40, 50\]",
        ),
        (other(n=torch.zeros(32)), r"n: a tensor has another dtype or shape\n.*bfloat16 \[64\]\n.*float32 \[32\]"),
    ],
)
def test_checkpoints_that_do_not_match_have_no_delta(
    pair: tuple[SafetensorsFolder, SafetensorsFolder], tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    safetensors(tmp_path / "b" / "model.safetensors", tensors)
    with pytest.raises(DeltaError, match=message), SafetensorsFolder(tmp_path / "b") as b:
        diff(pair[0], b, tmp_path / "d", 1, 0)
    assert not (tmp_path / "d").exists() and len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_changes_while_it_is_compared_gives_no_delta(
    pair: tuple[SafetensorsFolder, SafetensorsFolder], tmp_path: Path
) -> None:
    safetensors(tmp_path / "new", random_tensors(2))
    (tmp_path / "new").replace(tmp_path / "b" / "model.safetensors")
    with pytest.raises(SourceError, match="replaced while it was read"):
        diff(*pair, tmp_path / "d", 1, 0)
    assert not (tmp_path / "d").exists()


def one_byte(length: int = 1) -> Tensor:
    return torch.zeros(length, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda out: DeltaWriter(out, 1, 0, encoding="add"), "unknown delta_encoding\n.*xor or overwrite\n.*'add'"),
        (lambda out: DeltaWriter(out, 1, 0, checksum_format="md5"), "unknown checksum_format\n.*adler32 or .*\n.*'md5'"),
        (lambda out: DeltaWriter(out, 1, 1), "versions out of order"),
        (lambda out: DeltaWriter(out.parent, 1, 0), "the folder is there already"),
        (
            lambda out: add(out, [("w", 2, [(one_byte(), one_byte())])]),
            "w: chunks of other lengths\n.*2 in all\n.*1 at least",
        ),
        (lambda out: add(out, [("w", 2, [(one_byte(), one_byte(2))])]), "w: chunks of other lengths"),
        (lambda out: add(out, [("w", 1, [(one_byte(), one_byte(2))])]), "w: chunks of other lengths"),
        (lambda out: add(out, [("w", 1, [(one_byte(), one_byte() + 1)])] * 2), "w: a tensor is written twice"),
        (lambda out: add(out, [("__metadata__", 1, [(one_byte(), one_byte() + 1)])]), "no tensor of a safetensors file"),
        (lambda out: add(out, [("w\ud800", 1, [(one_byte(), one_byte() + 1)])]), r"w\?: no tensor of a safetensors file"),
        (lambda out: add(out, [("w", 1 << 32, [])], encoding="overwrite"), "w: a tensor too large for positions of 32 bits"),
        (lambda out: add(out, [("w", 1, [(one_byte(), torch.zeros(1, 1))])]), "these are no plain bytes"),
    ],
)
def test_bad_use_of_the_writer_publishes_nothing(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(SourceError, match=message):
        write(tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write fails, those of buffers at the close too
    try:
        with pytest.raises(OSError, match="too large"):
            add(tmp_path / "d", [("w", 1, [(one_byte(), one_byte() + 1)])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(tmp_path.iterdir()) == []


def test_a_writer_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("link")

    with pytest.raises(DeltaError, match="link: the folder is there already"):
        DeltaWriter(tmp_path / "link", 1, 0)
    with pytest.raises(NotADirectoryError) as raised, DeltaWriter(tmp_path / "file" / "d", 1, 0):
        pass
    assert raised.value.filename == str(tmp_path / "file" / "d")


def test_a_name_is_not_compared_with_all_before_it(tmp_path: Path) -> None:
    """Experts are a hundred thousand names in tens of files."""
    compared = [0]

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return str.__eq__(self, other)

    with DeltaWriter(tmp_path / "d", 1, 0, checksum_format="adler32", max_shard_bytes=1) as writer:
        for number in range(60):
            writer.add(Name(number), 1, [(one_byte(), one_byte() + 1)])
    assert compared[0] < 600  # one with all before it: 1770
    with DeltaFolder(tmp_path / "d") as delta:
        assert set(delta.checksums) == set(map(str, range(60)))


def add(out: Path, tensors: list[tuple[str, int, list[tuple[Tensor, Tensor]]]], **options: str) -> None:
    with DeltaWriter(out, 1, 0, **options) as writer:
        for tensor in tensors:
            writer.add(*tensor)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_memory_is_pieces_not_tensors(encoding: str, tmp_path: Path) -> None:
    """A tensor of 24 MiB of which 0.3 % change, and all of them: Python and torch hold a few pieces at a time."""
    nbytes = 24 << 20
    new = torch.zeros(nbytes, dtype=torch.uint8)
    new[::333] = 7
    chunks = [(torch.zeros(1 << 20, dtype=torch.uint8), part) for part in new.chunk(24)]
    with DeltaWriter(tmp_path / "d", 1, 0, encoding=encoding, checksum_format="adler32") as writer:
        writer.add("w", nbytes, chunks)
    with DeltaFolder(tmp_path / "d") as delta:
        total, changes = 0, delta.changes("w", TensorSpec.of(new))
        tracemalloc.start()
        for start in range(0, nbytes, PIECE):
            change = changes.read(start, start + PIECE)
            assert change is not None
            held = change.values.nbytes + (0 if change.positions is None else change.positions.nbytes)
            assert held <= (PIECE if encoding == "xor" else 9 * (PIECE // 333 + 1))
            total += int(change.values.count_nonzero())
        changes.finish()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    assert total == len(range(0, nbytes, 333))
