"""The aliased tensors among an operator's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..spec import instances_in


class Types:
    """The tensor classes, filled in by faces.py."""

    aliased: tuple[type, ...] = ()
    view: Callable[[Any, Tensor], Tensor]


def mapped_one(change: Callable[[Any], Tensor], value: Any) -> Any:
    if isinstance(value, Types.aliased):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped_one(change, v) for v in value)
    return value


def mapped(change: Callable[[Any], Tensor], args: tuple[Any, ...]) -> list[Any]:
    return [mapped_one(change, a) for a in args]


def mapped_kwargs(change: Callable[[Any], Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: mapped_one(change, v) for k, v in kwargs.items()} if kwargs else kwargs


def aliased_in(values: Any) -> Iterator[Any]:
    return instances_in(values, Types.aliased)
