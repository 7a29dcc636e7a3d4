"""Law 10: a failure anywhere, also an interrupt between two lines, leaves old values, new values, or a refusal."""

from __future__ import annotations

import copy
import io
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
from aliasparam import Alias, Layout, State, apply_delta, declare, expose_for_writing, invalidate, process, registry_of, reload
from aliasparam.errors import AliasError, DeclarationError, StaleKernelError, StateError
from aliasparam.reload import observe
from aliasparam.storage import locks
from aliasparam.tensors import dispatch
from aliasparam.testing import expected_kernel_names, same_bytes
from aliasparam.testing._faults import FailingAt

from .reload.delta_cases import trainer_writes
from .reload.folders import plain
from .small import INTERLEAVE, SWAP, SWAP_PAD16, Layer, counting, is_ready, kernel, storage_of, the_registry

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

    tracing = sys.gettrace()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename.startswith(LIBRARY) else None)
    try:
        do()
    except KeyboardInterrupt:
        # The line of a ``with`` is traced once more before its end runs. An interrupt there, where no signal is delivered, keeps
        # the lock, and what comes later would wait for it for ever.
        locks.renew()
        observe._registering = threading.Lock()
    finally:
        sys.settrace(tracing)
    return lines


#: By default those which pass most of the library.
INTERRUPTED = (
    *("a view that is no box", "two tensors at once", "setattr and process", "a derivation"),
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


# -- what is refused touches nothing -------------------------------------------------------------------------------------


def refuses_and_changes_nothing(layers: list[Layer], do: Callable[[], Any], error: Any) -> None:
    before = [layer.weight.clone() for layer in layers]
    with pytest.raises(error):
        do()
    for layer, values in zip(layers, before, strict=True):
        assert is_ready(layer)
        assert torch.equal(layer.weight, values)
        assert torch.equal(layer(), kernel(SWAP, values))


@pytest.fixture
def two() -> list[Layer]:
    layers = [Layer(), Layer()]
    process(nn.ModuleList(layers))
    return layers


WRONG: dict[str, Callable[[list[Any]], Any]] = {
    "copy_ of another shape": lambda w: w[0].copy_(torch.zeros(5, 7)),
    "add_ of another shape": lambda w: w[0].add_(torch.zeros(5, 7, dtype=torch.uint8)),
    "masked_fill_ of another shape": lambda w: w[0].masked_fill_(torch.zeros(5, 7).bool(), 1),
    "an index out of range": lambda w: w[0].index_copy_(0, torch.tensor([0, 99]), torch.full((2, 8), 9, dtype=torch.uint8)),
    "two tensors of which the second does not fit": lambda w: torch._foreach_copy_(w, [torch.full((6, 8), 9), torch.zeros(5, 7)]),
    "copy_ of a complex value": lambda w: w[0].copy_(torch.zeros(6, 8, 1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_law_10_an_operator_that_raises_has_written_nothing(wrong: str, two: list[Layer]) -> None:
    refuses_and_changes_nothing(two, lambda: WRONG[wrong]([layer.weight for layer in two]), (RuntimeError, IndexError))


def test_law_10_a_refused_write_of_several_loses_no_other_tensor(two: list[Layer]) -> None:
    exposure = expose_for_writing(two[1], "weight", order="kernel")
    new = torch.zeros(6, 8, dtype=torch.uint8)

    refuses_and_changes_nothing(two[:1], lambda: torch._foreach_copy_([layer.weight for layer in two], [new, new]), StateError)
    exposure.abandon()


class DyingAllGather:
    """A collective whose peer dies when ten bytes have arrived."""

    real = torch.ops.c10d._allgather_base_.default
    _schema, tags = real._schema, real.tags

    def __call__(self, **given: Any) -> None:
        given["output_tensor"].view(-1)[:10].fill_(222)
        raise RuntimeError("peer died")


def test_law_10_a_collective_that_fails_midway_has_written_nothing(two: list[Layer]) -> None:
    operator: Any = DyingAllGather()
    arguments = (two[0].weight.data, torch.zeros(6, 8, dtype=torch.uint8), None)

    refuses_and_changes_nothing(two, lambda: dispatch._handler_for(operator)(operator, arguments, {}), RuntimeError)


def test_law_10_a_declaration_refused_for_a_tie_changes_nothing() -> None:
    a, b = nn.Module(), nn.Module()
    a.w = b.w = nn.Parameter(counting(4, 2), requires_grad=False)
    b.v = nn.Parameter(counting(4, 2), requires_grad=False)
    declare(a, Alias("w", "k", SWAP))

    with pytest.raises(DeclarationError, match="two different kernel"):
        declare(b, Alias("v", "vk", SWAP), Alias("w", "k", INTERLEAVE))

    assert type(b.v) is nn.Parameter
    assert registry_of(b) is None


# -- raw memory that a writer left in pieces ------------------------------------------------------------------------------


def test_law_10_rows_written_before_a_writer_failed_must_arrive_again() -> None:
    layer = Layer(loaded=False)
    layer.weight[:3] = 1
    exposure = expose_for_writing(layer, "weight", order="kernel")
    exposure.memory.fill_(99)
    exposure.abandon()

    layer.weight[3:] = 1
    with pytest.raises(StateError):
        process(layer)
    layer.weight[:3] = 1
    process(layer)

    assert layer().unique().tolist() == [1]


def test_law_10_what_arrived_long_ago_does_not_count_when_a_region_is_begun_again() -> None:
    layer = Layer((2, 6, 8), loaded=False)
    layer.weight[0] = 1
    assert storage_of(layer).states.each == [State.LOADED, State.EMPTY]
    expose_for_writing(layer, "weight", slice(0, 1), order="kernel").abandon()

    layer.weight[0, :3] = 2
    layer.weight[1] = 2

    with pytest.raises(StateError, match=r"region 0 of 2.*partly"):
        process(layer)


@pytest.mark.parametrize("by", ["deepcopy", "save", "retarget"])
def test_law_10_a_module_is_not_copied_nor_reordered_while_somebody_writes_its_bytes(by: str) -> None:
    layer = Layer()
    actions = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "save": lambda: torch.save(layer, io.BytesIO()),
        "retarget": lambda: the_registry(layer).retarget({"weight": INTERLEAVE}),
    }

    with expose_for_writing(layer, "weight", order="kernel"):
        with pytest.raises(StateError, match="exposed"):
            actions[by]()
        with pytest.raises(StaleKernelError):
            layer()

    process(layer)
    assert torch.equal(layer(), kernel(SWAP, counting(6, 8)))
    assert torch.equal(copy.deepcopy(layer).weight, counting(6, 8))


def test_law_10_a_check_that_raises_leaves_everything_as_it_was_and_a_hook_that_raises_is_called_again() -> None:
    layer, seen = Layer(scale=True), []

    def check(registry: Any) -> None:
        if registry.module.weight[0, 0] == 13:
            raise ValueError("unlucky")

    def hook(registry: Any) -> None:
        seen.append(registry)
        if len(seen) == 2:
            raise ValueError("a cache is full")

    the_registry(layer).checks.append(check)
    the_registry(layer).on_processed.append(hook)
    process(layer)
    process(layer)
    assert len(seen) == 1, "nothing was new"
    layer.weight[0, 0], layer.scale[0] = 13, 50.0
    alpha = storage_alpha(layer)

    for _ in range(2):
        with pytest.raises(ValueError, match="unlucky"):
            process(layer)
        assert torch.equal(storage_alpha(layer), alpha) and layer.weight[0, 0] == 13
    layer.weight[0, 0] = 5
    with pytest.raises(ValueError, match="full"):
        process(layer)
    with pytest.raises(StaleKernelError):
        layer()
    process(layer)

    assert layer().shape == (6, 8) and layer.alpha.item() == 50 and len(seen) == 3


def storage_alpha(layer: Layer) -> Tensor:
    return the_registry(layer).value("alpha").clone()
