"""One sequence of loads, processing and failures on one module, against cold starts on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..module.registry import registries
from ..spec import TensorSpec
from ._engine import allocated_bytes, forward_of, load, load_rows, loader_attributes, same_answer
from ._faults import FailingAt
from ._laws import LawBroken
from ._method import Cold, Method, switched
from ._values import same_bytes


@dataclass
class Run:
    """One sequence on one module."""

    method: Method
    random: torch.Generator
    aliasing: bool = True
    steps: list[str] = field(default_factory=list)
    law: int = 1  # the law at stake in what follows

    def begin(self, half: float | None) -> None:
        """Make a module and load it, first by halves if ``half`` says how many of its tensors."""
        self.module = self.method.made(aliasing=self.aliasing)
        self.forward = None if 8 in self.method.without else self.method.forward or forward_of(self.module, self.method.outputs)
        self.specs = {n: TensorSpec.of(t) for n, t in self.module.state_dict().items()}
        self.attributes = {n: loader_attributes(p) for n, p in self.module.named_parameters()}
        self.loaded: dict[str, Tensor] = {}
        self.addresses: dict[str, int] = {}
        self.bytes_at_first: int | None = None
        self.fresh = True
        self._cold: Cold | None = None
        if half is not None and self.forward is not None:
            self._begin_by_half(half)
        self.load(list(self.specs))
        self.run_processing()

    def _begin_by_half(self, half: float) -> None:
        names = list(self.specs)
        whole = names[: int(half * len(names))]
        cut = names[len(whole)]
        for name in whole:
            self.attempt(f"load {name}", lambda n=name: load(self.module, n, self._new(n)))  # type: ignore[misc]
        if self.specs[cut].shape and (rows := int(half * self.specs[cut].shape[0])):
            self.attempt(f"load rows 0:{rows} of {cut}", lambda: load_rows(self.module, cut, self._new(cut)[:rows], 0))
        self.law = 8
        self.need(self._answer() is None, "a half-written module answered")
        if registries(self.module):
            self.tolerate("process", self._process)
            self.need(self._answer() is None, "a half-written module was processed, and answered")

    def _new(self, name: str) -> Tensor:
        return self.method.values(name, self.specs[name], self.random).clone()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def load(self, names: list[str], rows: tuple[float, float] | None = None) -> None:
        """Load whole tensors through their loaders, or a range of rows of one; the incoming memory is used again after."""
        whole = set(names) == set(self.specs) and rows is None
        self.law = 1 if not self.loaded else 9 if whole else 6
        self._announce(names)
        for name in names:
            value = self._new(name)
            if rows is None or value.dim() == 0:
                self.attempt(f"load {name}", lambda n=name, v=value: load(self.module, n, v.clone()))  # type: ignore[misc]
                self.loaded[name] = value
            else:
                first = int(rows[0] * value.shape[0])
                last = max(first + 1, int(rows[1] * value.shape[0]))
                piece = value[first:last]
                self.attempt(
                    f"load rows {first}:{last} of {name}",
                    lambda n=name, v=piece, a=first: load_rows(self.module, n, v.clone(), a),  # type: ignore[misc]
                )
                self.loaded[name] = self.loaded[name].clone()
                self.loaded[name][first:last] = piece
        self.fresh, self._cold = True, None
        self._stale_refuses()

    def _announce(self, names: list[str]) -> None:
        if self.loaded:
            self.attempt(f"before_load({', '.join(names)})", lambda: self.method.before_load(self.module), quiet=True)

    def run_processing(self) -> None:
        if not self.fresh:
            self.law = 2
        self.attempt("process", self._process)
        self.fresh = False
        self._is_cold()
        self._addresses_stay()
        self._memory_stays()

    def _process(self) -> Any:
        with switched(self.aliasing):
            return self.method.process(self.module)

    def export(self) -> None:
        law, self.law = self.law, 5
        exported = self.attempt(
            "export the state dict", lambda: {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        )
        self.need(self.specs.keys() <= exported.keys(), f"the state dict lost {sorted(self.specs.keys() - exported.keys())}")
        for name, value in self.loaded.items():
            self.need(same_bytes(exported[name], value), f"{name} in the state dict is not what was loaded")
        self.law = law

    # -- failures ------------------------------------------------------------------------------------------------------

    def fail_in_processing(self, names: list[str], at: int) -> None:
        """Load some tensors, and let an operator fail while they are processed; then process again."""
        before = self.cold()
        self.load(names)
        after = self.cold()
        self.law = 10
        self._failing("process", at % after.processing, self._process)
        self._old_new_or_refused(before, after)
        self.tolerate("process", self._process)
        self._old_new_or_refused(before, after)
        self._recovers()

    def fail_in_loading(self, name: str, at: int) -> None:
        """Let an operator fail while one tensor is loaded. A load that failed is not processed, it is done again."""
        before = self.cold()
        value = self._new(name)
        after = self.cold({**self.loaded, name: value})
        self.law = 10
        self._announce([name])
        self._failing(f"load {name}", at % after.loading[name], lambda: load(self.module, name, value.clone()))
        self._old_new_or_refused(before, after)
        self._recovers()

    def _failing(self, step: str, at: int, do: Callable[[], Any]) -> None:
        fault = FailingAt(at)

        def run() -> None:
            with fault:
                do()

        self.steps.append(step)
        self._quietly(run)
        if fault.failed:
            self.steps[-1] += f", in which operator {fault.at} ({fault.failed}) fails"

    def _old_new_or_refused(self, *cold: Cold) -> None:
        answer = self._answer()
        if answer is not None:
            self.need(
                any(same_answer(answer, c.answer) for c in cold), "a failure left what is neither old nor new, and it answers"
            )
        for name in self.specs if self.method.export else ():
            found = self._quietly(lambda n=name: self.module.state_dict()[n].detach().clone())  # type: ignore[misc]
            legal = found is None or any(same_bytes(found, c.loaded[name]) for c in cold)
            self.need(legal, f"a failure left bytes under {name} that are neither old nor new")

    def _recovers(self) -> None:
        """After any failure a whole load and processing give what a cold start gives."""
        self._announce(list(self.specs))
        for name in self.specs:
            value = self._new(name)
            self.attempt(f"load {name}", lambda n=name, v=value: load(self.module, n, v.clone()))  # type: ignore[misc]
            self.loaded[name] = value
        self._cold = None
        self.attempt("process", self._process)
        self.fresh = False
        self._is_cold()

    # -- laws ----------------------------------------------------------------------------------------------------------

    def cold(self, loaded: dict[str, Tensor] | None = None) -> Cold:
        """A fresh module (with aliasing on) after loading what is loaded, or ``loaded``, and processing."""
        if loaded is None and self._cold is not None:
            return self._cold
        weights = dict(self.loaded if loaded is None else loaded)
        module, loading = self.method.made(), {}
        for name, value in weights.items():
            with FailingAt() as count:
                load(module, name, value.clone(), reuse=False)
            loading[name] = count.count + 4  # a later load tells more listeners than a first
        with FailingAt() as count:
            self.method.process(module)
        outputs = {n: t.detach().clone() for n, t in self.method.outputs(module).items()}
        answer = [] if self.forward is None else self.attempt("call it", lambda: self._called(module), quiet=True)
        # What a first processing allocates, a later one copies into.
        cold = Cold(weights, outputs, answer, count.count + 2 * len(outputs) + 1, loading)
        self._cold = cold if loaded is None else self._cold
        return cold

    def _called(self, module: nn.Module) -> list[Any]:
        forward = self.forward
        if forward is None:
            raise AssertionError("asked for an answer of a module whose forward is not looked at")
        answer = forward(module)
        return list(answer) if isinstance(answer, list) else [answer]

    def _answer(self) -> list[Any] | None:
        """What the module answers now; None if it refuses."""
        answer: list[Any] | None = self._quietly(lambda: self._called(self.module))
        return answer

    def _stale_refuses(self) -> None:
        if self.forward is None:
            return
        law, self.law = self.law, 8
        answer = self._answer()
        self.need(
            answer is None or same_answer(answer, self.cold().answer),
            "called before it was processed, the module answered with something else than its weights give",
        )
        self.law = law

    def _is_cold(self) -> None:
        expected = self.cold()
        found = self.attempt("read the kernel names", lambda: self.method.outputs(self.module), quiet=True)
        self.need(expected.outputs.keys() == found.keys(), f"kernel names {sorted(found)} instead of {sorted(expected.outputs)}")
        for name, value in expected.outputs.items():
            self.need(same_bytes(found[name], value), f"{name} differs from that of a fresh load of the same weights")
        if self.forward is not None:
            answer = self.attempt("call it", lambda: self._called(self.module), quiet=True)
            self.need(same_answer(answer, expected.answer), "it answers otherwise than a fresh load of the same weights")

    def _addresses_stay(self) -> None:
        self.law = 3
        now = {n: t.data_ptr() for n, t in self.method.outputs(self.module).items()}
        for name, address in self.addresses.items():
            self.need(now.get(name) == address, f"the address of {name} moved")
        self.addresses = self.addresses or now
        parameters = dict(self.module.named_parameters())
        for name, attributes in self.attributes.items():
            self.need(name in parameters, f"the parameter {name} is gone")
            lost = sorted(attributes - loader_attributes(parameters[name]))
            self.need(not lost, f"{name} lost its loader attributes {lost}")

    def _memory_stays(self) -> None:
        self.law = 4
        now = allocated_bytes(self.module)
        self.bytes_at_first = self.bytes_at_first if self.bytes_at_first is not None else now
        self.need(now <= self.bytes_at_first, f"{now} bytes allocated, {self.bytes_at_first} after the first load")
        if self.method.max_bytes is not None and self.aliasing:
            self.need(now <= self.method.max_bytes, f"{now} bytes allocated, at most {self.method.max_bytes} are allowed")

    # -- attempts ------------------------------------------------------------------------------------------------------

    def attempt(self, step: str, do: Callable[[], Any], *, quiet: bool = False) -> Any:
        """Do it; an error breaks the law at stake."""
        if not quiet:
            self.steps.append(step)
        try:
            return do()
        except LawBroken:
            raise
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            raise LawBroken(self.method.name, self.law, f"{step} raised {type(error).__name__}: {line}", self.steps) from error

    def tolerate(self, step: str, do: Callable[[], Any]) -> None:
        """Do it; an error is a refusal, which is right."""
        self.steps.append(step)
        self._quietly(do)

    def _quietly(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception:
            return None

    def need(self, held: bool, detail: str) -> None:
        if not held:
            raise LawBroken(self.method.name, self.law, detail, self.steps)
