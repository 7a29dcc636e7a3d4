"""`check_method`: drive any quantization method through loads, partial loads, failures and processing, and name the law that
breaks.

It looks at a method from outside, as an engine does: parameters are loaded through their loaders, processing is called, and
what the kernel would read and the forward answers is compared with a cold start on the same weights. So it judges a hand-written
``process_weights_after_loading`` and a declared module alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from .. import process as process_declared
from ..module.registry import registries
from ._engine import Forward, Outputs, forward_of, kernel_names
from ._laws import LawBroken, Report
from ._method import Method
from ._probe import Broken, probe
from ._run import Run
from ._values import Values, any_values

#: Kind, index of a tensor, first and last row as fractions, operator that fails.
_Plan = list[tuple[str, int, float, float, int]]
#: A plan, how much of the first load comes by halves, and the seed of its values.
_Example = tuple[_Plan, float | None, int]


def check_method(
    make: Callable[[], nn.Module],
    *,
    process: Callable[[nn.Module], Any] = process_declared,
    before_load: Callable[[nn.Module], Any] = lambda module: None,
    outputs: Outputs = kernel_names,
    forward: Forward | None = None,
    values: Values | None = None,
    max_bytes: int | None = None,
    examples: int = 50,
    partial: bool = True,
    export: bool = True,
    without: Collection[int] = (),
    name: str | None = None,
) -> Report:
    """Check a quantization method against the laws, on random sequences of loads, partial loads, exports, failures, processing.

    Laws 8 and 10 need to see the module refuse: any exception of its forward is a refusal. Law 7 runs every sequence once more
    with aliasing off, for methods that declare something or use the ported helpers.

    Args:
        make: returns a fresh module with its checkpoint-format parameters, not loaded. What its state dict lists is what a
            checkpoint holds.
        process: the method's ``process_weights_after_loading``; default :func:`aliasparam.process`.
        before_load: called before every load but the first, where an engine has such a hook (``restore_weights_before_loading``).
        outputs: what the kernel reads; default the declared kernel names, or every tensor that processing added.
        forward: calls a module; default ``module()`` where its forward takes no argument. Declared modules with another
            forward are judged by whether it would be refused and by ``outputs``; of other modules laws 8 and 10 are not checked.
        values: ``values(name, spec, random)`` gives legal checkpoint values; default: any.
        max_bytes: upper bound of what the module may have allocated after processing.
        examples: sequences to try.
        partial: also load single tensors and rows of them (law 6).
        export: also compare the state dict with what was loaded (law 5).
        without: laws that the method does not claim, by number.
        name: what to call the method in messages.

    Returns:
        What was done, and which laws were not checked.

    Raises:
        LawBroken: with the law, and the shortest sequence found that breaks it.
    """
    out = frozenset(without) | (set() if partial else {6}) | (set() if export else {5})
    title = name or str(getattr(make, "__qualname__", type(make).__name__))
    method = Method(
        title, make, process, before_load, outputs, forward, values or any_values, max_bytes, 5 not in out, frozenset(out)
    )
    report = Report(title, unchecked=dict.fromkeys(sorted(out), "not claimed"))
    kinds = ["reload", "process", *(["part", "rows"] if 6 not in out else []), *(["export"] if 5 not in out else [])]
    with torch.no_grad():
        kinds += _look(method, report)
        try:
            _probe(method)
            _sequences(method, report, kinds, examples)
            if 10 not in report.unchecked:
                _every_failure(method, report, most=examples)
        except LawBroken as broken:
            report.broken = broken
            raise
    return report


def _look(method: Method, report: Report) -> list[str]:
    """What can be checked of this method besides what always can: notes the laws that cannot."""
    module = method.made()
    if method.forward is None and forward_of(module, method.outputs) is None:
        for law in (8, 10):
            report.unchecked.setdefault(law, "its forward takes arguments or is missing, pass forward=")
    if not _declares(method, module):
        report.unchecked.setdefault(7, "it declares nothing")
    return ["fault in process", "fault in load"] if 10 not in report.unchecked else []


def _probe(method: Method) -> None:
    """Ask the declared functions themselves, which costs less than to meet their faults by chance (law 1)."""
    for path, registry in registries(method.made()):
        try:
            probe(registry, method.values, torch.Generator().manual_seed(0))
        except Broken as broken:
            raise LawBroken(method.name, 1, f"{path or registry.label}: {broken}", ["call it by itself"]) from broken


def _declares(method: Method, module: nn.Module) -> bool:
    if registries(module):
        return True
    run = Run(method, torch.Generator().manual_seed(0))
    try:  # the ported helpers declare while processing
        run.begin(None)
    except LawBroken:
        return False
    return bool(registries(run.module))


def _sequences(method: Method, report: Report, kinds: list[str], examples: int) -> None:
    step = st.tuples(st.sampled_from(kinds), st.integers(0, 15), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 255))
    half = st.none() if 8 in report.unchecked else st.one_of(st.none(), st.floats(0, 0.99))

    failing: list[_Example] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(step, max_size=6), half, st.integers(0, 1 << 16))
    def sequence(plan: _Plan, half: float | None, seed: int) -> None:
        report.sequences += 1
        try:
            _follow_both(method, report, (plan, half, seed))
        except LawBroken:
            failing[:] = [(plan, half, seed)]
            raise

    try:
        sequence()
    except LawBroken as broken:
        raise _shortened(method, report, failing[0], broken) from None


def _shortened(method: Method, report: Report, example: _Example, broken: LawBroken) -> LawBroken:
    """The same law broken by fewer steps: what is left of hypothesis's shortest after leaving out one step at a time."""
    plan, half, seed = example
    fewer: list[_Example] = [(plan[:i] + plan[i + 1 :], half, seed) for i in range(len(plan))]
    for i, (kind, index, first, last, at) in enumerate(plan):
        if kind == "fault in process" and index % 2:  # after loading one tensor instead of all
            fewer += [([*plan[:i], (kind, one, first, last, at), *plan[i + 1 :]], half, seed) for one in (0, 2, 4)]
    for candidate in [*fewer, *([(plan, None, seed)] if half is not None else [])]:
        try:
            _follow_both(method, report, candidate)
        except LawBroken as shorter:
            if shorter.law == broken.law and len(shorter.steps) < len(broken.steps):
                return _shortened(method, report, candidate, shorter)
        except Exception:
            continue  # a cold start that raises is not what was found
    return broken


