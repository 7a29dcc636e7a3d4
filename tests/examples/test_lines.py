"""The examples' lines: version 0.1's bytes, frozen as checksums."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from aliasparam.layout import Layout
from examples import lines

#: (shape, dtype, crc32 of version 0.1's kernel bytes)
CASES: list[tuple[str, tuple[int, ...], torch.dtype, int]] = [
    ("AWQ_WEIGHT", (64, 16), torch.int32, 0x1720BC5F),
    ("AWQ_WEIGHT", (3, 32, 24), torch.int32, 0xF52E093C),
    ("GPTQ_WEIGHT", (8, 128), torch.int32, 0xDA362FEB),
    ("MARLIN_SCALES", (3, 128), torch.float16, 0x21AB6BD0),
    ("AWQ_ZEROS", (3, 16), torch.int32, 0x44D43C46),
    ("MXFP4_W13", (2, 96, 20), torch.uint8, 0x6C045F80),
    ("MXFP4_W13_SCALE", (2, 256, 6), torch.uint8, 0x7D2D42BB),
    ("MXFP4_W13_SCALE", (2, 160, 6), torch.uint8, 0xC09EA792),
    ("MXFP4_W2", (2, 96, 20), torch.uint8, 0x1DBCC38B),
    ("MXFP4_W2_SCALE", (2, 160, 6), torch.uint8, 0xB3A90AB4),
    ("PACKED_UE8M0", (2, 129, 6), torch.uint8, 0xC9F9888C),
    ("PACKED_UE8M0", (200, 8), torch.uint8, 0xEC9B4780),
    ("W13_UP_GATE", (3, 8, 6), torch.bfloat16, 0x9074C7A6),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "crc"), CASES, ids=[f"{name} {shape}" for name, shape, _, _ in CASES])
def test_bytes_are_those_of_version_01(name: str, shape: tuple[int, ...], dtype: torch.dtype, crc: int) -> None:
    layout: Layout = getattr(lines, name)
    value = numbered(shape, dtype)
    bound = layout.bind(shape, dtype)
    memory = torch.zeros(bound.regions * bound.region_capacity, dtype=dtype)

    bound.write(memory, bound.whole, value)

    assert zlib.crc32(memory.view(torch.uint8).numpy().tobytes()) == crc
    assert torch.equal(bound.read(memory, bound.whole).view(torch.uint8), value.view(torch.uint8))


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Bytes that look random and are never zero, which is padding."""
    count = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.int64)
    return ((count * 2654435761 >> 11) % 255 + 1).to(torch.uint8).view(dtype).view(shape)
