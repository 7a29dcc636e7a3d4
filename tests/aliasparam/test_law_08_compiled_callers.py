"""Law 8 where no hook is seen: compiled callers, and parents that read a kernel name without calling the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from aliasparam import process, reload
from aliasparam.errors import StaleKernelError

from .small import Layer


class Parent(nn.Module):
    """Reads its child's kernel name and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.child.prepared + x


def compiled_parent(layer: Layer) -> Any:
    return torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")


def compiled_function(layer: Layer) -> Any:
    return torch.compile(lambda x: layer(x) + 0, fullgraph=True, backend="eager")


def compiled_with_breaks(layer: Layer) -> Any:
    return torch.compile(nn.Sequential(layer), backend="eager")


def compiled_by_aot(layer: Layer) -> Any:
    return torch.compile(nn.Sequential(layer), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("compiled", [compiled_parent, compiled_function, compiled_with_breaks, compiled_by_aot])
def test_law_8_a_compiled_caller_refuses_stale_weights_and_serves_again(compiled: Callable[[Layer], Any]) -> None:
    torch._dynamo.reset()
    layer, x = Layer(), torch.ones(1)
    process(layer)
    f = compiled(layer)
    first = f(x)

    layer.weight[0] = 77
    with pytest.raises(Exception, match=r"RefusingName|open"):
        f(x)
    process(layer)

    assert torch.equal(f(x), layer.prepared)
    assert not torch.equal(f(x), first)


def test_law_10_a_compiled_caller_refuses_the_mixture_of_a_failed_reload() -> None:
    torch._dynamo.reset()
    layer, x = Layer(), torch.ones(1)
    model = nn.Sequential(layer)
    process(model)
    f = torch.compile(model, fullgraph=True, backend="eager")
    f(x)

    with pytest.raises(ZeroDivisionError), reload(model) as session:
        session.update("0.weight", torch.full((3, 8), 200, dtype=torch.uint8), first_row=0)
        _ = 1 / 0

    with pytest.raises(Exception, match=r"RefusingName|open|reload"):
        f(x)


def written(layer: Layer) -> None:
    layer.weight[:] = 7


def replaced(layer: Layer) -> None:
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 7), requires_grad=False)


@pytest.mark.parametrize("change", [written, replaced])
@pytest.mark.parametrize("compile_it", [False, True])
def test_law_8_a_parent_that_reads_the_name_without_calling_the_child_is_refused(
    compile_it: bool, change: Callable[[Layer], None]
) -> None:
    torch._dynamo.reset()
    parent = Parent()
    process(parent)
    f: Any = torch.compile(parent, fullgraph=True, backend="eager") if compile_it else parent
    x = torch.zeros(1, dtype=torch.uint8)
    f(x)

    change(parent.child)
    with pytest.raises(Exception, match=r"RefusingName|open|reload"):
        f(x)
    process(parent)

    assert f(x).unique().tolist() == [7]


@pytest.mark.parametrize(
    "put",
    [lambda layer: setattr(layer, "prepared", torch.zeros(6, 8, dtype=torch.uint8)), lambda layer: layer.to_empty(device="cpu")],
    ids=["setattr", "to_empty"],
)
@pytest.mark.parametrize("compile_it", [False, True])
def test_law_8_a_parent_does_not_read_what_other_code_put_under_a_kernel_name(
    compile_it: bool, put: Callable[[Layer], None]
) -> None:
    torch._dynamo.reset()
    parent, x = Parent(), torch.zeros(1, dtype=torch.uint8)
    process(parent)
    f = torch.compile(parent, backend="eager") if compile_it else parent
    f(x)

    put(parent.child)
    with pytest.raises(Exception, match=r"RefusingName|open|reload"):
        f(x)
    parent.child.weight.copy_(torch.full((6, 8), 7, dtype=torch.uint8))
    process(parent)

    assert f(x).unique().tolist() == [7]


def test_law_8_a_parent_goes_on_where_a_name_was_replaced_and_put_back() -> None:
    parent, x = Parent(), torch.zeros(1, dtype=torch.uint8)
    process(parent)
    ours, served = parent.child.weight, parent(x)

    replaced(parent.child)
    with pytest.raises(StaleKernelError):
        parent(x)
    parent.child.weight = ours

    assert torch.equal(parent(x), served)
