"""Stacked bars, one a layer, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import MissingExtra

_MIB = 1 << 20
#: More names than this do not fit below the bars; then they are numbered.
_NAMES = 24


@dataclass(frozen=True)
class Bar:
    """One part of every bar, in bytes."""

    label: str
    color: str
    counts: Sequence[int]


def bars(names: Sequence[str], parts: Sequence[Bar], *, title: str, kind: str) -> bytes:
    """A picture of ``kind`` (svg, png, pdf): a bar a name, its parts stacked in their order. The same input is the same file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtra("this picture needs matplotlib", remedy="Install the extra: pip install 'aliasparam[pictures]'")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aliasparam", "text.parse_math": False}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        below = [0.0] * len(names)
        for part in parts:
            high = [count / _MIB for count in part.counts]
            axes.bar(range(len(names)), high, bottom=below, color=part.color, label=part.label)
            below = [low + more for low, more in zip(below, high, strict=True)]
        if len(names) <= _NAMES:
            axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names), default=0) < 4 else 30, fontsize=8)
            axes.tick_params(axis="x", length=0)
        axes.set(xlabel="layer", ylabel="MiB")
        axes.set_title(title, fontsize=10)
        if parts:
            figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=min(len(parts), 5))
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    return buffer.getvalue()
