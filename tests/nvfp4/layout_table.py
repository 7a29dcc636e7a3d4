"""The tables of lines in docs/nvfp4/layouts.md, made from the layouts: ``python -m tests.nvfp4.layout_table`` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from aliasparam import Layout, Reencoding
from aliasparam_nvfp4.layouts import lines
from aliasparam_nvfp4.linear.backends import linear_backends
from aliasparam_nvfp4.moe.layouts import MOE_LAYOUTS
from aliasparam_nvfp4.moe.runners import moe_runners

PAGE = Path(__file__).parents[2] / "docs" / "nvfp4" / "layouts.md"
_MARK = "<!-- {name}: {edge} -->"
#: What a line is for, beside the functions of ``lines`` themselves.
_PARTS = {
    "128x4 tiles of block scales": lines.swizzle(),
    "8x4 tiles (activations of few rows, TRT-LLM)": lines.swizzle_8x4(),
    "row shuffle, epilogue tile 128 (TRT-LLM)": lines.shuffle(),
    "row shuffle, epilogue tile 64": lines.shuffle(epilogue_tile=64),
    "block scales of shuffled rows": lines.shuffle_swizzled(),
    "`[gate; up]` to `[up; gate]`, each padded (CUTLASS, b12x)": lines.up_gate(64, 32),
    "blocks of 64 rows of up and gate in turn (CuteDSL v2)": lines.up_gate_blocks(32),
    "block scales of such blocks": lines.up_gate_blocks_swizzled(4),
    "pairs (up, gate), shuffled (TRT-LLM)": lines.up_gate_shuffled(64),
    "block scales of such pairs": lines.up_gate_shuffled_swizzled(8),
    "a bias of `[gate; up]` as `[up; gate]`, each padded (CUTLASS)": lines.up_gate_rows(64),
    "a bias of pairs (up, gate), shuffled (TRT-LLM)": lines.up_gate_shuffled_rows(),
    "a bias of shuffled rows": lines.shuffle_rows(128),
    "MMA fragments (CuteDSL W4A16, SM12x)": lines.fragments(),
}


def render_parts() -> str:
    rows = ["| layout | line |", "|---|---|"]
    return "\n".join([*rows, *(f"| {name} | {_cell(layout)} |" for name, layout in _PARTS.items())])


def render_linear() -> str:
    rows = ["| format | `weight` u8 `[N, K/2]` | `weight_scale` e4m3 `[N, K/16]` | backends |", "|---|---|---|---|"]
    users: dict[str, list[str]] = {}
    layouts = {backend.layout.name: backend.layout for backend in linear_backends().values()}
    for name, backend in sorted(linear_backends().items()):
        users.setdefault(backend.layout.name, []).append(f"`{name}`")
    for name, layout in sorted(layouts.items()):
        rows.append(f"| {name} | {_cell(layout.weight)} | {_cell(layout.weight_scale)} | {', '.join(users[name])} |")
    return "\n".join(rows)


def render_moe() -> str:
    rows = ["| format | tensor | line | runners |", "|---|---|---|---|"]
    for layout in MOE_LAYOUTS:
        users = ", ".join(f"`{name}`" for name, runner in sorted(moe_runners().items()) if runner.layout is layout)
        for tensor in ("w13", "w13_scale", "w2", "w2_scale"):
            first = (layout.name, users) if tensor == "w13" else ("", "")
            rows.append(f"| {first[0]} | `{tensor}` | {_cell(getattr(layout, tensor))} | {first[1]} |")
    return "\n".join(rows)


def _cell(layout: Layout | Reencoding) -> str:
    if isinstance(layout, Reencoding):
        return "S0E5M3: a re-encoding, in memory of its own"
    if layout == Layout.identity(2):
        return "the checkpoint's order"
    return ", then ".join(f"`{_without_ones(str(line))}`" for line in layout.lines)


def _without_ones(line: str) -> str:
    """The same line without digits of one value, which stand for padding that other kernels ask for."""
    shorter = line
    for name in re.findall(r"(\w+)=1\b", line):
        shorter = re.sub(rf" {name}\b(=1)?", "", shorter)
    shorter = re.sub(r"\((\w+)\)", r"\1", shorter)
    assert Layout(shorter) == Layout(line)
    return shorter


TABLES = {"parts": render_parts, "linear": render_linear, "moe": render_moe}


def write() -> None:
    text = PAGE.read_text()
    for name, render in TABLES.items():
        begin, end = (_MARK.format(name=name, edge=edge) for edge in ("begin", "end"))
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{render()}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
