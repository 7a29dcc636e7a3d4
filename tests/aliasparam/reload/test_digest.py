"""adler32 from sums over position and value equals zlib's, in any order and any pieces (law 12)."""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam.reload import CheckpointDigest
from aliasparam.reload import digest as digest_module
from aliasparam.reload.digest import PositionalAdler32, sums_of_run
from aliasparam.reload.errors import DeltaError


def of(data: bytes, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8, device=device)


def adler(data: bytes) -> str:
    return f"{zlib.adler32(data):08x}"


@given(data=st.binary(max_size=3000), seed=st.integers(0, 1 << 30), piece=st.sampled_from([256, 512, 1 << 20]))
def test_law_12_any_order_any_pieces(data: bytes, seed: int, piece: int) -> None:
    rng, total = random.Random(seed), len(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "_PIECE", piece)
        sums, other = PositionalAdler32(), PositionalAdler32()
        at = 0
        runs = []
        while at < total:
            stop = min(total, at + rng.randint(1, 900))
            runs.append((at, stop))
            at = stop
        rng.shuffle(runs)
        for start, stop in runs:
            add(rng.choice([sums, other]), of(data[start:stop]), start, by_torch=rng.random() < 0.5)
        sums.merge_sums(other.count, other.sums())
    assert sums.hexdigest(total) == adler(data)


def add(to: PositionalAdler32, run: torch.Tensor, start: int, *, by_torch: bool) -> None:
    """Also as on a device that has no kernel for it."""
    if by_torch:
        plain, weighted = sums_of_run(run)
        to.add_sums(run.numel(), torch.stack((plain, weighted + start * plain)))
    else:
        to.add(run, start)


@given(data=st.binary(min_size=1, max_size=600), seed=st.integers(0, 1 << 30), runs=st.integers(0, 3))
def test_law_12_a_known_digest_is_corrected_for_what_changes(data: bytes, seed: int, runs: int) -> None:
    rng = random.Random(seed)
    new = bytearray(data)
    sums = PositionalAdler32()
    sums.add(of(data), 0)
    for _ in range(runs):
        start = rng.randrange(len(data))
        values = rng.randbytes(rng.randint(1, len(data) - start))
        old = of(new[start : start + len(values)])
        if rng.random() < 0.5:
            sums.add(old, start, sign=-1)
            sums.add(of(values), start)
        else:
            sums.change(old, of(values), torch.arange(start, start + len(values)))
        new[start : start + len(values)] = values
    assert sums.hexdigest(len(data)) == adler(bytes(new))


def test_sums_are_exact_at_their_largest(device: torch.device) -> None:
    """All bytes 255, far into a large tensor, several pieces; also where no kernel sums a run."""
    data = b"\xff" * (3 * (1 << 20) + 77)
    run = of(b"\xff" * 512, device).repeat(len(data) // 512 + 1)[: len(data)]
    for by_torch in (True, False):
        whole = PositionalAdler32()
        add(whole, run, 0, by_torch=by_torch)
        assert whole.hexdigest(len(data)) == adler(data)
    far = PositionalAdler32()
    start = (1 << 40) + 12345
    far.add(of(bytes(range(256)) * 4, device), start)
    assert far.sums()[1] == sum((start + i) * (i % 256) for i in range(1024)) % 65521


def test_a_part_has_no_digest() -> None:
    sums = PositionalAdler32()
    sums.add(of(b"abc"), 0)
    with pytest.raises(DeltaError, match=r"a digest of a part of a tensor\n.*4 bytes\n.*3 bytes"):
        sums.hexdigest(4)


def whole(tensors: list[tuple[str, torch.dtype, tuple[int, ...], str]]) -> str:
    return CheckpointDigest.of("adler32", tensors).whole


def test_the_digest_of_a_checkpoint_is_of_all_that_is_in_it() -> None:
    one = [("a", torch.float32, (2, 3), "00"), ("b", torch.bfloat16, (), "11")]
    others = [
        [("a", torch.float32, (2, 3), "00"), ("b", torch.bfloat16, (1,), "11")],
        [("a", torch.float32, (2, 3), "01"), ("b", torch.bfloat16, (), "11")],
        [("a", torch.float32, (2, 3), "00"), ("b", torch.float16, (), "11")],
        [("a", torch.float32, (2, 3), "00"), ("c", torch.bfloat16, (), "11")],
        one[:1],
    ]
    assert whole(one) == whole(one[::-1])
    assert len({whole(one), *map(whole, others)}) == 6
