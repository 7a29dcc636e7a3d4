"""Docstrings name things as Sphinx does (``:func:`declare```); mkdocstrings shows that as text. Here they become links."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>~?([\w.]+)</code>")
_ANCHOR = re.compile(r'id="(aliasparam[\w.]*)"')


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    anchors = sorted(set(_ANCHOR.findall(html)), key=len)

    def link(role: re.Match[str]) -> str:
        """A link where the reference has the name, else the name as code."""
        name = role[1]
        default = name if name.startswith("aliasparam") else f"aliasparam.{name}"
        found = next((anchor for anchor in anchors if f".{anchor}".endswith(f".{name}")), default)
        return f'<autoref identifier="{found}" optional><code>{name}</code></autoref>'

    return _ROLE.sub(link, html)
