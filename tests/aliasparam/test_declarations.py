"""Verdicts, fallbacks and bad declarations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam import (
    Alias,
    Derivation,
    Keep,
    Layout,
    Reencoding,
    TensorSpec,
    declare,
    explain,
    memory_report,
    process,
    registry_of,
)
from aliasparam.errors import DeclarationError, LayoutError
from aliasparam.layout import IndexLayout

from .small import PAD8


def layer() -> nn.Module:
    module = nn.Module()
    module.a = nn.Parameter(torch.arange(24, dtype=torch.uint8).view(4, 6), requires_grad=False)
    module.s = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)
    return module


WIDEN = Reencoding(lambda tensor: tensor.to(torch.int16), lambda spec: TensorSpec(spec.shape, torch.int16))


def test_another_element_width_falls_back_to_a_recorded_copy() -> None:
    module = layer()
    declare(module, Alias("a", "wide", WIDEN))
    process(module)

    assert torch.equal(module.wide, module.a.to(torch.int16))
    assert module.wide.data_ptr() != module.a.data_ptr()
    assert [row.source for row in memory_report(module).fallbacks] == ["a"]
    assert "re-encodes values" in explain(module)

    address = module.wide.data_ptr()
    module.a[0] = 9
    process(module)
    assert module.wide[0].tolist() == [9] * 6
    assert module.wide.data_ptr() == address


def test_policies_warn_and_error() -> None:
    with pytest.warns(UserWarning, match="re-encodes values"):
        declare(layer(), Alias("a", "wide", WIDEN, on_mismatch="warn"))
    module = layer()
    with pytest.raises(DeclarationError, match="re-encodes values"):
        declare(module, Alias("a", "wide", WIDEN, on_mismatch="error"))
    assert registry_of(module) is None
    assert type(module.a) is nn.Parameter


def maximum(s: Tensor) -> Tensor:
    return s.max().reshape(1)


BAD = {
    "unknown parameter": ((Alias("b", "c"),), "registered Parameter"),
    "source declared twice": ((Alias("a", "c"), Alias("a", "d")), "declared twice"),
    "derived declared twice": ((Alias("a", "c"), Alias("s", "c")), "declared twice"),
    "derived is a source": ((Alias("a", "s"), Alias("s", "d")), "declared twice"),
    "cycle": (
        (Derivation("x", ("y",), maximum, (1,), torch.float32), Derivation("y", ("x",), maximum, (1,), torch.float32)),
        "cycle",
    ),
}


def taken() -> nn.Module:
    module = layer()
    module.b = nn.Parameter(torch.ones(4, 6, dtype=torch.uint8), requires_grad=False)
    module.child = nn.Linear(2, 2)
    module.register_buffer("held", torch.ones(2))
    module.plain = torch.ones(3)
    return module


@pytest.mark.parametrize("name", ["b", "child", "held", "plain", "forward", "x.y"])
def test_a_kernel_name_does_not_take_the_place_of_what_is_there(name: str) -> None:
    for declaration in (Alias("a", name, PAD8), Derivation(name, ("s",), maximum, (1,), torch.float32)):
        module = taken()

        with pytest.raises(DeclarationError, match="kernel name is taken"):
            declare(module, declaration)

        assert registry_of(module) is None
        assert torch.equal(module.b, torch.ones(4, 6, dtype=torch.uint8))
        assert isinstance(module.child, nn.Linear)
        assert module.plain.tolist() == [1.0] * 3


def test_a_kernel_name_may_take_the_place_of_a_placeholder() -> None:
    module = layer()
    module.register_parameter("b", None)
    module.c = None

    declare(module, Alias("a", "b", PAD8), Derivation("c", ("s",), maximum, (1,), torch.float32))
    process(module)

    assert module.b.shape == (8, 8)
    assert module.c.item() == 3.0


@pytest.mark.parametrize("case", BAD)
def test_a_bad_declaration_is_refused_and_changes_nothing(case: str) -> None:
    declarations, message = BAD[case]
    module = layer()
    before = dict(module.named_parameters())

    with pytest.raises(DeclarationError, match=message):
        declare(module, *declarations)

    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(module.get_parameter(n) is p for n, p in before.items())
    assert registry_of(module) is None
    assert dict(module.named_buffers()) == {}


def test_law_4_memory_is_the_sum_of_capacities() -> None:
    module = layer()
    own = module.s.data_ptr()
    registry = declare(module, Alias("a", "padded", PAD8), Alias("s", "same"))

    allocated = sum(s.storage.buffer.untyped_storage().nbytes() for s in registry.sources.values() if s.storage)

    assert allocated == memory_report(module).allocated_bytes == 64 + 12
    assert module.s.data_ptr() == own  # an allocation of just the right size is taken over, not copied
    assert memory_report(module).saved_bytes == 24 + 64 - 64


def test_a_chain_of_derivations_refreshes_in_order() -> None:
    module = layer()
    declare(
        module,
        Derivation("c", ("b",), lambda b: b * 10, (1,), torch.float32),
        Derivation("b", ("s",), maximum, (1,), torch.float32),
    )
    process(module)
    assert module.c.item() == 30.0

    module.s[0] = 5.0
    process(module)

    assert module.c.item() == 50.0


def test_a_module_of_no_declarations_is_left_alone() -> None:
    module = nn.Linear(3, 3)

    assert process(module) == 0
    assert explain(module) == "no module here declares aliases"


@example([(0, 5, False), (1, 1, False), (3, 1, True)])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.booleans()), min_size=2, max_size=4))
def test_a_declared_name_has_its_memory_alone_and_others_may_share(spans: list[tuple[int, int, bool]]) -> None:
    """Whatever lies around it, and in whatever order: as all pairs say."""
    module, memory = nn.Module(), torch.arange(16.0)
    for at, (start, size, _) in enumerate(spans):
        module.register_parameter(f"p{at}", nn.Parameter(memory[start : start + size], requires_grad=False))
    pairs = itertools.combinations(spans, 2)
    shared = any((d or e) and a < b + m and b < a + n for (a, n, d), (b, m, e) in pairs)

    with pytest.raises(DeclarationError, match="overlap in memory") if shared else nullcontext():
        declare(module, *(Keep(f"p{at}") for at, (_, _, declared) in enumerate(spans) if declared))


def test_a_parameter_that_lies_in_the_memory_of_a_declared_one_is_refused() -> None:
    memory = torch.arange(16.0).view(8, 2)
    module = nn.Module()
    module.a = nn.Parameter(memory[:4], requires_grad=False)
    module.c = nn.Parameter(memory[2:6], requires_grad=False)

    with pytest.raises(DeclarationError, match="overlap in memory"):
        declare(module, Alias("a", "x"))  # c would go on showing what a no longer holds
    with pytest.raises(DeclarationError, match="overlap in memory"):
        declare(module, Alias("c", "x"))
    assert registry_of(module) is None


def test_shards_that_show_some_rows_twice_and_others_never_are_refused() -> None:
    module, q, k = layer(), nn.Module(), nn.Module()
    registry = declare(module, Alias("a", "x"))

    with pytest.raises(DeclarationError, match="exactly once"):
        registry.show_shards("a", [(q, "weight", module.a[:2]), (k, "weight", module.a[:2])])
    with pytest.raises(DeclarationError, match="exactly once"):
        registry.show_shards("a", [(q, "weight", module.a[:, ::2]), (k, "weight", module.a[:, :3])])
    registry.show_shards("a", [(q, "weight", module.a[:, ::2]), (k, "weight", module.a[:, 1::2])])
    assert torch.equal(k.weight, torch.arange(24, dtype=torch.uint8).view(4, 6)[:, 1::2])


def test_the_same_parameter_under_two_names_is_a_tie_and_not_an_overlap() -> None:
    module = layer()
    module.tied = module.a

    declare(module, Alias("a", "x"))

    assert module.tied is module.a


@pytest.mark.parametrize(
    ("declaration", "field"),
    [
        ("weight", "no declaration"),
        (Alias(3, "k"), "Alias.source"),  # type: ignore[arg-type]
        (Alias("weight", None), "Alias.derived"),  # type: ignore[arg-type]
        (Alias("weight", ""), "Alias.derived"),
        (Alias("weight", "k", dtype="uint8"), "Alias.dtype"),  # type: ignore[arg-type]
        (Alias("weight", "k", room_for=3), "Alias.room_for"),  # type: ignore[arg-type]
        (Keep(3), "Keep.source"),  # type: ignore[arg-type]
        (Derivation("d", "weight", torch.sum, (1,), torch.float32), "Derivation.sources"),  # type: ignore[arg-type]
        (Derivation("d", None, torch.sum, (1,), torch.float32), "Derivation.sources"),  # type: ignore[arg-type]
        (Derivation("d", ("weight",), None, (1,), torch.float32), "Derivation.function"),  # type: ignore[arg-type]
        (Derivation("", ("weight",), torch.sum, (1,), torch.float32), "Derivation.name"),
        (Derivation("d", ("weight",), torch.sum, 1, torch.float32), "Derivation.shape"),  # type: ignore[arg-type]
        (Derivation("d", ("weight",), torch.sum, (-1,), torch.float32), "Derivation.shape"),
        (Derivation("d", ("weight",), torch.sum, (True,), torch.float32), "Derivation.shape"),
        (Derivation("d", (), torch.ones, (1,), torch.float32), "Derivation.sources"),
        (Derivation("d", ("weight",), torch.sum, (1,), "float32"), "Derivation.dtype"),  # type: ignore[arg-type]
    ],
)
def test_a_field_of_another_kind_is_named(declaration: object, field: str) -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.zeros(4, 4), requires_grad=False))

    with pytest.raises(DeclarationError, match=field):
        declare(module, declaration)  # type: ignore[arg-type]
    assert type(module.weight) is nn.Parameter and not module._buffers
    with pytest.raises(DeclarationError, match="declarations are of a module"):
        declare("module", Alias("weight", "k"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Layout(3),  # type: ignore[arg-type]
        lambda: IndexLayout([1, 0]),  # type: ignore[arg-type]
        lambda: IndexLayout(torch.tensor([1.0, 0.0])),
        lambda: Layout.infer(torch.flip, 4, torch.uint8),  # type: ignore[arg-type]
        lambda: Layout.infer(torch.flip, (4, -4), torch.uint8),
        lambda: Layout.infer(torch.flip, (4, 4), "uint8"),  # type: ignore[arg-type]
    ],
)
def test_a_layout_of_the_wrong_kind_is_a_layout_error(make: Callable[[], object]) -> None:
    with pytest.raises(LayoutError, match="expected"):
        make()


def test_a_trainable_parameter_is_warned_of() -> None:
    module = nn.Linear(4, 4)

    with pytest.warns(UserWarning, match=r"Linear: weight had requires_grad=True and will have no gradients"):
        declare(module, Alias("weight", "k"))
    assert not module.weight.requires_grad
