"""What is known of declared modules: as data, text and a drawing."""

from __future__ import annotations

from collections.abc import Iterable

from .diagram import diagram
from .rows import ExplainedModule

#: Modules that a notebook draws; the rest is one line.
SHOWN = 12


class Explanation(str):
    """The text of :func:`~aliasparam.explain`; ``modules`` holds what it says as data."""

    modules: tuple[ExplainedModule, ...] = ()

    @classmethod
    def of(cls, modules: Iterable[ExplainedModule]) -> Explanation:
        found = tuple(modules)
        text = cls("\n".join(map(str, found)) or "no module here declares aliases")
        text.modules = found
        return text

    def picture(self, most: int | None = None) -> str:
        """SVG, which needs no package: each storage between its checkpoint names and its kernel name, with line, state, version.

        Args:
            most: modules to draw, None for all; the picture says how many it left out.
        """
        return diagram(self.modules, most)

    def _repr_html_(self) -> str:
        return self.picture(SHOWN)
