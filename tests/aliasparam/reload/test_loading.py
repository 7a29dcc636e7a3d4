"""Loaders that know of no session: what they write to a model's tensors is checked, kept and taken back like any update."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, checkpoint_state_dict, declare, invalidate, process, reload
from aliasparam.errors import ReloadError
from aliasparam.reload import loading as loading_module
from aliasparam.reload.loading import loading
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.session import ReloadSession
from aliasparam.testing import same_bytes

from ..small import SWAP
from .interrupted import interrupted


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(96, dtype=torch.uint8).view(12, 8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(12, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.scales = nn.Parameter(torch.ones(4, 2), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
        self.tied = nn.Module()
        self.tied.norm = self.norm
        self.weight.weight_loader = "an engine's"
        declare(self, Alias("weight", "prepared", SWAP), Alias("scale", "scale_prepared", SWAP))
        process(self)


def new_values() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randint(0, 256, (12, 8), dtype=torch.uint8, generator=random),
        "scale": torch.rand(12, 4, generator=random).to(torch.float8_e4m3fn),
        "scales": torch.rand(4, 2, generator=random),
        "norm": torch.rand(8, generator=random).to(torch.bfloat16),
    }


def engine_loads(model: nn.Module, new: dict[str, Tensor]) -> None:
    """As weight loaders of SGLang and vLLM write: slices of ``.data``, single elements, fills, other dtypes."""
    names = dict(model.named_parameters())
    assert names["weight"].weight_loader == "an engine's" and isinstance(names["weight"], nn.Parameter)
    assert names["norm"].device == new["norm"].device and len(names) == 4  # tied names are one tensor
    names["weight"].data.narrow(0, 6, 6).copy_(new["weight"][6:])
    names["weight"].data[:6, :4] = new["weight"][:6, :4]
    names["weight"].data[:6, 4:] = new["weight"][:6, 4:]
    names["scale"].data.view(torch.uint8).copy_(new["scale"].view(torch.uint8))
    for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(2)).tolist():
        names["scales"].data[row][column].fill_(new["scales"][row, column].item())
    names["norm"].data = new["norm"].float()


def test_law_10_an_interrupt_at_any_line_of_a_loader_leaves_no_stand_in() -> None:
    model, new = Model(), new_values()
    old = {name: value.clone() for name, value in checkpoint_state_dict(model).items()}

    def load() -> None:
        with reload(model, policy="journal") as session, loading_module.loading(session):
            for name, parameter in dict(model.named_parameters()).items():
                parameter.data[:1] = new[name][:1]
                parameter.data[1:].copy_(new[name][1:])

    for at in itertools.count():
        if not interrupted(at, (loading_module,), load):
            break
        kinds = [type(tensor) for module in model.modules() for tensor in module._parameters.values()]
        assert loading_module.StandIn not in kinds, at
        assert all(same_bytes(value, old[name]) for name, value in checkpoint_state_dict(model).items()), at
    assert at > 100 and all(same_bytes(value, new[name]) for name, value in checkpoint_state_dict(model).items())


def test_a_loader_writes_tensors_that_share_memory() -> None:
    """A write of one makes all refuse, but for the loader, who writes the next one."""
    model, new = Model(), new_values()
    model.shared = nn.Parameter(model.norm.data[2:], requires_grad=False)
    with reload(model, scope=["norm", "shared"]) as session, loading(session):
        model.norm.data.copy_(new["norm"])
        model.shared.data.copy_(new["norm"][2:])
    assert torch.equal(model.shared, new["norm"][2:]) and torch.equal(model.norm, new["norm"])


def test_a_loader_writes_through_a_session() -> None:
    model, new = Model(), new_values()
    where = [parameter.data_ptr() for parameter in model.parameters()]
    with reload(model) as session, loading(session):
        engine_loads(model, new)
    assert all(same_bytes(found, new[name]) for name, found in checkpoint_state_dict(model).items() if name in new)
    assert [parameter.data_ptr() for parameter in model.parameters()] == where and model.tied.norm is model.norm


def test_a_loader_that_fails_half_way_has_changed_nothing() -> None:
    model = Model()
    before = {name: value.clone() for name, value in checkpoint_state_dict(model).items()}
    with pytest.raises(KeyError), reload(model, policy="journal") as session, loading(session):
        engine_loads(model, new_values())
        raise KeyError("a name that the model does not have")
    assert all(same_bytes(found, before[name]) for name, found in checkpoint_state_dict(model).items())
    assert type(model.norm) is nn.Parameter and model.prepared.sum() > 0


@pytest.mark.parametrize("policy", get_args(PolicyName))
@pytest.mark.parametrize("step", [ReloadSession.abort, ReloadSession.switch, ReloadSession.commit])
def test_law_10_what_would_end_a_session_inside_its_loader_is_refused_and_the_loader_goes_on(
    step: Callable[[ReloadSession], None], policy: PolicyName
) -> None:
    """Stand-ins are in the places of what would be processed, or brought back."""
    model, new = Model(), new_values()
    with reload(model, policy=policy) as session, loading(session):
        names = dict(model.named_parameters())
        for name in ("weight", "norm", "scale"):
            names[name].data.copy_(new[name])
        for refused in (step, lambda session: loading(session).__enter__()):
            with pytest.raises(ReloadError, match="inside a block of `loading`"):
                refused(session)
        names["scales"].data.copy_(new["scales"])
        session.prepare()
        with pytest.raises(ReloadError, match="inside a block of `loading`"):
            step(session)
    assert all(same_bytes(found, new[name]) for name, found in checkpoint_state_dict(model).items() if name in new)


def test_law_8_a_stand_in_that_outlives_its_block_is_written_and_not_shown() -> None:
    model, new = Model(), new_values()
    with reload(model, scope="partial") as session:
        with loading(session):
            norm = model.norm
        norm.data.copy_(new["norm"])
        with pytest.raises(ReloadError, match="arrived twice"):
            norm.data.copy_(new["norm"])
    assert torch.equal(model.norm, new["norm"]) and type(model.norm) is type(model.tied.norm) is nn.Parameter


def test_what_a_loader_reads_is_live() -> None:
    model = Model()
    with reload(model, scope="partial", policy="journal") as session, loading(session):
        names = dict(model.named_parameters())
        assert torch.equal(names["scales"].data[1:] + 1, torch.full((3, 2), 2.0)) and names["weight"][0, 3].item() == 3
        names["scales"].data.mul_(3)
    assert torch.equal(model.scales, torch.full((4, 2), 3.0))


def test_what_would_be_garbage_is_refused() -> None:
    model, new = Model(), new_values()
    with reload(model, scope="partial", policy="journal") as session, loading(session):
        weight = dict(model.named_parameters())["weight"]
        for write, match in (
            (lambda: weight.data.copy_(new["weight"].float()), "another dtype"),
            (lambda: weight.data.view(-1)[3:11].copy_(new["weight"][0]), "no rectangle"),
            (lambda: weight.data[:2].copy_(new["weight"][:3]), "must match"),
        ):
            with pytest.raises((ReloadError, RuntimeError), match=match):
                write()
        weight.data[:6].copy_(new["weight"][:6])
        with pytest.raises(ReloadError, match="arrived twice"):
            weight.data[5].copy_(new["weight"][5])
        weight.data[6:].copy_(new["weight"][6:])


@pytest.mark.parametrize("bits", [Tensor.conj, torch._neg_view])
def test_a_view_whose_bits_a_stand_in_cannot_have_is_refused(bits: Callable[[Tensor], Tensor]) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)
    with reload(model, scope="partial") as session, loading(session):
        weight = dict(model.named_parameters())["weight"]
        with pytest.raises(ReloadError, match="no rectangle"):
            bits(weight.data).copy_(torch.tensor([1j, 2j]))


def test_threads_may_load() -> None:
    model, new = Model(), new_values()
    with reload(model, scope="partial") as session, loading(session):
        weight = dict(model.named_parameters())["weight"]
        rows = [threading.Thread(target=weight.data[row].copy_, args=(new["weight"][row],)) for row in range(12)]
        for thread in rows:
            thread.start()
        for thread in rows:
            thread.join()
    assert torch.equal(model.weight.clone(), new["weight"])


def test_what_overwrites_a_tensor_needs_nothing_that_was_there() -> None:
    model = Model()
    invalidate(model)
    with reload(model, scope="partial") as session, loading(session):
        model.weight.data.random_(1, 2)
        model.scale.data.zero_()

    assert model.weight.unique().tolist() == [1] and not model.scale.float().any()
