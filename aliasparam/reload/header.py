"""The header of a safetensors file: bounded before it is read, and every field of it checked, in linear time.

Format (safetensors README): 8 bytes little-endian length, that many bytes of JSON, then the data; ``data_offsets`` count
from the data's begin, and tensors lie one after another without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NoReturn, TypeGuard

import torch

from .collector import collector_paused
from .entry import Entry
from .errors import SourceError
from .held_file import HeldFile

#: safetensors refuses longer headers (``MAX_HEADER_SIZE`` in its tensor.rs).
MAX_JSON_BYTES = 100_000_000

#: torch's own limit (``MAX_TENSORITER_DIMS``); the product of a million sizes would take hours.
_MAX_DIMS = 64

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip


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
