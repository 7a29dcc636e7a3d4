"""Kernel bytes of a tensor that no layer has."""

from __future__ import annotations

from torch import Tensor

from aliasparam import Layout


def ordered(layout: Layout, values: Tensor) -> Tensor:
    """``values`` in the order of ``layout``, of its kernel shape."""
    return layout.bind(values.shape, values.dtype).encode(values)
