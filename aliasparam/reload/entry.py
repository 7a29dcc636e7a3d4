"""One tensor in a file, read by boxes, or by bytes."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import host_bytes
from ..layout.boxes import Box, row_major, sizes, whole, within
from .errors import SourceError
from .held_file import HeldFile

#: Storage is read by pages: what lies between two segments closer than this costs no more than a call for each.
_PAGE = 4096
_SCRATCH = 1 << 20


class Entry(NamedTuple):
    """One tensor as a header describes it; its bytes are ``begin`` to ``begin + nbytes`` of ``file``."""

    name: str
    file: HeldFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def fill(self, out: Tensor, start: int) -> None:
        """Fill ``out`` (uint8 [n], contiguous, on the host) with bytes of the tensor, from its byte ``start`` on."""
        self.file.read_into(out, self.begin + start)

    def checked(self, box: Box | None) -> Box:
        """``box`` (None: everything), which must be within the tensor.

        Raises:
            SourceError: it is not.
        """
        if box is None:
            return whole(self.shape)
        if not within(box, self.shape):
            raise SourceError(
                "the tensor does not have this part",
                name=f"{self.file.path}: {self.name}",
                expected=f"a (start, stop) within each dim of {list(self.shape)}",
                found=repr(box)[:80],
            )
        return box

    def read(self, box: Box, buffer: Tensor | None = None) -> Tensor:
        """The values of the box, in memory of their own, or at the begin of ``buffer`` (uint8 [n], contiguous, on the host).

        Only its ranges are read; columns that lie less than a page apart are read with what is between them.
        """
        nbytes = math.prod(sizes(box)) * self.dtype.itemsize
        out = host_bytes(nbytes) if buffer is None else buffer[:nbytes]
        if nbytes:
            self._fill_box(box, out)
        return out.view(self.dtype).view(sizes(box))

    def _fill_box(self, box: Box, out: Tensor) -> None:
        cut = next((dim for dim in reversed(range(len(box))) if box[dim] != (0, self.shape[dim])), 0)
        strides = [stride * self.dtype.itemsize for stride in row_major(self.shape)]
        first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
        counts = sizes(box)
        segment = out.numel() // math.prod(counts[:cut])  # bytes that lie together
        if cut == 0:
            self.fill(out, first)
            return
        rows, outer = counts[cut - 1], counts[: cut - 1]
        for index, part in zip(itertools.product(*map(range, outer)), out.view(-1, rows, segment), strict=True):
            self._fill_rows(first + sum(i * stride for i, stride in zip(index, strides, strict=False)), strides[cut - 1], part)

    def _fill_rows(self, first: int, stride: int, out: Tensor) -> None:
        """``out`` [rows, segment]: row i is at ``first + i * stride``."""
        rows, segment = out.shape
        if stride - segment > _PAGE:
            for index in range(rows):
                self.fill(out[index], first + index * stride)
            return
        step = max(1, _SCRATCH // stride)
        scratch = out.new_empty(min(step, rows) * stride)
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            got = (count - 1) * stride + segment
            self.fill(scratch[:got], first + begin * stride)
            out[begin : begin + count] = scratch.as_strided((count, segment), (stride, 1))
