"""Derivations: what they may derive from, in which order, and what their functions may do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, Reencoding, declare, memory_report, process
from aliasparam.errors import DerivationError, StaleKernelError
from aliasparam.testing import machine_for

from .small import SWAP, SWAP_PAD8, same_spec


def first_row(k: Tensor) -> Tensor:
    return k[0].float()


def double(x: Tensor) -> Tensor:
    return x * 2


def layer(aliasing: bool = True, *, at_once: bool = True, loaded: bool = True) -> nn.Module:
    """``top`` derives from the kernel name, ``twice`` from ``top``."""
    module = _Layer()
    module.weight = nn.Parameter(torch.arange(24, dtype=torch.uint8).view(4, 6), requires_grad=False)
    derivations = (
        Derivation("twice", ("top",), double, (8,), torch.float32),
        Derivation("top", ("prepared",), first_row, (8,), torch.float32),
    )
    alias = Alias("weight", "prepared", SWAP_PAD8)
    declare(module, alias, *(derivations if at_once else ()), loaded=loaded, aliasing=aliasing)
    if not at_once:
        declare(module, *derivations, loaded=loaded, aliasing=aliasing)
    return module


class _Layer(nn.Module):
    def forward(self) -> Tensor:
        return self.get_buffer("twice").clone()


@pytest.mark.parametrize("aliasing", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_law_7_a_derivation_of_a_kernel_name(aliasing: bool, at_once: bool) -> None:
    module = layer(aliasing, at_once=at_once)

    process(module)
    assert module().tolist() == [24.0, 26.0, 28.0, 30.0, 32.0, 34.0, 0.0, 0.0]

    module.weight[2] = 9
    with pytest.raises(StaleKernelError, match="top"):
        module()
    assert process(module) > 0
    assert process(module) == 0
    assert module().tolist() == [18.0] * 6 + [0.0, 0.0]


def make(device: str, aliasing: bool) -> nn.Module:
    return layer(aliasing, loaded=False).to(device)


class TestMachineOfKernelNameDerivations_laws_1_to_9(machine_for(make=make)):
    pass


class TestMachineWithoutAliasing_law_7(machine_for(make=make, aliasing=False)):
    pass


# -- what the function may do ----------------------------------------------------------------------------------------------


def scaled(function: Callable[..., Tensor]) -> nn.Module:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    declare(module, Derivation("alpha", ("scale",), function, (1,), torch.float32))
    return module


def test_a_function_that_writes_its_argument_leaves_the_source_alone() -> None:
    module = scaled(lambda s: s.mul_(2).max().reshape(1))

    process(module)

    assert module.scale.tolist() == [1.0, 2.0]
    assert module.alpha.tolist() == [4.0]


def rounded_in_place(tensor: Tensor) -> Tensor:
    return tensor.round_()


ROUNDED = Reencoding(rounded_in_place, same_spec)


@pytest.mark.parametrize("rows", [2, 17 << 8])
def test_a_reencoding_that_writes_its_argument_leaves_the_kept_source_alone(rows: int) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((rows, 1 << 10), 1.25), requires_grad=False)
    declare(module, Alias("weight", "rounded", ROUNDED))

    process(module)

    assert module.weight.unique().tolist() == [1.25]
    assert module.rounded.unique().tolist() == [1.0]


FAILING = {
    "raises": lambda s: s.view(7),
    "returns no tensor": lambda s: 3.0,
    "returns one on meta": lambda s: s.to("meta"),
    "returns a sparse one": lambda s: s.to_sparse(),
}


@pytest.mark.parametrize("function", FAILING.values(), ids=FAILING)
def test_a_function_that_fails_is_a_named_error_and_the_module_refuses(function: Callable[..., Tensor]) -> None:
    module = scaled(function)

    with pytest.raises(DerivationError, match=r"Module\.alpha: the function of this derivation"):
        process(module)
    with pytest.raises(StaleKernelError):
        module()


# -- ties ------------------------------------------------------------------------------------------------------------------


def tied() -> nn.ModuleList:
    first, second = nn.Module(), nn.Module()
    first.weight = nn.Parameter(torch.full((6, 8), 1.25), requires_grad=False)
    second.weight = first.weight
    for module in (first, second):
        declare(module, Alias("weight", "rounded", ROUNDED))
    return nn.ModuleList([first, second])


def test_law_4_the_report_counts_the_copy_of_a_tied_weight() -> None:
    model = tied()
    process(model)

    weight = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}

    assert memory_report(model).allocated_bytes == sum(weight.values()) == 3 * 6 * 8 * 4
    assert [row.reason.code for row in memory_report(model).fallbacks if row.reason] == ["lossy", "lossy"]


def test_processing_one_of_two_tied_modules_commits_that_one() -> None:
    first, second = _Tied(), _Tied()
    first.weight = nn.Parameter(torch.arange(24, dtype=torch.uint8).view(4, 6), requires_grad=False)
    second.weight = first.weight
    for module in (first, second):
        declare(module, Alias("weight", "prepared", SWAP))

    process(first)
    with pytest.raises(StaleKernelError):
        second()
    process(second)

    assert torch.equal(second(), first())


class _Tied(nn.Module):
    def forward(self) -> Tensor:
        return self.get_buffer("prepared").clone()
