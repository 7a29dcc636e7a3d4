"""Other threads and forked children: states and bytes are looked at under one lock, and no lock is lost with a thread."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aliasparam import Alias, AliasedStorage, Derivation, State, declare, process
from aliasparam.errors import AliasError, StaleKernelError, StateError
from aliasparam.module.containers import Names
from aliasparam.storage import states
from aliasparam.storage.kernel_name import KernelName

from .small import SWAP, SWAP_PAD16, Layer, bytes_of, is_ready, kernel, layer_of, storage_of, the_registry


def at_once(*work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(do: Callable[[], None]) -> None:
        try:
            do()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(do,)) for do in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not failures, failures


def test_law_1_eight_threads_load_and_process_at_once() -> None:
    layer = layer_of(bytes_of(8, 64, 32), SWAP_PAD16)
    process(layer)

    def load(expert: int) -> None:
        for step in range(30):
            layer.weight[expert].copy_(torch.full((64, 32), step, dtype=torch.uint8))
            if step % 7 == expert % 7:
                process(layer)
            assert bool((layer.weight[expert].clone() == step).all())

    at_once(*(lambda e=e: load(e) for e in range(8)))

    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD16, torch.full((8, 64, 32), 29, dtype=torch.uint8)))


def test_law_8_a_forward_asks_for_the_state_while_another_thread_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, state_of = layer_of(bytes_of(8, 4, 4), loaded=False), states._state

    def meanwhile(lacking: Any) -> State:
        layer.weight[0].copy_(torch.zeros(4, 4, dtype=torch.uint8))
        return state_of(lacking)

    monkeypatch.setattr(states, "_state", meanwhile)

    with pytest.raises(StaleKernelError):
        layer()
    assert storage_of(layer).states.of(1) is State.EMPTY


@pytest.mark.parametrize("by", [copy.deepcopy, lambda m: m.state_dict()["weight"].clone()], ids=["deepcopy", "state dict"])
def test_a_copy_made_while_another_thread_writes_is_of_one_moment(by: Callable[[nn.Module], object]) -> None:
    layer = Layer((64, 256))
    process(layer)
    done = threading.Event()

    def write() -> None:
        for step in range(200):
            layer.weight.copy_(torch.full((64, 256), step % 250, dtype=torch.uint8))
        done.set()

    def read() -> None:
        layer.weight.fill_(1)
        while not done.is_set():
            found = by(layer)
            values = found.weight.clone() if isinstance(found, nn.Module) else found
            assert values.unique().numel() == 1  # type: ignore[union-attr]

    layer.weight.fill_(1)
    at_once(write, read)


def pickled(module: nn.Module) -> nn.Module:
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("by", [copy.deepcopy, pickled])
def test_law_8_a_copy_of_names_from_before_and_after_a_commit_is_refused(
    by: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(scale=True)
    process(layer)
    before = AliasedStorage.__getstate__
    copied: list[AliasedStorage] = []

    def and_then_it_is_loaded(storage: AliasedStorage) -> dict[str, Any]:
        state = before(storage)
        if not copied:
            load_all(layer, 5)
        copied.append(storage)
        return state

    monkeypatch.setattr(AliasedStorage, "__getstate__", and_then_it_is_loaded)
    with pytest.raises(StateError, match="while it was copied"):
        by(layer)

    assert by(layer).alpha.item() == 5  # now nobody writes


@pytest.mark.parametrize("by", [copy.deepcopy, pickled])
def test_law_8_a_copy_of_one_name_half_loaded_is_not_ready(
    by: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer((4, 8))
    process(layer)
    before = AliasedStorage.__getstate__

    def between_two_shards(storage: AliasedStorage) -> dict[str, Any]:
        layer.weight[:2].fill_(5)
        state = before(storage)
        layer.weight[2:].fill_(5)
        process(layer)
        return state

    monkeypatch.setattr(AliasedStorage, "__getstate__", between_two_shards)
    with pytest.raises(StateError, match="while it was copied"):
        by(layer)


@pytest.mark.parametrize("by", [copy.deepcopy, pickled])
def test_a_copy_of_a_ready_module_that_is_opened_meanwhile_serves(
    by: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer((4, 8))
    process(layer)
    served, before = layer(), Names.__reduce_ex__

    def after_a_write(names: Names, protocol: Any) -> Any:
        if "prepared" in names:
            layer.weight.fill_(5)
        return before(names, protocol)

    monkeypatch.setattr(Names, "__reduce_ex__", after_a_write)

    assert torch.equal(by(layer)(), served)


@pytest.mark.parametrize("by", [copy.deepcopy, pickled])
def test_law_8_a_copy_made_while_another_thread_commits_is_of_one_generation(by: Callable[[nn.Module], nn.Module]) -> None:
    layer = Layer((64, 256), scale=True)
    load_all(layer, 1)
    done = threading.Event()

    def write() -> None:
        for step in range(60):
            load_all(layer, step)
            time.sleep(0.002)
        done.set()

    def read() -> None:
        while not done.is_set():
            with contextlib.suppress(StateError):
                twin = by(layer)
                if is_ready(twin):  # else it was copied in the middle of a load, as a load can be seen, and refuses to run
                    assert set(twin.weight.unique().tolist()) | set(twin.scale.tolist()) == {twin.alpha.item()}

    at_once(write, read)


def load_all(layer: Layer, number: int) -> None:
    layer.weight.fill_(number)
    layer.scale.fill_(number)
    process(layer)


def test_a_write_between_deriving_and_commit_leaves_the_module_open() -> None:
    layer = Layer(scale=True)
    writes: list[int] = []

    def meddle(scale: torch.Tensor) -> torch.Tensor:
        if not writes:
            writes.append(1)
            thread = threading.Thread(target=lambda: layer.weight[0].fill_(77))
            thread.start()
            thread.join(10)
            assert not thread.is_alive(), "a derivation ran under a lock"
        return scale.min().reshape(1)

    declare(layer, Derivation("least", ("scale",), meddle, (1,), torch.float32))
    process(layer)

    with pytest.raises(AliasError):
        layer()
    process(layer)
    assert torch.equal(layer(), kernel(SWAP, layer.weight.clone()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_law_8_a_write_while_an_unchanged_module_closes_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(scale=True)
    process(layer)
    registry, ours = the_registry(layer), layer.weight
    layer.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.uint8), requires_grad=False)
    dict.update(layer._parameters, weight=ours)
    stale_names = registry.stale_names

    def and_then_another_thread_writes() -> list[str]:
        found = stale_names()
        layer.scale.fill_(9)
        return found

    monkeypatch.setattr(registry, "stale_names", and_then_another_thread_writes)
    assert not registry.is_ready
    monkeypatch.undo()

    with pytest.raises(StaleKernelError, match="alpha"):
        layer()


def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    layer = Layer()
    process(layer)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:

        with storage_of(layer).lock:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        layer.weight[0] = 9
        process(layer)
        os._exit(0 if int(layer()[3, 0]) == 9 else 1)
    ended, status = 0, 1
    for _ in range(100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.1)
    go.set()
    thread.join()
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended and status == 0


def test_law_8_a_parameter_that_is_being_taken_over_is_a_name_or_none_for_other_threads() -> None:
    """torch exchanges class, attributes and memory one after the other; at each line another thread looks at the module."""
    layer, new, seen = Layer((4, 8)), bytes_of(4, 8, seed=1), 0
    old = layer.weight.clone()
    process(layer)

    def look(frame: Any, event: str, arg: Any) -> Any:
        nonlocal seen
        seen += event == "line"
        for do in (layer, layer.weight.clone, lambda: copy.deepcopy(layer)):
            with contextlib.suppress(AliasError):
                do()
        return look

    layer.weight = nn.Parameter(new.clone(), requires_grad=False)
    tracing = sys.gettrace()
    sys.settrace(lambda frame, event, arg: look if frame.f_code.co_name in ("swap_tensors", "swap_attr") else None)
    try:
        process(layer)
    finally:
        sys.settrace(tracing)

    assert seen > 10 and not torch.equal(old, new)
    assert torch.equal(layer.weight.clone(), new) and torch.equal(layer(), kernel(SWAP, new))


def test_law_1_a_write_to_one_name_is_no_foreign_write_to_another_that_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module tells all its kernel names. Each has two counters, and is looked at between them."""
    module = nn.Module()
    module.a, module.b = (nn.Parameter(bytes_of(4, 4, seed=seed), requires_grad=False) for seed in (1, 2))
    declare(module, Alias("a", "x", SWAP), Alias("b", "y", SWAP))
    process(module)
    values, writes, version = module.b.clone(), list[threading.Thread](), KernelName.version

    def counted(name: KernelName) -> int:
        if not writes:  # the other counter was read
            writes.append(threading.Thread(target=module.a.fill_, args=(1,)))
            writes[0].start()
            writes[0].join(0.2)
        return version.__get__(name)  # type: ignore[no-any-return]

    monkeypatch.setattr(KernelName, "version", property(counted))
    storage_of(module, "b").notice()
    monkeypatch.undo()
    for thread in writes:
        thread.join(60)

    assert writes and not any(thread.is_alive() for thread in writes)
    assert torch.equal(module.b.clone(), values) and bool((module.a.clone() == 1).all())
