"""The Triton copy beside torch's, in the interpreter or on a GPU: ``python -m tests.aliasparam.triton_copy_cases``."""

from __future__ import annotations

import os
import random
import zlib

import torch

from aliasparam.layout import Layout, triton_copy, triton_sum
from aliasparam.layout.boxes import Box, pieces, row_major, whole
from aliasparam.layout.execute import plan, views
from aliasparam.layout.strided import StridedLayout
from aliasparam.storage.shards import Shard, planned

LINES = [
    ("(g b a) k -> g a b k, a=4 b=8", (2, 96, 24)),
    ("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4", (2, 300, 36)),
    ("(h (i r4 b a)) (k m c4) -> i k m a ~h b r4 c4, h=2 r4=4 b=8 a=2 m=2 c4=4", (2, 300, 10)),
    ("(n w b1 q l) (k b0 p) -> k (n q l p w b1 b0), w=2 b1=2 q=2 l=8 b0=2 p=4", (128, 72)),
    ("(m a) (k c) -> k (m a) c, a=4 c=4", (3, 130, 6)),
    ("n k -> k n", (300, 90)),
]


def main() -> None:
    triton_copy.SMALLEST = 0
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    for text, shape in LINES:
        for dtype in (torch.uint8, torch.int32):
            bound = Layout(text).bind(shape, dtype)
            value = torch.randint(0, 100, shape, dtype=dtype, device=device)
            memory = torch.zeros(bound.regions * bound.region_capacity, dtype=dtype, device=device)
            expected = torch.zeros_like(memory)
            bound.write(expected, bound.whole, value)
            by_triton(bound, memory, value, write=True)
            assert torch.equal(memory, expected), (text, dtype, "write")
            shards_by_triton(bound, memory.zero_(), value)
            assert torch.equal(memory, expected), (text, dtype, "shards")
            back = torch.zeros_like(value)
            by_triton(bound, memory, back, write=False)
            assert torch.equal(back, value), (text, dtype, "read")
            box = tuple((n // 3, n) for n in shape)
            part = value[tuple(slice(*ends) for ends in box)].contiguous()
            assert adler32(sums_by_triton(bound, memory, box), part.nbytes) == zlib.adler32(part.cpu().numpy().tobytes())
    print(len(LINES), "lines")


def by_triton(bound: StridedLayout, memory: torch.Tensor, value: torch.Tensor, *, write: bool) -> None:
    found = pieces(bound.lines, bound.shape, bound.whole, value.stride())
    copies = plan(found, bound.dtype.itemsize, random.choice([4, 8]), backward=0)
    for copy in copies:
        triton_copy.run(copy, *views(copy.start, memory, 0, value), write=write)


def shards_by_triton(bound: StridedLayout, memory: torch.Tensor, value: torch.Tensor) -> None:
    """As ``AliasedStorage.write_shard`` does on a GPU, region by region."""
    parts = value.view(bound.regions, *bound.shape[bound.lead :])
    form = parts[0].shape, parts[0].stride()
    align = bound.region_capacity * memory.itemsize | random.choice([4, 8])
    box, moves = planned(bound, (0, *form, *form, align & -align, True)) or (None, [])
    assert box[bound.lead :] == bound.whole[bound.lead :] and all(move.by_kernel for move in moves if len(move.copy.sizes) > 1)
    shard = Shard(box, moves, memory, bound)
    for region, part in enumerate(parts):
        shard.write(region, part)


def sums_by_triton(bound: StridedLayout, memory: torch.Tensor, box: Box) -> list[int]:
    """As ``StridedLayout.positional_sums`` does on a GPU, which it asks there."""
    if memory.is_cuda:
        found = bound.positional_sums(memory, box)
        assert found is not None
        return found.tolist()
    sizes = [stop - start for start, stop in box]
    first = sum(start * stride for (start, _), stride in zip(box, bound.lead_strides, strict=False))
    align = (first * memory.element_size() | 4) & -(first * memory.element_size() | 4)
    from_first = *whole(sizes[: bound.lead]), *box[bound.lead :]
    found = pieces(bound.lines, bound.shape, from_first, row_major(sizes))
    copies = plan(found, memory.element_size(), align, 4, 0)
    sums = [triton_sum.sums(copy, views(copy.start, memory, first, memory)[0]) for copy in copies]
    return torch.stack(sums).sum(0).tolist()


def adler32(sums: list[int], nbytes: int) -> int:
    plain, weighted = sums
    return (nbytes + nbytes * plain - weighted) % 65521 << 16 | (1 + plain) % 65521


if __name__ == "__main__":
    main()
