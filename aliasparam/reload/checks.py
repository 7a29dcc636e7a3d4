"""What a session checks: the order of its steps, and whether an incoming tensor fits the live one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from operator import index
from typing import Any

from torch import Tensor

from ..errors import ReloadError
from ..layout.boxes import shown, sizes, whole, within
from ..spec import TensorSpec, other_kind
from ..storage.coverage import Box


def box_of(module: str, name: str, live: Tensor, value: Tensor, first_row: int | None, box: Box | None) -> Box:
    """The rectangle of ``live`` that ``value`` is for.

    Raises:
        ReloadError: rows and a rectangle at once.
    """
    if box is not None and first_row is not None:
        found = f"{first_row=}, {box=}"[:120]
        raise ReloadError("rows and a rectangle at once", module=module, name=name, expected="first_row or box", found=found)
    if box is not None:
        return tuple((index(a), index(b)) for a, b in box)
    if first_row is None or not live.shape:
        return whole(live.shape)
    return ((index(first_row), first_row + (value.shape[0] if value.dim() else 1)), *whole(live.shape[1:]))


def need_dense(module: str, name: str, value: Any, whose: str) -> None:
    """
    Raises:
        ReloadError: not a tensor whose values lie at strides.
    """
    if (found := other_kind(value)) is not None:
        expected = "a dense tensor"
        raise ReloadError(f"{whose} is of a kind that is not reloaded", module=module, name=name, expected=expected, found=found)


def need_fit(module: str, name: str, live: Tensor, value: Tensor, box: Box) -> None:
    """
    Raises:
        ReloadError: another shape or dtype, no values, or a rectangle that is not within the tensor.
    """
    if within(box, live.shape) and tuple(value.shape) == sizes(box) and value.dtype == live.dtype and value.device.type != "meta":
        return
    raise ReloadError(
        "the new tensor does not fit",
        module=module,
        name=name,
        expected=f"{TensorSpec.of(live)}" + ("" if value.dim() and sizes(box) == tuple(live.shape) else f", {shown(box)} of it"),
        found=f"{TensorSpec.of(value)}{' on meta' if value.device.type == 'meta' else ''}",
        remedy="Send it in the shape and dtype of the checkpoint that was loaded first.",
    )


class Phase(Enum):
    """COMMITTING: in its switch or commit, where hooks and derivations run. Only an abort may come between."""

    NEW = "not begun"
    OPEN = "open"
    PREPARED = "prepared"
    COMMITTING = "being committed"
    SWITCHED = "switched"
    ENDED = "ended"


def need(label: str, phase: Phase, wanted: Sequence[Phase], doing: str) -> None:
    """Raise ReloadError where a reload of the model ``label`` is in none of the ``wanted`` phases."""
    if phase in wanted:
        return
    raise ReloadError(
        f"cannot {doing}: this reload is {phase.value}",
        module=label,
        expected=f"a reload that is {' or '.join(one.value for one in wanted)}",
        found=phase.value,
        remedy="The order is begin, update, prepare, commit; or use it inside `with reload(model) as r:`.",
    )
