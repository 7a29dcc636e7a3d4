"""The reload transaction: all or nothing, counted by rows, and never a mixture in service."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, declare, process, reload
from aliasparam.errors import AliasError, ReloadError, StaleKernelError

from .small import SWAP


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6, bias=False)
        self.layer.weight = nn.Parameter(torch.arange(48.0).view(6, 8), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(8), requires_grad=False)
        declare(self.layer, Alias("weight", "prepared", SWAP))
        process(self)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.norm) @ self.layer.get_buffer("prepared").t()


X = torch.ones(1, 8)
NEW = {"norm": torch.full((8,), 2.0), "layer.weight": torch.arange(48.0).view(6, 8) + 1}


def test_law_9_warm_equals_cold() -> None:
    warm, cold = Model(), Model()
    address = warm.layer.prepared.data_ptr()
    with reload(warm) as session:
        session.load(NEW)
    cold.load_state_dict(NEW)
    process(cold)

    assert torch.equal(warm(X), cold(X))
    assert warm.layer.prepared.data_ptr() == address


def test_rows_in_pieces_are_counted() -> None:
    model = Model()
    with reload(model) as session:
        session.update("norm", NEW["norm"])
        for first in range(0, 6, 2):
            session.update("layer.weight", NEW["layer.weight"][first : first + 2], first_row=first)

    assert torch.equal(model.layer.weight, NEW["layer.weight"])


REFUSED_BEFORE_WRITING = {
    "an unknown name": ({"nothing": torch.ones(1)}, "no tensor of this name"),
    "a wrong shape": ({"norm": torch.ones(7)}, r"expected: float32\[8\]"),
    "a wrong dtype": ({"norm": torch.ones(8, dtype=torch.float64)}, r"found:    float64\[8\]"),
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_WRITING)
def test_law_10_what_is_refused_before_the_first_write_leaves_the_model_serving(case: str) -> None:
    tensors, message = REFUSED_BEFORE_WRITING[case]
    model = Model()
    before = model(X)

    with pytest.raises(ReloadError, match=message), reload(model) as session:
        session.load(tensors)

    assert torch.equal(model(X), before)


BROKEN_HALF_WAY = {
    "a tensor never came": {"norm": NEW["norm"]},
    "one shard came and the other did not": {"norm": NEW["norm"], "layer.weight": None},
}


@pytest.mark.parametrize("case", BROKEN_HALF_WAY)
def test_law_10_a_mixture_never_serves(case: str) -> None:
    model = Model()

    with pytest.raises(ReloadError, match="did not arrive whole"), reload(model) as session:
        session.update("norm", NEW["norm"])
        if "layer.weight" in BROKEN_HALF_WAY[case]:
            session.update("layer.weight", NEW["layer.weight"][:3], first_row=0)
    with pytest.raises(StaleKernelError, match="reload"):
        model(X)

    with reload(model) as session:
        session.load(NEW)
    model(X)


def test_completion_is_counted_by_rows_not_by_elements() -> None:
    model = Model()
    with pytest.raises(ReloadError, match="twice"), reload(model) as session:
        session.update("layer.weight", NEW["layer.weight"][:3], first_row=0)
        session.update("layer.weight", NEW["layer.weight"][:3], first_row=0)


def test_an_error_of_the_caller_invalidates_what_was_written() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), reload(model) as session:
        session.update("layer.weight", NEW["layer.weight"])
        _ = 1 / 0

    with pytest.raises(AliasError):
        model(X)
    with pytest.raises(AliasError):
        model.layer.weight.clone()


def test_a_partial_reload_needs_its_scope() -> None:
    model = Model()
    with reload(model, scope="partial") as session:
        session.update("layer.weight", NEW["layer.weight"])

    assert torch.equal(model(X), X @ NEW["layer.weight"][[3, 4, 5, 0, 1, 2]].t())
    with pytest.raises(ReloadError, match="unknown scope"):
        reload(model, scope="some")  # type: ignore[arg-type]


def test_sessions_do_not_nest_and_do_not_outlive_their_block() -> None:
    model = Model()
    with reload(model, scope="partial") as session, pytest.raises(ReloadError, match="already open"), reload(model):
        pass
    with pytest.raises(ReloadError, match="is committed"):
        session.update("norm", NEW["norm"])


def test_the_incoming_tensor_is_copied_not_kept() -> None:
    model, buffer = Model(), NEW["norm"].clone()
    with reload(model, scope="partial") as session:
        session.update("norm", buffer)
    buffer.zero_()

    assert torch.equal(model.norm, NEW["norm"])


def test_a_mixture_refuses_through_inner_modules_too() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.norm  # type: ignore[operator]

    model = Model()
    model.inner = Inner()
    model.inner.norm = model.norm
    with pytest.raises(ReloadError), reload(model) as session:
        session.update("norm", NEW["norm"])
    with pytest.raises(StaleKernelError, match="reload"):
        model.inner(X)

    with reload(model) as session:
        session.load(NEW)
    assert torch.equal(model.inner(X), 2 * X)
