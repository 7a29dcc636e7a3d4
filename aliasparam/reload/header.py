"""The tensors of a safetensors file, read by boxes or by bytes, and its header: bounded before it is read, and every field of it
checked, in linear time.

Format (safetensors README): 8 bytes little-endian length, that many bytes of JSON, then the data; ``data_offsets`` count
from the data's begin, and tensors lie one after another without holes.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from ..host import host_bytes
from ..layout.boxes import Box, box_in, row_major, sizes, whole
from .collector import collector_paused
from .errors import SourceError
from .held_file import HeldFile, memory_of

#: safetensors refuses longer headers (``MAX_HEADER_SIZE`` in its tensor.rs).
MAX_JSON_BYTES = 100_000_000

#: torch's own limit (``MAX_TENSORITER_DIMS``); the product of a million sizes would take hours.
_MAX_DIMS = 64

#: Storage is read by pages: what lies between two segments closer than this costs no more than a call for each.
_PAGE = 4096
_SCRATCH = 1 << 20

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip


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
        self.file.read_into(memory_of(out), self.begin + start)

    def checked(self, box: Box | None) -> Box:
        """``box`` (None: everything), which must be within the tensor.

        Raises:
            SourceError: it is not.
        """
        if box is None:
            return whole(self.shape)
        if (found := box_in(box, self.shape)) is None:
            raise SourceError(
                "the tensor does not have this part",
                name=f"{self.file.path}: {self.name}",
                expected=f"a (start, stop) within each dim of {list(self.shape)}",
                found=repr(box)[:80],
            )
        return found

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


def read_header(file: HeldFile) -> tuple[list[Entry], dict[str, str]]:
    """(tensors in the order of their bytes, ``__metadata__``) of a file.

    Raises:
        SourceError: truncated, no safetensors file, or a field that is not what the format says.
    """
    text = _header_text(file)
    with collector_paused():
        header = parse_json(text, file.path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise SourceError("__metadata__ is not text by text", name=str(file.path), found=repr(metadata)[:80])
        entries = [_entry(file, name, info, 8 + len(text)) for name, info in header.items()]
        entries.sort(key=attrgetter("begin", "nbytes"))
        _check_places(file, entries, 8 + len(text))
    return entries, metadata


def parse_json(text: bytes, where: object) -> dict[str, Any]:
    """A JSON object without duplicate keys. ``where`` it is from is shown in errors.

    Raises:
        SourceError: not JSON, nested absurdly, numbers of absurd length, a key twice, or no object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise SourceError("a name is there twice", name=f"{where}: {twice[:120]}")
        return fields

    def no_number(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not a JSON number")

    # Python objects weigh many times their text; lists in lists are the worst, and no header or index is made of them.
    if text.count(b"[") + text.count(b"{") > 64 + len(text) // 8:
        raise SourceError("its JSON cannot be read: nothing but brackets", name=str(where))
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
        if b"\\u" in text:  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, integers of thousands of digits; nested
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise SourceError(f"its JSON cannot be read: {reason}", name=str(where)) from None
    if not isinstance(value, dict):
        raise SourceError("its JSON is not an object", name=str(where), found=type(value).__name__)
    return value


def _header_text(file: HeldFile) -> bytes:
    (length,) = struct.unpack("<Q", file.read(0, 8)) if file.size >= 8 else (0,)
    if length > MAX_JSON_BYTES:
        raise SourceError(
            "the file is not a safetensors file, or its header is too long",
            name=str(file.path),
            expected=f"a header of at most {MAX_JSON_BYTES} bytes",
            found=f"{length} bytes",
        )
    if 8 + length > file.size:
        raise SourceError(
            "the file is truncated or not a safetensors file",
            name=str(file.path),
            expected=f"a header of {length} bytes after the first 8",
            found=f"{file.size} bytes in the file",
        )
    return file.read(8, length)


def _entry(file: HeldFile, name: str, info: Any, start: int) -> Entry:
    fields = info if isinstance(info, dict) and len(info) == 3 else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(kind, str) or not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        where, expected = f"{file.path}: {name}", "dtype, shape and data_offsets"
        raise SourceError("an entry of the header is not one", name=where, expected=expected, found=repr(info)[:80])
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise SourceError("unknown dtype", name=f"{file.path}: {name}", expected=", ".join(DTYPES), found=kind[:80])
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if not can_be(shape):
        raise SourceError("a tensor of this size cannot be", name=f"{file.path}: {name}", found=repr(shape)[:80])
    if end - begin != nbytes:
        raise SourceError(
            "a tensor's bytes do not match its shape",
            name=f"{file.path}: {name}",
            expected=f"{nbytes} bytes for {kind} {list(shape)}",
            found=f"{end - begin} bytes",
        )
    return Entry(name, file, dtype, tuple(shape), start + begin, nbytes)


def _check_places(file: HeldFile, entries: list[Entry], start: int) -> None:
    """Tensors, sorted by their begin, follow one another from the data's begin to the file's end."""
    at, before = start, "the header"
    for entry in entries:
        if entry.begin != at:
            raise SourceError(
                "two tensors overlap" if entry.begin < at else "there is a hole between tensors",
                name=f"{file.path}: {entry.name}",
                expected=f"data from byte {at - start} on, where {before} ends",
                found=f"from byte {entry.begin - start} on",
            )
        at, before = at + entry.nbytes, entry.name
    if at != file.size:
        raise SourceError(
            "the file is truncated" if at > file.size else "the file goes on behind its last tensor",
            name=f"{file.path}: {before}",
            expected=f"{at} bytes in the file",
            found=f"{file.size} bytes",
            remedy="Copy or export the checkpoint again.",
        )


def is_sizes(value: Any) -> TypeGuard[list[int]]:
    if type(value) is not list or len(value) > _MAX_DIMS:
        return False
    for size in value:  # noqa: SIM110 - a generator costs as much as all the rest of an entry
        if type(size) is not int or size < 0:
            return False
    return True


def can_be(shape: Sequence[int]) -> bool:
    """Whether torch has a tensor of this shape: strides are of 64 bits, also where nothing is in it."""
    return 0 not in shape or math.prod(size or 1 for size in shape) < 1 << 59
