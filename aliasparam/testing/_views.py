"""Views of every kind, drawn as data and done alike to a name and to the plain tensor that is its oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

_WIDER = {torch.uint8: torch.int16, torch.int8: torch.int32, torch.bfloat16: torch.int64, torch.int32: torch.uint8}
_WIDER |= {torch.float32: torch.complex64, torch.int16: torch.int8, torch.int64: torch.int32}
_SAME = {torch.uint8: torch.int8, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float8_e4m3fn: torch.uint8}

#: One step: its title, and what it does to a tensor.
Step = tuple[str, Callable[[Any], Any]]


@st.composite
def chains(draw: st.DrawFn, plain: Tensor) -> list[Step]:
    """Up to four view steps that ``plain`` can take."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 4))):
        step = draw(st.sampled_from(_KINDS))(draw, plain)
        if step is None:
            continue
        try:
            plain = step[1](plain)
        except RuntimeError:
            continue  # a view that torch cannot make of these strides
        steps.append(step)
    return steps


def followed(tensor: Any, steps: list[Step]) -> Any:
    for _, do in steps:
        tensor = do(tensor)
    return tensor


def titled(steps: list[Step]) -> str:
    return "".join(f".{title}" for title, _ in steps)


def _span(draw: Any, size: int) -> tuple[int, int]:
    first = draw(st.integers(0, max(size - 1, 0)))
    return first, draw(st.integers(min(first + 1, size), size))


def _dim(draw: Any, t: Tensor) -> int | None:
    return draw(st.integers(0, t.dim() - 1)) if t.dim() else None


def _narrow(draw: Any, t: Tensor) -> Step | None:
    if (dim := _dim(draw, t)) is None:
        return None
    first, last = _span(draw, t.shape[dim])
    return f"narrow({dim}, {first}, {last - first})", lambda x: x.narrow(dim, first, last - first)


def _slice(draw: Any, t: Tensor) -> Step | None:
    if not t.dim():
        return None
    first, last = _span(draw, t.shape[0])
    return f"[{first}:{last}]", lambda x: x[first:last]


def _steps(draw: Any, t: Tensor) -> Step | None:
    if (dim := _dim(draw, t)) is None:
        return None
    index = (*[slice(None)] * dim, slice(draw(st.integers(0, 1)), None, draw(st.integers(2, 3))))
    return f"[{index}]", lambda x: x[index]


def _select(draw: Any, t: Tensor) -> Step | None:
    if (dim := _dim(draw, t)) is None or not t.shape[dim]:
        return None
    at = draw(st.integers(0, t.shape[dim] - 1))
    return f"select({dim}, {at})", lambda x: x.select(dim, at)


def _permute(draw: Any, t: Tensor) -> Step | None:
    order = draw(st.permutations(range(t.dim())))
    return f"permute({order})", lambda x: x.permute(order)


def _unfold(draw: Any, t: Tensor) -> Step | None:
    if (dim := _dim(draw, t)) is None or not t.shape[dim]:
        return None
    size = draw(st.integers(1, t.shape[dim]))
    step = draw(st.integers(size, size + 1))  # beside each other: overlapping ones have a test of their own
    return f"unfold({dim}, {size}, {step})", lambda x: x.unfold(dim, size, step)


def _as_strided(draw: Any, t: Tensor) -> Step | None:
    if t.dim() < 2 or not t.numel():
        return None
    shape = [draw(st.integers(1, n)) for n in t.shape[-2:]]
    strides, offset = list(t.stride()[-2:]), t.storage_offset()
    return f"as_strided({shape}, {strides}, {offset})", lambda x: x.as_strided(shape, strides, offset)


def _flatten(draw: Any, t: Tensor) -> Step | None:
    return "view(-1)", lambda x: x.view(-1)


def _same_width(draw: Any, t: Tensor) -> Step | None:
    other = _SAME.get(t.dtype)
    return None if other is None else (f"view({other})", lambda x: x.view(other))


def _other_width(draw: Any, t: Tensor) -> Step | None:
    other = _WIDER.get(t.dtype)
    return None if other is None or not t.dim() or t.is_neg() else (f"view({other})", lambda x: x.view(other))


def _conj(draw: Any, t: Tensor) -> Step | None:
    return ("conj()", lambda x: x.conj()) if t.is_complex() else None


def _neg(draw: Any, t: Tensor) -> Step | None:
    return ("conj().imag", lambda x: x.conj().imag) if t.is_complex() else None


def _detach(draw: Any, t: Tensor) -> Step | None:
    return draw(st.sampled_from([("detach()", lambda x: x.detach()), ("data", lambda x: x.data)]))  # type: ignore[no-any-return]


_KINDS = [
    _narrow,
    _slice,
    _steps,
    _select,
    _permute,
    _unfold,
    _as_strided,
    _flatten,
    _same_width,
    _other_width,
    _conj,
    _neg,
    _detach,
]
