"""What the reports say is what there is, and their pictures say the same; user text is never markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, Layout, Reencoding, TensorSpec, declare, explain, memory_report, process, registry_of
from aliasparam.errors import MissingExtra
from aliasparam.layout.tile import DRAWN, tile_picture

PADDED = "(t r) c -> t r c, r=32"


def model_with(name: str = "proj") -> nn.Module:
    """Two numbered layers, each with a padded pair, a pair that is a copy, a name alone, a derivation."""
    model = nn.ModuleDict()
    for number in "01":
        layer = nn.Module()
        for source, shape in (("a", (40, 4)), ("b", (8, 4)), ("c", (3,))):
            layer.register_parameter(source, nn.Parameter(torch.zeros(shape), requires_grad=False))
        declare(
            layer,
            Alias("a", "a_kernel", PADDED),
            Alias("b", "b_kernel", Reencoding(_halved, _half)),
            Derivation("s", ("c",), _total, (1,), torch.float32),
            loaded=True,
        )
        model[number] = nn.ModuleDict({name: layer})
    process(model)
    return model


def _halved(values: Tensor) -> Tensor:
    return values.half()


def _half(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, torch.float16)


def _total(values: Tensor) -> Tensor:
    return values.sum().reshape(1)


def memory_of(module: nn.Module) -> int:
    """Bytes of every allocation that a declared name of ``module`` looks at, each once."""
    registry = next(r for m in module.modules() if (r := registry_of(m)) is not None)
    held = {s.buffer.data_ptr(): s.buffer.untyped_storage().nbytes() for s in registry.storages()}
    kernels = [registry.module.get_buffer(name) for name in ("b_kernel", "s")]
    return sum(held.values()) + sum(k.untyped_storage().nbytes() for k in kernels)


def test_layers_add_up_to_the_memory_that_is_allocated() -> None:
    model = model_with()
    report = memory_report(model)

    assert [(layer.layer, layer.allocated) for layer in report.layers] == [(n, memory_of(model[n])) for n in "01"]
    first = report.layers[0]
    assert (first.shared, first.padding, first.copies) == (40 * 4 * 4, 24 * 4 * 4, 8 * 4 * 2)
    assert first.own == 8 * 4 * 4 + 3 * 4 + 4
    assert report.allocated_bytes == sum(memory_of(model[n]) for n in "01")
    assert report.saved_bytes == sum(row.two_copies_bytes - row.allocated_bytes for row in report.rows)
    assert report.two_copies_bytes == report.allocated_bytes + report.saved_bytes
    assert first.saved == 40 * 4 * 4


def test_table_json_and_html_say_the_same() -> None:
    report = memory_report(model_with())
    told = json.loads(report.to_json())

    assert told["total"] == report.total.as_dict() and [layer["layer"] for layer in told["layers"]] == ["0", "1"]
    cells = re.findall(r"<t[dh]>([^<]*)</t[dh]>", report._repr_html_())
    assert " ".join(cells).split()[1:] == report.table().split()[7:]  # both without their heads


@pytest.mark.parametrize("text", ["<script>x</script>", "a&b", "$x^{"])
def test_user_text_is_no_markup(text: str) -> None:
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({text: model_with()["0"]["proj"]})
    registry = registry_of(model[text])
    assert registry is not None
    registry.about = text
    found = explain(model)

    for shown in (found._repr_html_(), memory_report(model).picture(), registry._repr_html_()):
        assert text in "".join(texts_of(shown))
    assert "<script>" not in memory_report(model)._repr_html_() and "<script>" not in found._repr_html_()


def texts_of(svg: str) -> Iterator[str]:
    yield from ElementTree.fromstring(svg).itertext()


def test_the_picture_names_each_layer_and_each_part() -> None:
    pytest.importorskip("matplotlib")
    report = memory_report(model_with())
    words = {text.strip() for text in texts_of(report.picture("a title"))}

    assert {"0", "1", "a title", "padding: 768 B", "copies: 128 B", "saved: 1.25 KiB"} <= words
    assert report.picture() == report.picture()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aliasparam.report.bars.find_spec", lambda name: None)

    with pytest.raises(MissingExtra, match=r"aliasparam\[pictures\]"):
        memory_report(model_with()).picture()
    assert "<table>" in memory_report(model_with())._repr_html_()


def test_the_diagram_follows_versions_and_states() -> None:
    model = model_with()
    layer = model["0"]["proj"]
    before = explain(layer)
    layer.a.zero_()
    layer.c[0] = 3.0
    after = explain(layer)

    assert [bool(n.version) for n in after.modules[0].names] == [True, False, True] and not after.modules[0].ready
    assert [d.current for d in before.modules[0].derivations] == [True]
    assert [d.current for d in after.modules[0].derivations] == [False]
    drawn = " ".join(texts_of(after.picture()))
    assert (
        f"version {registry_of(layer).sources['a'].storage.version}" in drawn
        and "(t r) c -> t r c, r=32" in drawn
        and "memory of its own" in drawn
    )
    assert "and 1 more modules" in " ".join(texts_of(explain(model).picture(most=1)))
    assert after == "\n".join(map(str, after.modules))


def cells_of(layout: Layout) -> list[tuple[int, int] | None]:
    """What the titles of the cells say: (row, column) of each element of kernel memory, None for padding."""
    picture = tile_picture(str(layout), layout.lines)
    assert picture is not None
    titles = re.findall(r"<title>(row (\d+), column (\d+)|padding)[^<]*</title></rect>", picture)
    return [None if whole == "padding" else (int(row), int(column)) for whole, row, column in titles]


def test_the_tile_of_the_block_scale_swizzle_is_its_index_formula() -> None:
    cells = cells_of(Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4"))

    assert cells == [(at // 4 % 4 * 32 + at // 16, at % 4) for at in range(512)]


def test_every_kind_of_layout_has_a_picture_of_bounded_size() -> None:
    assert len(cells_of(Layout("(g b a) k -> g a b k, a=4 b=8"))) == 32 * 4
    assert len(cells_of(Layout("(n q) (k p) -> n k q p, q=2 p=8 bits=4"))) == 16
    assert len(cells_of(Layout("(h i r) k -> i h r k, h=2 r=64 | (a b) k -> a k b, b=4"))) == 2 * 64 * 4
    assert len(cells_of(Layout("(a b) k -> b a k, a=512 b=128"))) == DRAWN
    huge = Layout("(a b) k -> b a k, a=4096 b=4096")
    assert tile_picture(str(huge), huge.lines) is None and huge._repr_html_() == f"<code>{escape(str(huge))}</code>"
