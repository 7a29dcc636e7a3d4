"""Forwards of other threads while a reload writes: none reads a mixture, and none is waited for longer than was said."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict, expose_for_writing, process, registry_of, reload
from aliasparam.errors import AliasError, ReloadError, StaleKernelError
from aliasparam.reload import prepare_delta
from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.drain import Drain
from aliasparam.reload.session import ReloadSession
from aliasparam.storage.locks import LOCKS, all_locked

from ..small import Layer, bytes_of, storage_of
from .delta_cases import trainer_writes
from .live_models import Whole, changed, raw, same

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.2, 0), 0.2, 1)


def cold(values: dict[str, Tensor]) -> list[Tensor]:
    model = Whole()
    model.load_state_dict(values, strict=False)
    process(model)
    return model()


SERVED = {"old": cold(OLD), "new": cold(NEW)}


class Slow(nn.Module):
    """Stands in a forward's way between two of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def forward(self) -> None:
        self.arrived.set()
        assert self.go_on.wait(20)


class Model(Whole):
    """Reads half of what it serves before the slow layer, the other half behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow()
        self.waits = False

    def forward(self) -> list[Tensor]:
        first = super().forward()
        if self.waits:
            self.waits = False
            self.slow()
            second = super().forward()
            assert same(first, second), "what a forward reads changed while it ran"
        return first


def staged(model: Model, folder: Path, **options: Any) -> ReloadSession:
    session = reload(model, policy="staged-journal", **options)
    session.begin()
    session.load(NEW)
    session.prepare()
    return session


def delta(model: Model, folder: Path) -> ReloadSession:
    with DeltaFolder(trainer_writes(folder / "d", raw(OLD), raw(NEW), 1, "xor", "adler32")) as opened:
        return prepare_delta(model, opened)


def in_flight(pool: ThreadPoolExecutor, model: Model, call: Callable[[], Any]) -> Future[Any]:
    model.waits = True
    running = pool.submit(call)
    assert model.slow.arrived.wait(20)
    return running


@pytest.mark.parametrize("how", [staged, delta])
@pytest.mark.parametrize("caller", ["itself", "a parent", "compiled"])
def test_a_commit_waits_for_the_forward_that_began_before(how: Any, caller: str, tmp_path: Path) -> None:
    model = Model()
    session = how(model, tmp_path)
    parent = nn.Sequential()
    parent.forward = lambda: model.forward()  # type: ignore[method-assign]
    parent.add_module("inner", model)
    calls: dict[str, Any] = {"itself": model, "a parent": parent, "compiled": torch.compile(model, backend="eager")}
    with ThreadPoolExecutor(3) as pool:
        running = in_flight(pool, model, calls[caller])
        committing = pool.submit(session.commit)
        until = time.monotonic() + 20
        while registry_of(model.padded).readiness.value != "closed":  # type: ignore[union-attr]
            assert time.monotonic() < until
        late = pool.submit(model).exception(20)  # while another thread compiles no hook of ours runs: then it is waited for
        assert isinstance(late, StaleKernelError) or (late is None and caller == "compiled")
        assert not committing.done()
        model.slow.go_on.set()
        assert same(running.result(20), SERVED["old"])
        committing.result(20)
    assert same(model(), SERVED["new"])


@pytest.mark.parametrize("policy", ["staged", "write-through"])
def test_a_forward_that_does_not_end_leaves_everything_as_it_was(policy: Any) -> None:
    model = Model()
    session = reload(model, policy=policy, drain_seconds=0.05)
    session.begin()
    with ThreadPoolExecutor(2, thread_name_prefix="serving") as pool:
        running = in_flight(pool, model, model)
        message = r"forwards are in flight, and did not end in time\n.*within 0.05 s\n.*serving_0"
        if policy == "staged":
            session.load(NEW)
            session.prepare()
            for _ in range(2):
                with pytest.raises(ReloadError, match=message):
                    session.commit()
        else:
            for name in ("padded.weight", "norm", "padded.weight", "norm"):
                with pytest.raises(ReloadError, match=message):
                    session.update(name, NEW[name])
        assert same(pool.submit(model).result(20), SERVED["old"])  # others go on
        model.slow.go_on.set()
        assert same(running.result(20), SERVED["old"])
        if policy == "staged":
            session.commit()
        else:
            session.load(NEW)
            session.prepare()
            session.commit()
    assert same(model(), SERVED["new"])


def serve(model: Model, until: threading.Event) -> set[str]:
    """What a thread that never stops asking is answered."""
    found = set()
    while not until.is_set():
        try:
            answer = model()
        except AliasError:
            found.add("refused")
            continue
        found.update(name for name, served in SERVED.items() if same(answer, served))
        assert any(same(answer, served) for served in SERVED.values()), "a mixture was served"
    return found


@pytest.mark.parametrize("policy", ["staged", "journal"])
def test_law_8_threads_that_never_stop_are_served_no_mixture(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = Model(), threading.Event()
    monkeypatch.setattr(Layer, "forward", lambda layer: (time.sleep(0.01), layer.prepared.clone())[1])  # slower than a commit
    with ThreadPoolExecutor(2) as pool:
        rounds = 4 if policy == "staged" else 1
        serving = [pool.submit(serve, model, done) for _ in range(2)]
        for number in range(rounds):
            with reload(model, policy=policy, drain_seconds=60) as session:
                session.load(OLD if number % 2 else NEW)
        done.set()
        found = set.union(*(one.result(60) for one in serving))
    assert found & {"old", "new"}, found


def test_law_8_after_a_switch_each_module_refuses_until_the_commit() -> None:
    model = Model()
    session = staged(model, Path())
    session.switch()
    for layer in (model.padded, model.wide, model.fused, model.padded):
        with pytest.raises(StaleKernelError):
            layer()
    session.commit()
    assert same(model(), SERVED["new"])


def test_the_reload_of_a_model_from_inside_its_own_forward_does_not_wait() -> None:
    model = Model()

    def reload_once(*_: Any) -> None:
        handle.remove()
        with reload(model, drain_seconds=0.01) as session:
            session.load(NEW)

    handle = model.register_forward_pre_hook(reload_once)
    assert same(model(), SERVED["new"])


def test_nothing_is_paid_while_no_reload_runs() -> None:
    """A reload that is open, and one that has ended, leave no hook; and a look at the stacks of twenty idle threads is short."""
    model = Model()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    session = reload(model, policy="staged")
    session.begin()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    session.abort()
    idle = threading.Event()
    threads = [threading.Thread(target=idle.wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    drain = Drain(model, 1.0)
    drain.begin(list(model.modules()))
    started = time.process_time()
    for _ in range(100):
        drain.close([], [])
    assert (time.process_time() - started) / 100 < 0.01
    idle.set()


def test_a_session_that_is_dropped_ends_at_once() -> None:
    """Nothing that looked at the stacks keeps it: not until the garbage collector comes by."""
    model = Whole()
    gc.disable()
    try:
        session = reload(model, scope="partial")
        session.begin()
        session.update("norm", model.norm.detach() + 1)
        del session
        with reload(model) as again:
            again.load(NEW)
    finally:
        gc.enable()
    model()


def test_law_10_what_was_left_by_a_dropped_session_is_carried_out_once() -> None:
    """Not by a thread that saw it too, after the memory was written whole."""
    layer = Layer()
    storage, new = storage_of(layer), bytes_of(6, 8)
    storage.invalidate_later("dropped")
    with storage.lock:
        looks = threading.Thread(target=lambda: storage.state)
        looks.start()
        looks.join(0.1)
        layer.weight.copy_(new)
    looks.join()
    assert torch.equal(layer.weight, new)


def test_law_8_memory_that_is_exposed_when_a_dropped_session_is_found_is_not_taken_as_written() -> None:
    layer = Layer()
    exposure = expose_for_writing(layer, "weight", order="kernel")
    storage_of(layer).invalidate_later("dropped")
    with pytest.raises(ReloadError, match="ended from elsewhere"):
        exposure.written()


LOOKS: dict[str, Callable[[Whole], object]] = {
    "process": process,
    "forward": lambda model: model(),
    "read": lambda model: model.q.weight.clone(),
    "strided write": lambda model: (model.q.weight[:, ::2].fill_(0), model.q.weight.clone()),
    "copy": lambda model: process(copy.deepcopy(model)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_law_10_the_garbage_collector_ends_a_session_without_a_lock(look: str) -> None:
    """It comes at any line of any thread: here while another one holds every lock. What was written refuses from then on."""
    model = Whole()
    session: Any = reload(model, scope="partial")
    session.begin()
    session.load(NEW)
    session.prepare()
    session.switch()
    session.itself = session
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with all_locked(range(len(LOCKS))):
            held.set()
            assert let_go.wait(20)

    holder, collector = threading.Thread(target=hold), threading.Thread(target=gc.collect)
    holder.start()
    assert held.wait(20)
    del session
    collector.start()
    collector.join(5)
    in_time = not collector.is_alive()
    let_go.set()
    holder.join()
    collector.join()
    assert in_time
    with pytest.raises(AliasError):
        LOOKS[look](model)
    with reload(model) as again:
        again.load(NEW)
    assert same(model(), SERVED["new"])


def test_stacks_are_not_looked_at_while_another_thread_compiles() -> None:
    """CPython 3.11 gives frames of torch.compile's translation to others after they were freed."""
    from torch._dynamo.convert_frame import compile_lock

    model = Model()
    session = reload(model, drain_seconds=0.05)
    session.begin()
    go_on, compiles = threading.Event(), threading.Event()

    def compiling() -> None:
        with compile_lock:
            compiles.set()
            go_on.wait(20)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(compiling)
        compiles.wait(20)
        with pytest.raises(ReloadError, match=r"a thread in torch\.compile"):
            session.load(NEW)
        assert same(model(), SERVED["old"])
        go_on.set()
        running.result(20)
        session.load(NEW)
    session.prepare()
    session.commit()
    assert same(model(), SERVED["new"])


def test_nothing_is_collected_while_stacks_are_looked_at() -> None:
    """CPython 3.11 collects where it makes a frame's object: a finalizer lets the thread go on whose frame that is, and what is
    handed out is freed."""
    collected: list[int] = []

    def callback(phase: str, info: object) -> None:
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code is not Drain._calls.__code__:
            frame = frame.f_back
        collected.append(0 if frame is None else 1)

    def deep(depth: int) -> None:
        deep(depth - 1) if depth else slow()

    slow, drain, threshold = Slow(), Drain(Model(), 1.0), gc.get_threshold()
    thread = threading.Thread(target=deep, args=(100,))
    thread.start()
    assert slow.arrived.wait(20)
    try:
        gc.callbacks.append(callback)
        gc.set_threshold(1)
        drain._in_flight(time.monotonic() + 1)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
        slow.go_on.set()
        thread.join()
    assert collected and not any(collected) and gc.isenabled()
