"""A layout for one checkpoint tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from .bound import BoundLayout
from .layout import Layout

_identity = lru_cache(Layout.identity)


class Bindable(Protocol):
    """Layout, IndexLayout, OpaqueLayout."""

    def bind(self, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout: ...


#: While somebody has them: tables and functions are kept by nothing else.
_bound: WeakValueDictionary[tuple[Bindable, tuple[int, ...], torch.dtype], BoundLayout] = WeakValueDictionary()


def bound_to(layout: Bindable | None, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout:
    """``layout`` for one checkpoint tensor; None is checkpoint order, the whole tensor as one region.

    The same object for equal arguments, so storages of one layout and shape share what is kept with it.
    """
    key = (_identity(len(shape)) if layout is None else layout, shape, dtype)
    found = _bound.get(key)
    if found is None:
        found = _bound[key] = key[0].bind(shape, dtype)
    return found
