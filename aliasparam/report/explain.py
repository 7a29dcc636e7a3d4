"""`explain`: what each declared name shares memory with, why, in what order, and what it costs."""

from __future__ import annotations

from torch import nn

from ..module.registry import registries
from .explanation import Explanation
from .rows import ExplainedModule


def explain(module: nn.Module) -> Explanation:
    """What each declared name of ``module`` (and of modules in it) shares memory with, why, and what it costs.

    The result is text; its ``modules`` are the same as data, and ``picture()`` draws them. A notebook shows the drawing.
    """
    found, seen = registries(module), set[int]()
    paths = {id(m): path for path, m in module.named_modules()}
    return Explanation.of(ExplainedModule.of(path or r.label, r, r.about, seen, paths) for path, r in found)
