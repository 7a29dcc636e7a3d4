"""A state machine which drives a declared layer against an oracle that shares nothing.

The oracle keeps each checkpoint tensor as a plain tensor of its own and recomputes every kernel name from it. After every step
the two must agree (law 1), no address may have moved (law 3), and the state dict must be the oracle's (law 5).
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from .. import checkpoint_state_dict, process, registry_of, reload, restore
from ..errors import ReloadError, StaleKernelError
from ._strategies import LayerPlan, layers


class AliasMachine(RuleBasedStateMachine):
    """Loads, writes, reads, processes, copies and reloads one layer in any order."""

    device = "cpu"
    aliasing = True
    plans = layers()

    @initialize(data=st.data(), seed=st.integers(0, 1 << 16))
    def begin(self, data: st.DataObject, seed: int) -> None:
        self.plan: LayerPlan = data.draw(self.plans)
        self.random = torch.Generator().manual_seed(seed)
        self.layer = self.plan.make(self.device, aliasing=self.aliasing)
        self.oracle = {"weight": self._bytes(self.plan.shape), "scale": self._scales()}
        for name, value in self.oracle.items():
            self._parameter(name).copy_(value)
        self.addresses = self._addresses()
        self.stale = True

    def _bytes(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.random).to(self.device)

    def _scales(self) -> Tensor:
        return (torch.rand(self.plan.partitions, generator=self.random) + 0.5).to(self.device)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.layer.get_parameter(name)

    def _addresses(self) -> dict[str, int]:
        named = (*self.layer.named_parameters(), *self.layer.named_buffers())
        return {n: t.data_ptr() for n, t in named}

    # -- writing -------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), through=st.sampled_from(["slice", "data", "narrow", "view", "index_put"]))
    def write_a_part(self, data: st.DataObject, through: str) -> None:
        size = self.plan.shape[0]
        first = data.draw(st.integers(0, size - 1))
        count = data.draw(st.integers(1, size - first))
        value = self._bytes((count, *self.plan.shape[1:]))
        weight = self._parameter("weight")
        if through == "slice":
            weight[first : first + count] = value
        elif through == "data":
            weight.data[first : first + count].copy_(value)
        elif through == "narrow":
            weight.narrow(0, first, count).copy_(value.int())  # copy_ casts
        elif through == "view":
            weight.view(torch.int8).narrow(0, first, count).copy_(value.view(torch.int8))
        else:
            weight[torch.arange(first, first + count, device=self.device)] = value
        self.oracle["weight"][first : first + count] = value
        self.stale = True

    @rule(byte=st.integers(0, 255))
    def fill_one_column(self, byte: int) -> None:
        self._parameter("weight").select(-1, 0).fill_(byte)
        self.oracle["weight"].select(-1, 0).fill_(byte)
        self.stale = True

    @rule(addend=st.integers(1, 7))
    def add_in_place(self, addend: int) -> None:
        self._parameter("weight").add_(addend)
        self.oracle["weight"].add_(addend)
        self.stale = True

    @rule()
    def copy_from_itself(self) -> None:
        weight = self._parameter("weight")
        weight.copy_(weight.flip(-1))
        self.oracle["weight"] = self.oracle["weight"].flip(-1).contiguous()
        self.stale = True

    @rule(index=st.integers(0, 2))
    def write_one_scale(self, index: int) -> None:
        index %= self.plan.partitions
        value = self._scales()[0]
        self._parameter("scale")[index].copy_(value)
        self.oracle["scale"][index] = value
        self.stale = True

    @rule()
    def replace_the_parameter(self) -> None:
        value = self._bytes(self.plan.shape)
        self.layer.weight = nn.Parameter(value.clone(), requires_grad=False)
        self.oracle["weight"] = value
        process(self.layer)
        self.stale = False

    @rule()
    def assign_data(self) -> None:
        value = self._bytes(self.plan.shape)
        self._parameter("weight").data = value.clone()
        self.oracle["weight"] = value
        self.stale = True

    @rule(assign=st.booleans())
    def load_a_state_dict(self, assign: bool) -> None:
        self.oracle = {"weight": self._bytes(self.plan.shape), "scale": self._scales()}
        self.layer.load_state_dict({n: v.clone() for n, v in self.oracle.items()}, assign=assign)
        self.stale = True

    @rule()
    def a_write_that_fails_changes_nothing(self) -> None:
        try:
            self._parameter("weight").copy_(torch.zeros(97, 89, 83, dtype=torch.uint8, device=self.device))
        except RuntimeError:
            return
        raise AssertionError("copy_ of a tensor that cannot broadcast succeeded")

    # -- processing and reloading --------------------------------------------------------------------------------------

    @rule(times=st.integers(1, 3))
    def process_it(self, times: int) -> None:
        process(self.layer)
        for _ in range(times - 1):
            if process(self.layer) != 0:
                raise AssertionError("processing again did work (law 2)")
        self.stale = False

    @rule()
    def restore_it(self) -> None:
        restore(self.layer)
        self.stale = True

    @rule(whole=st.booleans())
    def reload_it(self, whole: bool) -> None:
        new = {"weight": self._bytes(self.plan.shape)}
        if whole:
            new["scale"] = self._scales()
        with reload(self.layer, scope="all" if whole else "partial") as session:
            session.load(new)
        self.oracle.update(new)
        self.stale = False

    @rule()
    def a_reload_refused_before_writing_changes_nothing(self) -> None:
        try:
            with reload(self.layer) as session:
                session.update("weight", self._bytes((5, 3)))
        except ReloadError:
            return
        raise AssertionError("a reload with a wrong shape was accepted")

    # -- copies --------------------------------------------------------------------------------------------------------

    @rule(by=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, by: str) -> None:
        if by == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        else:
            file = io.BytesIO()
            torch.save(self.layer, file)
            file.seek(0)
            self.layer = torch.load(file, weights_only=False)
        self.addresses = self._addresses()

    # -- laws ----------------------------------------------------------------------------------------------------------

    @invariant()
    def law_1_every_name_reads_as_if_nothing_were_shared(self) -> None:
        for name, value in self.oracle.items():
            parameter = self._parameter(name)
            _same(parameter, value, name)
            _same(parameter.data[:1], value[:1], f"{name}.data[:1]")
            _same(parameter[-1:], value[-1:], f"{name}[-1:]")
            _same(parameter.flatten()[1:], value.flatten()[1:], f"{name}.flatten()[1:]")

    @invariant()
    def law_3_no_address_moves(self) -> None:
        if self._addresses() != self.addresses:
            raise AssertionError(f"an address moved (law 3): {self.addresses} -> {self._addresses()}")

    @invariant()
    def law_5_the_state_dict_is_what_was_written(self) -> None:
        exported = checkpoint_state_dict(self.layer)
        if exported.keys() != self.oracle.keys():
            raise AssertionError(f"the state dict lists {sorted(exported)} (law 5)")
        for name, value in self.oracle.items():
            _same(exported[name], value, f"state dict {name}")

    @invariant()
    def law_8_a_stale_layer_refuses_and_a_ready_one_is_right(self) -> None:
        registry = registry_of(self.layer)
        if registry is None or registry.is_ready == self.stale:
            raise AssertionError(f"stale={self.stale}, but the registry says ready={registry and registry.is_ready} (law 8)")
        if self.stale:
            try:
                self.layer()
            except StaleKernelError:
                return
            raise AssertionError("a stale layer answered (law 8)")
        prepared, alpha = self.layer()
        _same(prepared, self.plan.transform.forward(self.oracle["weight"]), "weight_prepared")
        _same(alpha, self.oracle["scale"].max().reshape(1), "alpha")
        _same(self.layer.get_buffer("alpha_inv"), 1.0 / self.oracle["scale"].max().reshape(1), "alpha_inv")

    @precondition(lambda self: not self.stale)
    @rule()
    def law_9_warm_equals_cold(self) -> None:
        cold = self.plan.make(self.device, aliasing=self.aliasing)
        with reload(cold) as session:
            session.load(self.oracle)
        for (name, warm), (_, fresh) in zip(self.layer.named_buffers(), cold.named_buffers(), strict=True):
            _same(warm, fresh, f"{name}, warm against cold (law 9)")


def machine_for(device: str, *, aliasing: bool = True) -> Any:
    """A TestCase class which runs the machine on a device, with aliasing or with copies (law 7)."""
    name = f"AliasMachine_{device}_{'alias' if aliasing else 'copy'}"
    return type(name, (AliasMachine,), {"device": device, "aliasing": aliasing}).TestCase  # type: ignore[attr-defined]


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(found, expected):
        raise AssertionError(f"{what}: expected {expected.tolist()}, found {found.tolist()}")
