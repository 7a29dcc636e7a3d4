"""A state machine which drives a declared module against an oracle that shares nothing.

The oracle keeps each checkpoint tensor as a plain tensor of its own and computes every kernel name from it by the declared
transforms and derivations. After every step the two must agree (law 1), no address may have moved (law 3), and the state dict
must be the oracle's (law 5).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from .. import AliasRegistry, bulk_load, checkpoint_state_dict, expose_for_writing, process, registry_of, reload, restore
from ..errors import ReloadError, StaleKernelError
from ._oracle import expected_kernel_names, flipped, need_same
from ._strategies import layers
from ._values import Values, any_values

#: Makes a declared, empty module: ``make(device, aliasing)``.
Make = Callable[[str, bool], nn.Module]


class AliasMachine(RuleBasedStateMachine):
    """Loads, writes, reads, processes, copies and reloads one module in any order."""

    device = "cpu"
    aliasing = True
    #: What is drawn: functions that make the module.
    makers: st.SearchStrategy[Make] = layers().map(lambda plan: plan.make_empty)
    values: Values = staticmethod(any_values)
    #: Whether in-place arithmetic keeps the values legal (not so for scales that must agree, say).
    arithmetic = True

    @initialize(data=st.data(), seed=st.integers(0, 1 << 16))
    def begin(self, data: st.DataObject, seed: int) -> None:
        self.make = data.draw(self.makers)
        self.random = torch.Generator().manual_seed(seed)
        self.layer = self.make(self.device, self.aliasing)
        self.oracle = {name: self._new(name) for name in self._registry().sources}
        for name, value in self.oracle.items():
            self._parameter(name).copy_(value)
        self.addresses = self._addresses()
        self.stale = True

    def _registry(self) -> AliasRegistry:
        registry = registry_of(self.layer)
        if registry is None:
            raise AssertionError("the module declares nothing")
        return registry

    def _new(self, name: str) -> Tensor:
        return self.values(name, self._registry().sources[name].plan.source, self.random).to(self.device)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.layer.get_parameter(name)

    def _addresses(self) -> dict[str, int]:
        named = (*self.layer.named_parameters(), *self.layer.named_buffers())
        return {n: t.data_ptr() for n, t in named}

    def _pick(self, index: int) -> str:
        names = list(self.oracle)
        return names[index % len(names)]

    # -- writing -------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), index=st.integers(0, 7), through=st.sampled_from(["slice", "data", "narrow", "view", "index_put"]))
    def write_a_part(self, data: st.DataObject, index: int, through: str) -> None:
        name = self._pick(index)
        parameter, new = self._parameter(name), self._new(name)
        if parameter.dim() == 0:
            parameter.copy_(new)
            self.oracle[name] = new
            self.stale = True
            return
        first = data.draw(st.integers(0, parameter.shape[0] - 1))
        count = data.draw(st.integers(1, parameter.shape[0] - first))
        value = new[first : first + count]
        if through == "slice":
            parameter[first : first + count] = value
        elif through == "data":
            parameter.data[first : first + count].copy_(value)
        elif through == "view" and parameter.element_size() == 1:
            parameter.view(torch.int8).narrow(0, first, count).copy_(value.view(torch.int8))
        elif through == "index_put" and (parameter.element_size() > 1 or not parameter.dtype.is_floating_point):
            parameter[torch.arange(first, first + count, device=self.device)] = value
        else:
            parameter.narrow(0, first, count).copy_(value)
        self.oracle[name][first : first + count] = value
        self.stale = True

    @rule(index=st.integers(0, 7))
    def fill_with_its_first_value(self, index: int) -> None:
        name = self._pick(index)
        value = self.oracle[name].reshape(-1)[:1].clone()
        self._parameter(name).copy_(value.expand(self.oracle[name].shape))
        self.oracle[name].copy_(value.expand(self.oracle[name].shape))
        self.stale = True

    @precondition(lambda self: self.arithmetic)
    @rule(index=st.integers(0, 7), addend=st.integers(1, 7))
    def add_in_place(self, index: int, addend: int) -> None:
        name = self._pick(index)
        if self.oracle[name].element_size() == 1 and self.oracle[name].dtype.is_floating_point:
            return
        self._parameter(name).add_(addend)
        self.oracle[name].add_(addend)
        self.stale = True

    @rule(index=st.integers(0, 7))
    def copy_from_itself(self, index: int) -> None:
        name = self._pick(index)
        parameter = self._parameter(name)
        if parameter.dim() == 0:
            return
        parameter.copy_(parameter.flip(0) if parameter.element_size() > 1 else flipped(parameter.clone()))
        self.oracle[name] = flipped(self.oracle[name]).contiguous()
        self.stale = True

    @rule(index=st.integers(0, 7), through=st.sampled_from(["setattr", "data", "exposure"]))
    def replace_the_whole(self, index: int, through: str) -> None:
        name = self._pick(index)
        value = self._new(name)
        if through == "setattr":
            setattr(self.layer, name, nn.Parameter(value.clone(), requires_grad=False))
            process(self.layer)
        elif through == "data":
            self._parameter(name).data = value.clone()
        else:
            with expose_for_writing(self.layer, name) as exposure:
                exposure.memory.copy_(value)
        self.oracle[name] = value
        self.stale = through != "setattr"

    @rule(assign=st.booleans())
    def load_a_state_dict(self, assign: bool) -> None:
        self.oracle = {name: self._new(name) for name in self.oracle}
        self.layer.load_state_dict({n: v.clone() for n, v in self.oracle.items()}, assign=assign)
        self.stale = True

    @rule(index=st.integers(0, 7))
    def load_in_bulk(self, index: int) -> None:
        name = self._pick(index)
        value = self._new(name)
        with bulk_load(self.layer):
            self._parameter(name).data.copy_(value)
        self.oracle[name] = value
        self.stale = True

    @rule(index=st.integers(0, 7))
    def a_write_that_fails_changes_nothing(self, index: int) -> None:
        try:
            self._parameter(self._pick(index)).copy_(torch.zeros(97, 89, 83, dtype=torch.uint8, device=self.device))
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
        self.stale = self.stale or any(source.derived for source in self._registry().sources.values())

    @rule(index=st.integers(0, 7), whole=st.booleans())
    def reload_it(self, index: int, whole: bool) -> None:
        names = list(self.oracle) if whole else [self._pick(index)]
        new = {name: self._new(name) for name in names}
        with reload(self.layer, scope="all" if whole else "partial") as session:
            session.load(new)
        self.oracle.update(new)
        self.stale = False

    @rule(index=st.integers(0, 7))
    def a_reload_refused_before_writing_changes_nothing(self, index: int) -> None:
        name = self._pick(index)
        try:
            with reload(self.layer) as session:
                session.update(name, torch.zeros((*self.oracle[name].shape, 3), dtype=self.oracle[name].dtype))
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
            need_same(parameter.clone(), value, name)
            need_same(parameter.flatten()[1:].clone(), value.flatten()[1:], f"{name}.flatten()[1:]")
            if value.dim():
                need_same(parameter.data[:1].clone(), value[:1], f"{name}.data[:1]")
                need_same(parameter[-1:].clone(), value[-1:], f"{name}[-1:]")

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
            need_same(exported[name], value, f"state dict {name}")

    @invariant()
    def law_8_a_stale_layer_refuses_and_a_ready_one_is_right(self) -> None:
        registry = self._registry()
        if registry.is_ready == self.stale:
            raise AssertionError(f"stale={self.stale}, but the registry says ready={registry.is_ready} (law 8)")
        if self.stale:
            try:
                self.layer()
            except StaleKernelError:
                return
            raise AssertionError("a stale layer answered (law 8)")
        for name, value in expected_kernel_names(registry, self.oracle).items():
            need_same(self.layer.get_buffer(name), value, name)

    @precondition(lambda self: not self.stale)
    @rule()
    def law_6_and_9_warm_equals_cold(self) -> None:
        cold = self.make(self.device, self.aliasing)
        with reload(cold) as session:
            session.load(self.oracle)
        for (name, warm), (_, fresh) in zip(self.layer.named_buffers(), cold.named_buffers(), strict=True):
            need_same(warm, fresh, f"{name}, warm against cold (laws 6 and 9)")


def machine_for(
    device: str = "cpu",
    *,
    aliasing: bool = True,
    make: Make | None = None,
    values: Values | None = None,
    arithmetic: bool = True,
) -> Any:
    """A TestCase class which runs the machine.

    Args:
        device: where the module is made.
        aliasing: False gives every kernel name memory of its own (law 7: the results are the same).
        make: ``make(device, aliasing)`` returns a fresh module whose declared names are not loaded; default: drawn layers.
        values: ``values(name, spec, random)`` returns legal checkpoint values; default: any.
        arithmetic: False leaves out in-place arithmetic, where it would make values illegal.
    """
    name = f"AliasMachine_{device}_{'alias' if aliasing else 'copy'}"
    settings: dict[str, Any] = {"device": device, "aliasing": aliasing, "arithmetic": arithmetic}
    if make is not None:
        settings["makers"] = st.just(make)
    if values is not None:
        settings["values"] = staticmethod(values)
    return type(name, (AliasMachine,), settings).TestCase  # type: ignore[attr-defined]
