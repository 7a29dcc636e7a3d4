"""Law 10: a failure anywhere, also an interrupt between two lines, leaves old values, new values, or a refusal."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aliasparam
from aliasparam import Alias, Derivation, Layout, apply_delta, declare, expose_for_writing, invalidate, process, reload
from aliasparam.errors import AliasError, StaleKernelError
from aliasparam.module.registry import registry_of
from aliasparam.reload import observe
from aliasparam.storage import locks
from aliasparam.testing import expected_kernel_names, same_bytes
from aliasparam.testing._faults import FailingAt

from .reload.delta_cases import trainer_writes
from .reload.folders import plain
from .small import INTERLEAVE, SWAP, SWAP_PAD16, Layer, kernel, largest, storage_of, the_registry

LIBRARY = str(Path(aliasparam.__file__).parent) + "/"
SHAPE = (2, 6, 8)


PADDED, SWAPPED, ALTERNATING = Layout(SWAP_PAD16), Layout(SWAP), Layout(INTERLEAVE)


class Model(nn.Module):
    """Two declared layers, one with padding and a derivation, loaded and ready."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Layer(SHAPE, PADDED, scale=True, room_for=(ALTERNATING,))
        self.b = Layer(SHAPE, SWAPPED)
        process(self)


OLD = {name: value.clone() for name, value in Model().state_dict().items()}
NEW = {"a.weight": OLD["a.weight"].flip(1), "a.scale": OLD["a.scale"] + 7, "b.weight": OLD["b.weight"].flip(1)}


def lent(model: Model, order: Any) -> None:
    with expose_for_writing(model, "b.weight", order=order) as exposure:
        exposure.memory.copy_(NEW["b.weight"] if order == "checkpoint" else kernel(SWAP, NEW["b.weight"]))


def spoiled(model: Model, *, abandon: bool) -> None:
    exposure = expose_for_writing(model, "b.weight", order="kernel")
    exposure.memory.fill_(9)
    if abandon:
        exposure.abandon()
    del exposure
    quietly(model.b.weight.clone)


def written_by_other_code(model: Model) -> None:
    model.b.prepared.fill_(9)
    quietly(model.b.weight.clone)


def reloaded(model: Model) -> None:
    with reload(model) as session:
        session.load(NEW)


def reloaded_by(policy: Any) -> Callable[[Model], None]:
    def reloaded_so(model: Model) -> None:
        with reload(model, policy=policy) as session:
            session.load(NEW)

    return reloaded_so


@cache
def delta_folder() -> Path:
    old, new = ({name: plain(value) for name, value in values.items()} for values in (OLD, NEW))
    return trainer_writes(Path(tempfile.mkdtemp()) / "delta", old, new, 1, "xor", "adler32")


def replaced(model: Model) -> None:
    model.a.weight = nn.Parameter(NEW["a.weight"].clone(), requires_grad=False)
    process(model)


def at_once(model: Model) -> None:
    torch._foreach_copy_([model.a.weight, model.b.weight], [NEW["a.weight"], NEW["b.weight"]])


#: What is done to a ready model: every tensor goes from OLD to NEW, or not at all.
ACTIONS: dict[str, Callable[[Model], Any]] = {
    "a whole tensor": lambda m: m.a.weight.copy_(NEW["a.weight"]),
    "strided values": lambda m: m.b.weight.copy_(NEW["b.weight"].transpose(0, 2).contiguous().transpose(0, 2)),
    "values of another dtype": lambda m: m.b.weight.copy_(NEW["b.weight"].float()),
    "in place": lambda m: m.a.scale.add_(7),
    "a view that is no box": lambda m: (
        m.b.weight.view(torch.int16).view(-1)[::1].copy_(NEW["b.weight"].view(torch.int16).view(-1))
    ),
    "two tensors at once": at_once,
    "load_state_dict": lambda m: m.load_state_dict(NEW),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict({n: v.clone() for n, v in NEW.items()}, assign=True),
    "setattr and process": replaced,
    "a derivation": lambda m: (m.a.scale.copy_(NEW["a.scale"]), process(m)),
    "lent in checkpoint order": lambda m: lent(m, "checkpoint"),
    "lent in kernel order": lambda m: lent(m, "kernel"),
    "lent and given up": lambda m: spoiled(m, abandon=True),
    "lent and dropped": lambda m: spoiled(m, abandon=False),
    "written by other code": written_by_other_code,
    "another layout": lambda m: the_registry(m.a).retarget({"weight": ALTERNATING}),
    "another layout, without padding": lambda m: the_registry(m.b).retarget({"weight": ALTERNATING}),
    "invalidate": invalidate,
    "reload": reloaded,
    "reload, with a journal": reloaded_by("journal"),
    "reload, staged": reloaded_by("staged"),
    "reload, staged with a journal": reloaded_by("staged-journal"),
    "a delta": lambda m: apply_delta(m, delta_folder()),
}


