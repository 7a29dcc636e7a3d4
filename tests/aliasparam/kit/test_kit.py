"""The kit finds what failed in the field, and nothing in what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, declare
from aliasparam.testing import LAWS, LawBroken, Report, check_method, machine_for

from ..small import SWAP, SWAP_PAD16
from .broken_functions import BROKEN
from .broken_methods import METHODS, Layer, Method, shuffle
from .broken_refusals import REFUSALS, RightByHand


def check(method: Method, **options: Any) -> Report:
    return check_method(
        method.make,
        process=method.process,
        before_load=getattr(method, "before_load", lambda layer: None),
        outputs=method.outputs,
        without=method.without,
        name=type(method).__name__,
        **options,
    )


@pytest.mark.parametrize("broken", [*METHODS, *REFUSALS], ids=lambda cls: cls.__name__)
def test_the_kit_catches_a_broken_method(broken: type[Method]) -> None:
    with pytest.raises(LawBroken) as caught:
        check(broken())

    law = caught.value.law
    assert law in broken.laws, caught.value
    assert f"{broken.__name__} breaks law {law} ({LAWS[law]})" in str(caught.value)
    assert len(caught.value.steps) <= 12, "the sequence is not short"


@pytest.mark.parametrize("broken", BROKEN)
def test_the_kit_catches_a_broken_function_of_a_declaration(broken: str) -> None:
    make, says = BROKEN[broken]

    with pytest.raises(LawBroken, match=says) as caught:
        check_method(make, name=broken)

    assert caught.value.law in (1, 9)
    assert caught.value.law == 9 or caught.value.steps == ["call it by itself"]


def test_a_fixed_sequence_that_fails_is_shrunk_too() -> None:
    from .broken_refusals import SwapsInPlaceWithATemporary

    with pytest.raises(LawBroken) as caught:
        check(SwapsInPlaceWithATemporary(), examples=8)
    loads = [step for step in caught.value.steps if step.startswith("load")]

    assert caught.value.law == 10
    assert len(loads) == 4, "three at first, and one before the failure"


@pytest.mark.parametrize("law", [7, 8, 10])
def test_broken_methods_are_there_for_the_laws_of_refusal(law: int) -> None:
    assert sum(method.laws == {law} for method in REFUSALS) >= 2


def test_a_method_by_hand_that_refuses_passes_and_the_report_says_what_was_checked() -> None:
    report = check(RightByHand(), examples=15)

    assert report.unchecked == {7: "it declares nothing"}
    assert "laws 1, 2, 3, 4, 5, 6, 8, 9, 10 hold" in str(report)


def test_what_cannot_be_checked_is_said() -> None:
    report = check(Careful(), examples=10)

    assert set(report.unchecked) == {7, 8, 10}
    assert "law 8, 10 not checked: its forward takes arguments or is missing" in str(report)
    assert "all laws hold" not in str(report)


def declared(aliasing: bool = True) -> nn.Module:
    layer = Layer()
    declare(
        layer,
        Alias("weight", "prepared", SWAP),
        Alias("weight_scale", "weight_scale_prepared", SWAP_PAD16),
        Derivation("alpha", ("scale",), _largest, (1,), torch.float32),
        Derivation("alpha_inv", ("alpha",), torch.reciprocal, (1,), torch.float32),
        loaded=False,
        aliasing=aliasing,
    )
    return layer


def _largest(scale: Tensor) -> Tensor:
    return scale.max().reshape(1)


@pytest.mark.parametrize("aliasing", [True, False])
def test_the_same_method_declared_keeps_every_law(aliasing: bool) -> None:
    report = check_method(lambda: declared(aliasing), name="declared", examples=15)

    assert report.broken is None
    assert report.unchecked == {}
    assert "all laws hold" in str(report)
    assert report.sequences >= 10


class Careful(Method):
    """Hand-written and right, at the price of two copies."""

    def process(self, layer: nn.Module) -> None:
        from .broken_methods import put

        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))


def test_a_careful_method_by_hand_passes_and_a_memory_bound_tells_it_apart() -> None:
    method = Careful()
    check_method(method.make, process=method.process, outputs=method.outputs, examples=10)

    checkpoint = 8 * 6 + 8 * 4 + 3 * 4
    with pytest.raises(LawBroken, match="law 4"):
        check_method(method.make, process=method.process, outputs=method.outputs, max_bytes=checkpoint + 4)
    check_method(lambda: declared(), max_bytes=checkpoint + 16 * 8 - 8 * 4 + 8, examples=5)


def make(device: str, aliasing: bool) -> nn.Module:
    return declared(aliasing).to(device)


class TestMachineOnAnyModule_laws_1_to_9(machine_for("cpu", make=make)):
    pass


def test_the_message_names_the_law_and_the_steps() -> None:
    method = METHODS[1]()
    with pytest.raises(LawBroken) as caught:
        check_method(method.make, process=method.process, outputs=method.outputs, name="SkipsByAFlag")

    text = str(caught.value)
    assert "SkipsByAFlag breaks law" in text
    assert "1. load weight" in text
