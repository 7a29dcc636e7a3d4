"""Docstrings name things as Sphinx does (``:func:`declare```), which mkdocstrings shows as text: here they become links.

Pages with a wide table leave out the table of contents beside it.
"""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>~?([\w.]+)</code>")
_ANCHOR = re.compile(r'id="(aliasparam[\w.]*)"')
_NINE_COLUMNS = re.compile(r"^\|(?:-+\|){9}", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    if _NINE_COLUMNS.search(markdown):
        page.meta["hide"] = ["toc"]


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    anchors = sorted(set(_ANCHOR.findall(html)), key=len)

    def link(role: re.Match[str]) -> str:
        """A link where the reference has the name, else the name as code."""
        name = role[1]
        default = name if name.startswith("aliasparam") else f"aliasparam.{name}"
        found = next((anchor for anchor in anchors if f".{anchor}".endswith(f".{name}")), default)
        return f'<autoref identifier="{found}" optional><code>{name}</code></autoref>'

    return _ROLE.sub(link, html)
