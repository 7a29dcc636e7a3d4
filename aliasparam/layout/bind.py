"""A layout for one checkpoint tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch

from .bound import BoundLayout
from .layout import Layout

_identity = lru_cache(Layout.identity)


class Bindable(Protocol):
    """Layout, IndexLayout, OpaqueLayout."""

    def bind(self, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout: ...


def bound_to(layout: Bindable | None, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout:
    """``layout`` for one checkpoint tensor; None is checkpoint order, the whole tensor as one region.

    The same object for the same arguments, so storages of one layout and shape share what is kept with it.
    """
    return (_identity(len(shape)) if layout is None else layout).bind(shape, dtype)
