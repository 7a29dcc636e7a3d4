"""`check_method`: drive any quantization method through loads, partial loads and processing, and name the law that breaks.

It looks at a method from outside, as an engine does: parameters are loaded through their loaders, processing is called, and
what the kernel would read is compared with a cold start on the same weights. So it judges a hand-written
``process_weights_after_loading`` and a declared module alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import process as process_declared
from .. import registry_of
from .._transform import TensorSpec
from ._machine import Values, _any_values
from ._values import same_bytes

Outputs = Callable[[nn.Module], Mapping[str, Tensor]]

LAWS = {
    1: "Oracle: every name reads as if nothing were shared",
    2: "Idempotence: processing again changes nothing",
    3: "Pointer stability: no address moves, no loader is lost",
    4: "Memory: nothing grows with reloads",
    5: "Round trip: the state dict is what was loaded",
    6: "Selective = full: a partial load gives the bytes of a full one",
    8: "No silent garbage: a stale forward refuses",
    9: "Warm = cold: a reload gives what a fresh load gives",
}


class LawBroken(AssertionError):
    """A method broke a law.

    Attributes:
        law: its number, see :data:`LAWS`.
        detail: what was found.
        steps: the shortest sequence that was found to break it.
    """

    def __init__(self, method: str, law: int, detail: str, steps: list[str]) -> None:
        self.method, self.law, self.detail, self.steps = method, law, detail, list(steps)
        sequence = "\n".join(f"    {i + 1}. {step}" for i, step in enumerate(steps))
        super().__init__(f"{method} breaks law {law} ({LAWS[law]})\n  {detail}\n  after:\n{sequence}")


@dataclass
class Report:
    """What :func:`check_method` did."""

    method: str
    sequences: int = 0
    steps: int = 0
    broken: LawBroken | None = None

    def __str__(self) -> str:
        verdict = "all laws hold" if self.broken is None else str(self.broken)
        return f"{self.method}: {verdict} ({self.sequences} sequences, {self.steps} steps)"


def kernel_names(module: nn.Module) -> dict[str, Tensor]:
    """What a kernel reads of a module: the declared kernel names, or every tensor that is no parameter from the start."""
    registry = registry_of(module)
    if registry is not None and registry.kernel_names():
        return {name: module.get_buffer(name) for name in sorted(registry.kernel_names())}
    created = module.__dict__.get("_created_with", frozenset())
    found = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and n not in created}
    found.update({n: t for n, t in module.__dict__.items() if isinstance(t, Tensor)})
    return found


@dataclass
class _Run:
    """One sequence on one module."""

    method: str
    make: Callable[[], nn.Module]
    process: Callable[[nn.Module], Any]
    before_load: Callable[[nn.Module], Any]
    outputs: Outputs
    values: Values
    max_bytes: int | None
    random: torch.Generator
    steps: list[str] = field(default_factory=list)
    law: int = 1  # the law at stake in what follows

    def begin(self) -> None:
        self.module = self._made()
        self.specs = {n: TensorSpec.of(t) for n, t in self.module.state_dict().items()}
        self.attributes = {n: _loader_attributes(p) for n, p in self.module.named_parameters()}
        self.loaded: dict[str, Tensor] = {}
        self.addresses: dict[str, int] = {}
        self.bytes_at_first: int | None = None
        self.fresh = True
        self.load(list(self.specs))
        self.run_processing()

    def _made(self) -> nn.Module:
        module = self.make()
        module.__dict__["_created_with"] = frozenset(n for n, _ in module.named_parameters())
        return module

    # -- steps ---------------------------------------------------------------------------------------------------------

    def load(self, names: list[str], rows: tuple[float, float] | None = None) -> None:
        """Load whole tensors through their loaders, or a range of rows of one; the incoming memory is used again after."""
        whole = set(names) == set(self.specs) and rows is None
        self.law = 1 if not self.loaded else 9 if whole else 6
        if self.loaded:
            self.attempt(f"before_load({', '.join(names)})", lambda: self.before_load(self.module), quiet=True)
        for name in names:
            value = self.values(name, self.specs[name], self.random)
            if rows is None or value.dim() == 0:
                self.attempt(f"load {name}", lambda n=name, v=value: _load(self.module, n, v.clone()))  # type: ignore[misc]
                self.loaded[name] = value
            else:
                first = int(rows[0] * value.shape[0])
                last = max(first + 1, int(rows[1] * value.shape[0]))
                piece = value[first:last]
                self.attempt(
                    f"load rows {first}:{last} of {name}",
                    lambda n=name, v=piece, a=first: _load_rows(self.module, n, v.clone(), a),  # type: ignore[misc]
                )
                self.loaded[name] = self.loaded[name].clone()
                self.loaded[name][first:last] = piece
        self.fresh = True

    def run_processing(self) -> None:
        if not self.fresh:
            self.law = 2
        self.attempt("process", lambda: self.process(self.module))
        self.fresh = False
        self._compare_with_cold()
        self._addresses_stay()
        self._memory_stays()

    def export(self) -> None:
        law, self.law = self.law, 5
        exported = self.attempt(
            "export the state dict", lambda: {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        )
        self.need(self.specs.keys() <= exported.keys(), f"the state dict lost {sorted(self.specs.keys() - exported.keys())}")
        for name, value in self.loaded.items():
            self.need(same_bytes(exported[name], value), f"{name} in the state dict is not what was loaded")
        self.law = law

    # -- laws ----------------------------------------------------------------------------------------------------------

    def _compare_with_cold(self) -> None:
        cold = self._made()
        for name, value in self.loaded.items():
            _load(cold, name, value.clone(), reuse=False)
        self.process(cold)
        expected, found = self.outputs(cold), self.attempt("read the kernel names", lambda: self.outputs(self.module), quiet=True)
        self.need(expected.keys() == found.keys(), f"kernel names {sorted(found)} instead of {sorted(expected)}")
        for name, value in expected.items():
            self.need(same_bytes(found[name], value), f"{name} differs from that of a fresh load of the same weights")

    def _addresses_stay(self) -> None:
        self.law = 3
        now = {n: t.data_ptr() for n, t in self.outputs(self.module).items()}
        for name, address in self.addresses.items():
            self.need(now.get(name) == address, f"the address of {name} moved")
        self.addresses = self.addresses or now
        parameters = dict(self.module.named_parameters())
        for name, attributes in self.attributes.items():
            self.need(name in parameters, f"the parameter {name} is gone")
            lost = sorted(attributes - _loader_attributes(parameters[name]))
            self.need(not lost, f"{name} lost its loader attributes {lost}")

    def _memory_stays(self) -> None:
        self.law = 4
        now = _allocated_bytes(self.module)
        self.bytes_at_first = self.bytes_at_first if self.bytes_at_first is not None else now
        self.need(now <= self.bytes_at_first, f"{now} bytes allocated, {self.bytes_at_first} after the first load")
        if self.max_bytes is not None:
            self.need(now <= self.max_bytes, f"{now} bytes allocated, at most {self.max_bytes} are allowed")

    def attempt(self, step: str, do: Callable[[], Any], *, quiet: bool = False) -> Any:
        if not quiet:
            self.steps.append(step)
        try:
            return do()
        except LawBroken:
            raise
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            raise LawBroken(self.method, self.law, f"{step} raised {type(error).__name__}: {line}", self.steps) from error

    def need(self, held: bool, detail: str) -> None:
        if not held:
            raise LawBroken(self.method, self.law, detail, self.steps)


def check_method(
    make: Callable[[], nn.Module],
    *,
    process: Callable[[nn.Module], Any] = process_declared,
    before_load: Callable[[nn.Module], Any] = lambda module: None,
    outputs: Outputs = kernel_names,
    values: Values | None = None,
    max_bytes: int | None = None,
    examples: int = 50,
    partial: bool = True,
    export: bool = True,
    name: str | None = None,
) -> Report:
    """Check a quantization method against the laws, on random sequences of loads, partial loads, exports and processing.

    Args:
        make: returns a fresh module with its checkpoint-format parameters, not loaded. What its state dict lists is what a
            checkpoint holds.
        process: the method's ``process_weights_after_loading``; default :func:`aliasparam.process`.
        before_load: called before every load but the first, where an engine has such a hook (``restore_weights_before_loading``).
        outputs: what the kernel reads; default the declared kernel names, or every tensor that processing added.
        values: ``values(name, spec, random)`` gives legal checkpoint values; default: any.
        max_bytes: upper bound of what the module may have allocated after processing.
        examples: sequences to try.
        partial: also load single tensors and rows of them (law 6).
        export: also compare the state dict with what was loaded (law 5).
        name: what to call the method in messages.

    Returns:
        What was done.

    Raises:
        LawBroken: with the law, and the shortest sequence found that breaks it.
    """
    report = Report(name or str(getattr(make, "__qualname__", type(make).__name__)))
    kinds = ["reload", "process", *(["part", "rows"] if partial else []), *(["export"] if export else [])]
    step = st.tuples(st.sampled_from(kinds), st.integers(0, 15), st.floats(0, 0.9), st.floats(0, 1))

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(step, max_size=6), st.integers(0, 1 << 16))
    def sequence(plan: list[tuple[str, int, float, float]], seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        run = _Run(report.method, make, process, before_load, outputs, values or _any_values, max_bytes, random)
        report.sequences += 1
        try:
            _follow(run, plan)
        finally:
            report.steps += len(run.steps)

    with torch.no_grad():
        try:
            sequence()
        except LawBroken as broken:
            report.broken = broken
            raise
    return report


def _follow(run: _Run, plan: list[tuple[str, int, float, float]]) -> None:
    run.begin()
    names = list(run.specs)
    for kind, index, first, last in plan:
        if kind == "process":
            run.run_processing()
        elif kind == "export":
            run.export()
        elif kind == "reload":
            run.load(names)
        else:
            run.load([names[index % len(names)]], rows=(first, max(first, last)) if kind == "rows" else None)
    if run.fresh:
        run.run_processing()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# -- how an engine touches a module ----------------------------------------------------------------------------------------


def _load(module: nn.Module, name: str, value: Tensor, *, reuse: bool = True) -> None:
    parameter = module.get_parameter(name)
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:
        parameter.data.copy_(value)
    else:
        loader(parameter, value)
    if reuse:  # the transport uses its buffer again
        value.reshape(-1).view(torch.uint8).fill_(0x5A)


def _load_rows(module: nn.Module, name: str, value: Tensor, first: int) -> None:
    module.get_parameter(name).data.narrow(0, first, value.shape[0]).copy_(value)
    value.reshape(-1).view(torch.uint8).fill_(0x5A)


_PRIVATE = ("_alias", "_is_param")


def _loader_attributes(parameter: Tensor) -> frozenset[str]:
    return frozenset(k for k in parameter.__dict__ if not k.startswith(_PRIVATE))


def _allocated_bytes(module: nn.Module) -> int:
    """Bytes of all distinct storages that the module's tensors lie in."""
    attributes = (t for m in module.modules() for t in m.__dict__.values() if isinstance(t, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *attributes)
    return sum({s.data_ptr(): s.nbytes() for t in tensors for s in [Tensor.untyped_storage(t)]}.values())