def quietly(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except (AliasError, AttributeError):
        return None


def need_old_new_or_refusal(model: Model, what: str) -> None:
    for name in OLD:
        found = quietly(lambda n=name: model.get_parameter(n).clone())  # type: ignore[misc]
        assert found is None or same_bytes(found, OLD[name]) or same_bytes(found, NEW[name]), f"{what}: {name} is a mixture"
    for label, layer in model.named_children():
        served = quietly(layer)
        if served is not None:
            line = str(the_registry(layer).sources["weight"].layout)
            legal = [prepared(line, label, new) for new in (False, True)]
            assert any(same_bytes(served, value) for value in legal), f"{what}: {label} serves a mixture"


@cache
def prepared(line: str, label: str, new: bool) -> Tensor:
    return kernel(line, (NEW if new else OLD)[f"{label}.weight"])


def need_recovery(model: Model, what: str) -> None:
    new = {name: value.flip(0) for name, value in OLD.items()}
    if any(storage_of(layer).exposed for layer in model.children()):
        invalidate(model)
    model.load_state_dict(new)
    process(model)
    with reload(model) as session:
        session.load(new)
    for label, layer in model.named_children():
        values = {n.partition(".")[2]: v for n, v in new.items() if n.startswith(label)}
        for name, expected in expected_kernel_names(the_registry(layer), values).items():
            assert same_bytes(layer.get_buffer(name), expected), f"{what}: {label}.{name} is not brought back"


@pytest.mark.parametrize("action", ACTIONS)
def test_law_10_any_operator_fails(action: str) -> None:
    for at in range(1000):
        model = Model()
        fault = FailingAt(at)
        try:
            with fault:
                ACTIONS[action](model)
        except Exception:  # torch and derivations have the fault in an error of their own
            if not fault.failed:
                raise
        what = f"{action}, operator {at} ({fault.failed}) failed"
        need_old_new_or_refusal(model, what)
        quietly(lambda m=model: process(m))  # type: ignore[misc]
        need_old_new_or_refusal(model, f"{what}, processed")
        need_recovery(model, what)
        if not fault.failed:
            break
    assert at > 0 or action == "invalidate"


def lines_of(do: Callable[[], Any], at: int | None = None) -> list[str]:
    """The lines of the library that run, as file:line; with ``at`` KeyboardInterrupt is raised at that one of them."""
    lines: list[str] = []

    def line(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            lines.append(f"{frame.f_code.co_filename[len(LIBRARY) :]}:{frame.f_lineno}")
            if len(lines) - 1 == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    tracing, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename.startswith(LIBRARY) else None)
    try:
        do()
    except KeyboardInterrupt:
        # The line of a ``with`` is traced once more before its end runs. An interrupt there, where no signal is delivered, keeps
        # the lock, and what comes later would wait for it for ever; or gradients off, or the collector.
        locks.renew()
        observe._registering = threading.RLock()
        torch.set_grad_enabled(grad)
        gc.enable()
    finally:
        sys.settrace(tracing)
    return lines


#: By default those which pass most of the library.
INTERRUPTED = (
    *("a view that is no box", "two tensors at once", "setattr and process", "a derivation"),
    *("lent and given up", "lent and dropped", "written by other code"),
    *("lent in kernel order", "another layout, without padding", "invalidate"),
    *("reload, staged with a journal", "a delta"),
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # finalizers are interrupted too
@pytest.mark.parametrize("action", ACTIONS if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else INTERRUPTED)
def test_law_10_an_interrupt_at_any_line(action: str) -> None:
    """The first and the last time that each line runs; by default some thirty of them."""
    ACTIONS[action](Model())  # what is kept between calls is there
    model = Model()
    lines = lines_of(lambda: ACTIONS[action](model))
    first, last = {w: lines.index(w) for w in lines}, {w: at for at, w in enumerate(lines)}
    chosen = sorted({*first.values(), *last.values()})
    failed: dict[str, str] = {}
    for at in chosen if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else chosen[:: 1 + len(chosen) // 30]:
        model = Model()
        lines_of(lambda m=model: ACTIONS[action](m), at)  # type: ignore[misc]
        what = f"{action}, interrupted at {lines[at]}"
        try:
            need_old_new_or_refusal(model, what)
            need_recovery(model, what)
        except Exception as error:
            failed[lines[at]] = f"{type(error).__name__} {str(error).splitlines()[0]}"
    assert not failed, f"{len(failed)} of {len(first)} lines: {failed}"


@pytest.mark.parametrize("line", [SWAP, SWAP_PAD16], ids=["in its own memory", "in a copy"])
def test_law_10_an_interrupt_while_a_module_is_declared(line: str) -> None:
    """At any line: it may be declared again, or is declared; and its weights are what they were, or refuse."""
    value = OLD["b.weight"]

    def undeclared() -> Any:
        layer: Any = nn.Module()
        layer.weight = nn.Parameter(value.clone(), requires_grad=False)
        layer.scale = nn.Parameter(OLD["a.scale"].clone(), requires_grad=False)
        layer.forward = lambda: layer.prepared.clone()
        return layer

    def declared(layer: nn.Module) -> None:
        alpha = Derivation("alpha", ("scale",), largest, (1,), torch.float32)
        declare(layer, Alias("weight", "prepared", line), alpha, checks=[no_check])

    declared(undeclared())  # what is kept between calls is there
    lines = lines_of(lambda: declared(undeclared()))
    failed: dict[str, str] = {}
    for at in sorted({lines.index(line) for line in lines} | {len(lines) - 1 - lines[::-1].index(line) for line in lines}):
        layer = undeclared()
        lines_of(lambda m=layer: declared(m), at)  # type: ignore[misc]
        try:
            found = quietly(layer.weight.clone)
            assert found is None or same_bytes(found, value), "a mixture"
            if not the_sources(layer):
                declared(layer)
            assert registry_of(layer).checks == [no_check], "declared without its checks, or with two"  # type: ignore[union-attr]
            assert found is not None or line == SWAP, "the weights are lost"
            assert same_bytes(layer.scale.clone(), OLD["a.scale"]), "what has no other order is lost"
            layer.load_state_dict({"weight": value, "scale": OLD["a.scale"]})
            process(layer)
            assert same_bytes(layer(), kernel(line, value)) and same_bytes(layer.weight.clone(), value)
            layer.weight.copy_(value)
            with pytest.raises(StaleKernelError):
                layer()
        except Exception as error:
            failed[lines[at]] = f"{type(error).__name__} {str(error).splitlines()[0]}"
    assert not failed, f"{len(failed)} of {len(set(lines))} lines: {failed}"


def no_check(registry: Any) -> None:
    pass


def the_sources(layer: nn.Module) -> Any:
    registry = registry_of(layer)
    return registry and registry.sources


def test_law_10_an_interrupt_before_any_byte_loses_nothing() -> None:
    """While kernel names are told: the library's own write is never taken for one of other code."""
    write = ACTIONS["a whole tensor"]
    write(Model())  # what is kept between calls is there
    model = Model()
    lines = lines_of(lambda: write(model))
    for at in [at for at, line in enumerate(lines) if line.startswith("storage/kernel_name.py")]:
        model = Model()
        lines_of(lambda m=model: write(m), at)  # type: ignore[misc]
        storage = storage_of(model.a)
        storage.notice()
        if same_bytes(storage.buffer, storage_of(Model().a).buffer):
            process(model)
            assert same_bytes(model.a.weight.clone(), OLD["a.weight"]), lines[at]


def test_law_10_an_interrupt_while_a_module_on_meta_gets_memory() -> None:
    """At any line of ``module/``: what is loaded after it is there."""
    values = {"weight": OLD["a.weight"], "scale": OLD["a.scale"]}

    def placed(layer: nn.Module) -> None:
        for name, value in values.items():
            setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False))
        process(layer)

    placed(Layer(SHAPE, PADDED, scale=True, device="meta"))  # what is kept between calls is there
    layer = Layer(SHAPE, PADDED, scale=True, device="meta")
    lines = lines_of(lambda: placed(layer))
    failed: dict[str, str] = {}
    for at in [at for at, line in enumerate(lines) if line.startswith(("module/names", "module/al")) and line not in lines[:at]]:
        layer = Layer(SHAPE, PADDED, scale=True, device="meta")
        lines_of(lambda m=layer: placed(m), at)  # type: ignore[misc]
        try:
            placed(layer)
            assert same_bytes(layer.weight.clone(), OLD["a.weight"]) and same_bytes(layer(), kernel(SWAP_PAD16, OLD["a.weight"]))
        except Exception as error:
            failed[lines[at]] = f"{type(error).__name__} {str(error).splitlines()[0]}"
    assert not failed, f"{len(failed)} lines: {failed}"
