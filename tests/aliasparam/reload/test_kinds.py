"""Tensors that hold no values at strides in memory: as values of a reload, in the model, in a digest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import checkpoint_digest, reload
from aliasparam.errors import ReloadError, StateError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(9), requires_grad=False)


def freed() -> Tensor:
    tensor = torch.ones(9)
    tensor.untyped_storage().resize_(0)
    return tensor


#: What holds no values at strides in memory. Some of these end the process where their memory is read.
KINDS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.ones(9).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(9), 1.0, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(7)]),
    "freed": freed,
    "on meta": lambda: torch.ones(9, device="meta"),
}
VALUES: dict[str, Callable[[], Any]] = {**KINDS, "an array": lambda: torch.ones(9).numpy(), "nothing": lambda: None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("policy", ["write-through", "journal", "staged", "staged-journal"])
def test_law_10_a_value_that_is_no_dense_tensor_is_refused_before_anything_refuses(policy: Any, kind: str) -> None:
    model = Model()
    with pytest.raises(ReloadError), reload(model, policy=policy) as session:
        session.update("norm", VALUES[kind]())
    assert torch.equal(model.norm + 0, torch.zeros(9)) and session.observed.outcome == "restored"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_law_8_a_tensor_of_the_model_that_is_not_dense_is_neither_written_nor_digested(kind: str) -> None:
    """A value written to one on meta would be lost without a word. Others of the model can be reloaded."""
    model = Model()
    model.register_buffer("odd", KINDS[kind]())
    with reload(model, scope="partial") as session:
        with pytest.raises(ReloadError, match=r"Model\.odd: the model's tensor"):
            session.update("odd", torch.ones(9))
        session.update("norm", torch.ones(9))
    assert torch.equal(model.norm, torch.ones(9))
    with pytest.raises(StateError, match="odd: a tensor of this kind"):
        checkpoint_digest(model)


@pytest.mark.parametrize("policy", ["write-through", "journal", "staged", "staged-journal"])
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_law_9_tensors_of_a_model_made_in_inference_mode_are_reloaded(policy: Any, end: str) -> None:
    """Torch writes them in this mode alone."""
    with torch.inference_mode():
        model = Model()
    assert model.norm.is_inference()
    session = reload(model, policy=policy)
    session.begin()
    session.update("norm", torch.ones(4), first_row=0)
    session.update("norm", torch.ones(5), first_row=4)
    session.prepare()
    session.switch()
    getattr(session, end)()
    if end == "abort" and "journal" not in policy:
        with reload(model) as again:
            again.update("norm", torch.zeros(9))
    assert torch.equal(model.norm, torch.full((9,), float(end == "commit")))
