"""adler32 from (position, value) pairs equals zlib's, in any order and any pieces (law 12)."""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam.reload import digest as digest_module
from aliasparam.reload.digest import PositionalAdler32, whole_digest
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
            to = rng.choice([sums, other])
            if rng.random() < 0.5:
                to.add_run(of(data[start:stop]), start)
            else:
                order = rng.sample(range(start, stop), stop - start)
                to.add(of(bytes(data[i] for i in order)), torch.tensor(order))
        sums.merge_sums(other.count, other.sums())
    assert sums.hexdigest(total) == adler(data)


@given(data=st.binary(min_size=1, max_size=600), seed=st.integers(0, 1 << 30))
def test_law_12_a_known_digest_is_corrected_for_what_changes(data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    where = sorted(rng.sample(range(len(data)), rng.randint(0, len(data))))
    new = bytearray(data)
    for i in where:
        new[i] = rng.randrange(256)
    sums = PositionalAdler32()
    sums.add_run(of(data), 0)
    positions = torch.tensor(where, dtype=torch.int64)
    sums.add(of(bytes(data[i] for i in where)), positions, sign=-1)
    sums.add(of(bytes(new[i] for i in where)), positions)
    assert sums.hexdigest(len(data)) == adler(bytes(new))


def test_sums_are_exact_at_their_largest(device: torch.device) -> None:
    """All bytes 255, far into a large tensor, several pieces; also where no kernel sums a run."""
    data = b"\xff" * (3 * (1 << 20) + 77)
    run = of(b"\xff" * 512, device).repeat(len(data) // 512 + 1)[: len(data)]
    whole, scattered = PositionalAdler32(), PositionalAdler32()
    whole.add_run(run, 0)
    scattered.add(run, torch.arange(len(data), device=device))
    assert whole.hexdigest(len(data)) == scattered.hexdigest(len(data)) == adler(data)
    far = PositionalAdler32()
    start = (1 << 40) + 12345
    far.add_run(of(bytes(range(256)) * 4, device), start)
    assert far.sums()[1] == sum((start + i) * (i % 256) for i in range(1024)) % 65521


def test_a_part_has_no_digest() -> None:
    sums = PositionalAdler32()
    sums.add_run(of(b"abc"), 0)
    with pytest.raises(DeltaError, match=r"a digest of a part of a tensor\n.*4 bytes\n.*3 bytes"):
        sums.hexdigest(4)


def test_the_digest_of_a_checkpoint_is_of_all_that_is_in_it() -> None:
    one = [("a", torch.float32, (2, 3), "00"), ("b", torch.bfloat16, (), "11")]
    others = [
        [("a", torch.float32, (2, 3), "00"), ("b", torch.bfloat16, (1,), "11")],
        [("a", torch.float32, (2, 3), "01"), ("b", torch.bfloat16, (), "11")],
        [("a", torch.float32, (2, 3), "00"), ("b", torch.float16, (), "11")],
        [("a", torch.float32, (2, 3), "00"), ("c", torch.bfloat16, (), "11")],
        one[:1],
    ]
    assert whole_digest(one) == whole_digest(one[::-1])
    assert len({whole_digest(one), *map(whole_digest, others)}) == 6