def _follow_both(method: Method, report: Report, example: _Example) -> None:
    plan, half, seed = example
    _follow(Run(method, torch.Generator().manual_seed(seed)), plan, half, report)
    if 7 not in report.unchecked:
        _follow_without_aliasing(Run(method, torch.Generator().manual_seed(seed), aliasing=False), plan, half, report)


def _every_failure(method: Method, report: Report, most: int) -> None:
    """Each operator of processing a whole load fails once, and each of loading a tensor; ``most`` of each, evenly spaced."""
    first = Run(method, torch.Generator().manual_seed(0))
    first.begin(None)
    cold, names = first.cold(), list(first.specs)
    plan: _Plan = [("fault in process", 1, 0.0, 0.0, at) for at in _spread(cold.processing, most)]
    loads = [("fault in load", index, 0.0, 0.0, at) for index, name in enumerate(names) for at in range(cold.loading[name])]
    plan += [loads[k] for k in _spread(len(loads), most)]
    for step in plan:
        report.sequences += 1
        try:
            _follow(Run(method, torch.Generator().manual_seed(0)), [step], None, report)
        except LawBroken as broken:
            raise _shortened(method, report, ([step], None, 0), broken) from None


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [k * count // most for k in range(most)]


def _follow_without_aliasing(run: Run, plan: _Plan, half: float | None, report: Report) -> None:
    try:
        _follow(run, plan, half, report)
    except LawBroken as broken:  # the same sequence passed with aliasing on
        raise LawBroken(run.method.name, 7, f"with aliasing off: {broken.detail}", broken.steps) from broken


def _follow(run: Run, plan: _Plan, half: float | None, report: Report) -> None:
    try:
        run.begin(half)
        names = list(run.specs)
        for kind, index, first, last, at in plan:
            if kind == "process":
                run.run_processing()
            elif kind == "export":
                run.export()
            elif kind == "reload":
                run.load(names)
            elif kind == "fault in process":
                run.fail_in_processing(names if index % 2 else [names[index % len(names)]], at)
            elif kind == "fault in load":
                run.fail_in_loading(names[index % len(names)], at)
            else:
                run.load([names[index % len(names)]], rows=(first, max(first, last)) if kind == "rows" else None)
        if run.fresh:
            run.run_processing()
    finally:
        report.steps += len(run.steps)
