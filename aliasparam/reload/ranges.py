"""A box of a tensor, read as byte ranges of its file."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..layout.boxes import Box, row_major, sizes, whole, within
from .errors import SourceError
from .header import Entry

#: Storage is read by pages: what lies between two segments closer than this costs no more than a call for each.
_PAGE = 4096
_SCRATCH = 1 << 20


def checked_box(entry: Entry, box: Box | None) -> Box:
    """``box`` (None: everything), which must be within the tensor.

    Raises:
        SourceError: it is not.
    """
    if box is None:
        return whole(entry.shape)
    if not within(box, entry.shape):
        raise SourceError(
            "the tensor does not have this part",
            name=f"{entry.file.path}: {entry.name}",
            expected=f"a (start, stop) within each dim of {list(entry.shape)}",
            found=repr(box)[:80],
        )
    return box


def read_box(entry: Entry, box: Box, buffer: Tensor | None = None) -> Tensor:
    """The values of the box, in memory of their own, or at the begin of ``buffer`` (uint8 [n], contiguous, on the host).

    Only its ranges are read; columns that lie less than a page apart are read with what is between them.
    """
    nbytes = math.prod(sizes(box)) * entry.dtype.itemsize
    out = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer[:nbytes]
    if nbytes:
        _fill(entry, box, out)
    return out.view(entry.dtype).view(sizes(box))


def _fill(entry: Entry, box: Box, out: Tensor) -> None:
    cut = next((dim for dim in reversed(range(len(box))) if box[dim] != (0, entry.shape[dim])), 0)
    strides = [stride * entry.dtype.itemsize for stride in row_major(entry.shape)]
    offset = entry.begin + sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    counts = sizes(box)
    segment = out.numel() // math.prod(counts[:cut])  # bytes that lie together
    if cut == 0:
        entry.file.read_into(out, offset)
        return
    rows, outer = counts[cut - 1], counts[: cut - 1]
    for index, part in zip(itertools.product(*map(range, outer)), out.view(-1, rows, segment), strict=True):
        begin = offset + sum(i * stride for i, stride in zip(index, strides, strict=False))
        _read_rows(entry, begin, strides[cut - 1], part)


def _read_rows(entry: Entry, begin: int, stride: int, out: Tensor) -> None:
    """``out`` [rows, segment]: row i is at ``begin + i * stride``."""
    rows, segment = out.shape
    if stride - segment > _PAGE:
        for index in range(rows):
            entry.file.read_into(out[index], begin + index * stride)
        return
    step = max(1, _SCRATCH // stride)
    scratch = out.new_empty(min(step, rows) * stride)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        got = (count - 1) * stride + segment
        entry.file.read_into(scratch[:got], begin + first * stride)
        out[first : first + count] = scratch.as_strided((count, segment), (stride, 1))
