"""A few shapes as SVG text, for pictures that need no package."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

#: Scoped by a class: a style inside a picture counts for the whole page that it is put into.
_STYLE = (
    "<style>.ap text{font:13px system-ui,sans-serif;fill:#222}.ap .m{font-family:ui-monospace,monospace}"
    ".ap .s{font-size:11px;fill:#555}.ap .b{font-weight:600}.ap .l{stroke:#555;fill:none;stroke-width:1.3}</style>"
    '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
    '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>'
)


def page(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole picture, white, ``width`` by ``height`` pixels."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} class="ap" role="img">'
    body = "\n".join(parts)
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}\n<title>{escape(title)}</title>\n{_STYLE}\n{white}\n{body}\n</svg>\n"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """``kind``: classes of the style: m (monospace), s (small), b (bold)."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words, quote=False)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = "none", more: str = 'stroke="#555"') -> str:
    """``more``: further attributes, as they are."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" {more}/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through ``points`` with a head at the last."""
    return f'<path class="l" marker-end="url(#a)" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def clipped(words: str, letters: int) -> str:
    """``words`` in at most ``letters``."""
    return words if len(words) <= letters else f"{words[: letters - 1]}…"
