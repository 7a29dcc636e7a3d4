"""A state machine which drives a declared module against an oracle that shares nothing.

The oracle keeps each checkpoint tensor as a plain tensor of its own, with a bool per element for what has arrived, and computes
every kernel name from it by index formulas and the declared functions. Views and writes are done alike to both.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

from .. import Layout, expose_for_writing, invalidate, process, reload
from ..errors import AliasError, PointerError, ReloadError, StateError
from ._invariants import Invariants
from ._mask import covers, mark
from ._oracle import in_order, need_same
from ._strategies import Make, layers, lines
from ._values import Values, any_values, same_bytes
from ._views import chains, followed, titled
from ._writes import WRITES, has_arithmetic, values_like


class AliasMachine(Invariants, RuleBasedStateMachine):
    """Loads, writes, reads, processes, copies and reloads one module in any order."""

    #: What is drawn: functions that make the module.
    makers: st.SearchStrategy[Make] = layers().map(lambda plan: plan.make_empty)
    values: Values = staticmethod(any_values)
    #: Whether any bytes are legal values (not so for scales that must agree, say): then parts and in-place arithmetic too.
    arithmetic = True
    #: Whether ``weight`` may be given other layouts.
    retargets = True

    @initialize(data=st.data(), seed=st.integers(0, 1 << 16), loaded=st.booleans())
    def begin(self, data: st.DataObject, seed: int, loaded: bool) -> None:
        self.make = data.draw(self.makers)
        self.random = torch.Generator().manual_seed(seed)
        self.layer = self.make(self.device, self.aliasing)
        specs = {name: source.plan.source for name, source in self._registry().sources.items()}
        self.oracle = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in specs.items()}
        self.arrived = {name: torch.zeros(spec.shape, dtype=torch.bool) for name, spec in specs.items()}
        self.addresses = self._addresses()
        self.stale = True
        if loaded:
            self._wrote_all({name: self._new(name) for name in specs}, lambda n, v: self._parameter(n).copy_(v))

    def _new(self, name: str) -> Tensor:
        return self.values(name, self._registry().sources[name].plan.source, self.random).to(self.device)

    def _pick(self, index: int) -> str:
        return list(self.oracle)[index % len(self.oracle)]

    def _wrote_all(self, new: dict[str, Tensor], do: Any) -> None:
        for name, value in new.items():
            do(name, value.clone())
            self.oracle[name] = value
            self.arrived[name].fill_(True)
        self.stale = True

    # -- views -----------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), index=st.integers(0, 7))
    def read_a_view(self, data: st.DataObject, index: int) -> None:
        name = self._pick(index)
        steps = data.draw(chains(self.oracle[name]))
        try:
            found = followed(self._parameter(name), steps).clone()
        except StateError:
            if covers(self.arrived[name], self.oracle[name].dtype, steps):
                raise
            return
        expected = followed(self.oracle[name], steps)
        if not covers(self.arrived[name], self.oracle[name].dtype, steps):
            raise AssertionError(f"{name}{titled(steps)} was read, and has not arrived (law 8)")
        need_same(found, expected, f"{name}{titled(steps)}")
        if found.is_conj() != expected.is_conj() and found.is_conj():
            raise AssertionError(f"{name}{titled(steps)} has another conj bit")

    @precondition(lambda self: self.arithmetic)
    @rule(data=st.data(), index=st.integers(0, 7), write=st.sampled_from(WRITES))
    def write_a_view(self, data: st.DataObject, index: int, write: Any) -> None:
        name = self._pick(index)
        plain = self.oracle[name].clone()
        steps = data.draw(chains(plain))
        target = followed(plain, steps)
        if write.arithmetic and not has_arithmetic(target.dtype):
            return
        value = values_like(target, self.random)
        arrived = covers(self.arrived[name], plain.dtype, steps)
        if not arrived and (target.is_conj() or target.is_neg()):
            return  # torch's fallback for such views reads them first, for some operators
        readable = not write.reads or arrived
        refused = _raised(lambda: write.do(target, value))
        error = _raised(lambda: write.do(followed(self._parameter(name), steps), value))
        what = f"{write.title} on {name}{titled(steps)}"
        if refused is not None or not readable:
            if error is None:
                raise AssertionError(f"{what} was not refused; torch says {refused}, all arrived: {readable}")
        elif error is not None:
            raise error
        else:
            self.oracle[name] = plain
            mark(self.arrived[name], plain.dtype, steps)
        self.stale = self.stale or error is None
        if not target.numel() or error is not None:
            self.stale = not self._registry().is_ready

    @precondition(lambda self: self.arithmetic)
    @rule(data=st.data(), indices=st.tuples(st.integers(0, 7), st.integers(0, 7)))
    def write_two_views_at_once(self, data: st.DataObject, indices: tuple[int, int]) -> None:
        names = [self._pick(i) for i in indices]
        plain = {name: self.oracle[name].clone() for name in names}
        both = [data.draw(chains(plain[name])) for name in names]
        targets = [followed(plain[name], steps) for name, steps in zip(names, both, strict=True)]
        if any(t.is_conj() or t.is_neg() for t in targets):
            return  # torch has none of these
        new = [values_like(t, self.random) for t in targets]
        torch._foreach_copy_(targets, new)
        torch._foreach_copy_([followed(self._parameter(n), steps) for n, steps in zip(names, both, strict=True)], new)
        for name, steps in zip(names, both, strict=True):
            mark(self.arrived[name], plain[name].dtype, steps)
        self.oracle.update(plain)
        self.stale = True if all(t.numel() for t in targets) else not self._registry().is_ready

    # -- the whole of a name ---------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 7), through=st.sampled_from(["setattr", "data", "staging", "kernel order", "loader"]))
    def replace_the_whole(self, index: int, through: str) -> None:
        name = self._pick(index)

        def do(name: str, value: Tensor) -> None:
            source = self._registry().sources[name]
            if through == "setattr":
                setattr(self.layer, name, nn.Parameter(value, requires_grad=False))
            elif through == "data":
                self._parameter(name).data = value
            elif through == "kernel order" and source.derived:
                with expose_for_writing(self.layer, name, order="kernel") as exposure:
                    exposure.memory.copy_(in_order(source.layout, source, value))
            elif through == "loader":
                self._parameter(name).data.copy_(value)
                value.view(-1).view(torch.uint8).fill_(0x5A)  # the transport uses its buffer again
            else:
                with expose_for_writing(self.layer, name) as exposure:
                    exposure.memory.copy_(value)

        self._wrote_all({name: self._new(name)}, do)
        if through == "setattr":
            _raised(lambda: process(self.layer), AliasError)
            self.stale = not self._is_whole()

    @rule(assign=st.booleans())
    def load_a_state_dict(self, assign: bool) -> None:
        new = {name: self._new(name) for name in self.oracle}
        self.layer.load_state_dict({n: v.clone() for n, v in new.items()}, assign=assign)
        self._wrote_all(new, lambda n, v: None)

    @rule(index=st.integers(0, 7))
    def a_write_that_fails_changes_nothing(self, index: int) -> None:
        parameter = self._parameter(self._pick(index))
        if _raised(lambda: parameter.copy_(torch.zeros(97, 89, 83, dtype=torch.uint8, device=self.device))) is None:
            raise AssertionError("copy_ of a tensor that cannot broadcast succeeded")

    @rule()
    def forget_everything(self) -> None:
        invalidate(self.layer)
        for arrived in self.arrived.values():
            arrived.fill_(not arrived.numel())
        self.stale = True

    # -- processing and reloading ----------------------------------------------------------------------------------------

    @rule(times=st.integers(1, 3))
    def process_it(self, times: int) -> None:
        if not self._is_whole():
            if not isinstance(_raised(lambda: process(self.layer)), StateError):
                raise AssertionError("a module that is not whole was processed (law 8)")
            return
        process(self.layer)
        for _ in range(times - 1):
            if process(self.layer) != 0:
                raise AssertionError("processing again did work (law 2)")
        self.stale = False

    @rule(index=st.integers(0, 7), whole=st.booleans())
    def reload_it(self, index: int, whole: bool) -> None:
        if not whole and not self._is_whole():
            return
        new = {name: self._new(name) for name in (self.oracle if whole else [self._pick(index)])}
        with reload(self.layer, scope="all" if whole else "partial") as session:
            session.load(new)
        self._wrote_all(new, lambda n, v: None)
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

    @precondition(lambda self: self.retargets and self.aliasing)
    @rule(data=st.data())
    def give_it_another_layout(self, data: st.DataObject) -> None:
        source = self._registry().sources["weight"]
        new = data.draw(lines(source.layout.core_dims if isinstance(source.layout, Layout) else len(source.plan.source.shape)))
        try:
            self._registry().retarget({"weight": new})
        except PointerError:
            return  # more memory than was planned
        self.stale = True
        self.retargeted = True

    # -- copies ----------------------------------------------------------------------------------------------------------

    @rule(by=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, by: str) -> None:
        if by == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        else:
            self.layer = _through_a_file(self.layer, weights_only=False)
        self.addresses = self._addresses()

    @precondition(lambda self: self._is_whole())
    @rule()
    def what_is_saved_of_it_loads_as_values(self) -> None:
        saved = _through_a_file(dict(self.layer.named_parameters()), weights_only=True)
        for name, value in self.oracle.items():
            if type(saved[name]) not in (Tensor, nn.Parameter) or not same_bytes(saved[name], value):
                raise AssertionError(f"{name} was saved as {saved[name]}")

    @precondition(lambda self: not self.stale and not self.retargeted)
    @rule()
    def law_6_and_9_warm_equals_cold(self) -> None:
        cold = self.make(self.device, self.aliasing)
        with reload(cold) as session:
            session.load(self.oracle)
        for (name, warm), (_, fresh) in zip(self.layer.named_buffers(), cold.named_buffers(), strict=True):
            need_same(warm, fresh, f"{name}, warm against cold (laws 6 and 9)")


def _raised(do: Any, kind: type[Exception] = Exception) -> Exception | None:
    try:
        do()
    except kind as error:
        return error
    return None


def _through_a_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


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
        arithmetic: False leaves out writes of parts and in-place arithmetic, where they would make values illegal.
    """
    name = f"AliasMachine_{device}_{'alias' if aliasing else 'copy'}"
    settings: dict[str, Any] = {"device": device, "aliasing": aliasing, "arithmetic": arithmetic, "retargets": make is None}
    if make is not None:
        settings["makers"] = st.just(make)
    if values is not None:
        settings["values"] = staticmethod(values)
    return type(name, (AliasMachine,), settings).TestCase  # type: ignore[attr-defined]
