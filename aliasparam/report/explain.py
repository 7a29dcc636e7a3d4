"""`explain`: what each declared name shares memory with, why, in what order, and what it costs: as data, text and a drawing."""

from __future__ import annotations

from torch import nn

from ..module.registry import registries
from .diagram import diagram
from .rows import ExplainedModule

#: Modules that a notebook draws; the rest is one line.
SHOWN = 12


class Explanation(str):
    """The text of :func:`~aliasparam.explain`; ``modules`` holds what it says as data."""

    modules: tuple[ExplainedModule, ...] = ()

    def picture(self, most: int | None = None) -> str:
        """SVG, which needs no package: each storage between its checkpoint names and its kernel name, with line, state, version.

        Args:
            most: modules to draw, None for all; the picture says how many it left out.
        """
        return diagram(self.modules, most)

    def _repr_html_(self) -> str:
        return self.picture(SHOWN)


def explain(module: nn.Module) -> Explanation:
    """What each declared name of ``module`` (and of modules in it) shares memory with, why, and what it costs.

    The result is text; its ``modules`` are the same as data, and ``picture()`` draws them. A notebook shows the drawing.
    """
    declared, seen = registries(module), set[int]()
    paths = {id(m): path for path, m in module.named_modules()}
    found = tuple(ExplainedModule.of(path or r.label, r, seen, paths) for path, r in declared)
    text = Explanation("\n".join(map(str, found)) or "no module here declares aliases")
    text.modules = found
    return text
