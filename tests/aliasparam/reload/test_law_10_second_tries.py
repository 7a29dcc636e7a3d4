"""A journal brings the old weights back, or refuses, whatever came between: a value that failed, other code's write (law 10)."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from aliasparam import AliasedStorage, accept_kernel_bytes, checkpoint_state_dict, expose_for_writing, invalidate, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.reload import claims, journal, policies, staged
from aliasparam.reload import session as session_module
from aliasparam.reload.live import Live
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.session import Phase, ReloadSession
from aliasparam.storage.locks import renew

from ..small import storage_of
from .interrupted import interrupted
from .live_models import Few, Whole, changed, raw

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.1, 0), 0.1, 1)
OTHER = changed(changed(OLD, 0.5, 2), 0.5, 3)
WRITE = policies.Policy.write


@pytest.fixture(autouse=True)
def no_lock_is_left_held() -> Iterator[None]:
    """An interrupt at the line of a ``with`` skips its exit: see :func:`interrupted`."""
    yield
    renew()


def fails(*_: Any) -> Any:
    raise MemoryError


def fails_half_way(self: policies.Policy, target: Any, box: Any, value: Tensor) -> None:
    """Half of it is written, and nobody knows which."""
    rows = value.shape[0] // 2 if value.dim() else 0
    if rows:
        WRITE(self, target, ((box[0][0], box[0][0] + rows), *box[1:]), value[:rows])
    storage = Live(target.tensor).storage
    if storage is not None:
        storage.states.begin(storage.bound.whole)
    raise MemoryError


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
@pytest.mark.parametrize("healed", [False, True])
@pytest.mark.parametrize("failing", ["as it is staged", "before the write", "half-way"])
def test_law_10_another_value_after_one_that_could_not_be_written(
    policy: PolicyName, failing: str, healed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept for the first value is not all that the second one overwrites."""
    for name in NEW:
        model = Whole()
        if healed:  # of an earlier failure the reason stays
            with contextlib.suppress(ZeroDivisionError), reload(model) as failed:
                failed.load(NEW)
                _ = 1 / 0
            with reload(model) as again:
                again.load(OLD)
        session = reload(model, policy=policy)
        session.begin()
        with monkeypatch.context() as patch:
            if failing == "as it is staged":
                patch.setattr(staged._Value, "within", fails)
            else:
                patch.setattr(policies.Policy, "write", fails if failing == "before the write" else fails_half_way)
            first = OTHER if failing == "half-way" else OLD
            arrived = not _fails(session, name, first[name])  # of a journal nothing is staged
        session.load({other: value for other, value in NEW.items() if other != name or not arrived})
        session.prepare()
        session.switch()
        session.abort()
        assert raw(checkpoint_state_dict(model)) == raw(OLD), name
        model()


def _fails(session: Any, name: str, value: Tensor) -> bool:
    try:
        session.update(name, value)
    except MemoryError:
        return True
    return False


def test_law_10_an_interrupt_at_any_line_of_a_switch_keeps_what_other_code_wrote() -> None:
    """After the old bytes were found, before the commit."""
    new = {name: value for name, value in NEW.items() if name in checkpoint_state_dict(Few())}
    for at in itertools.count():
        model = Few()
        session = reload(model, policy="staged-journal")
        session.begin()
        session.load(new)
        with torch.no_grad():
            model.q.weight[0].fill_(0.5)  # type: ignore[index]
            model.wide.weight.fill_(0.25)
        old = raw(checkpoint_state_dict(model))
        session.prepare()
        if not interrupted(at, (journal, policies), session.switch):
            break
        session.abort()
        assert raw(checkpoint_state_dict(model)) == old, at
    assert at > 100


def test_law_10_an_interrupt_while_a_loss_is_looked_at_again_is_no_recovery() -> None:
    """Memory that held no weights when they were kept, and holds none now."""
    new = {name: value for name, value in NEW.items() if name in checkpoint_state_dict(Few())}
    for at in itertools.count():
        model = Few()
        storage_of(model.wide).invalidate()
        session = reload(model, policy="staged-journal")
        session.begin()
        session.load(new)
        storage_of(model.wide).invalidate()
        session.prepare()
        if not interrupted(at, (journal, policies), session.switch):
            break
        with contextlib.suppress(AliasError):
            session.abort()
        with pytest.raises(AliasError):
            model()
        with pytest.raises(AliasError):
            checkpoint_state_dict(model)
    assert at > 20


@pytest.mark.parametrize("policy", get_args(PolicyName))
@pytest.mark.parametrize("end", [ReloadSession.commit, ReloadSession.abort])
def test_law_10_an_interrupt_at_any_line_of_a_commit_is_followed_by_one_that_ends(
    end: Callable[[ReloadSession], None], policy: PolicyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What serves is what the session says, and the model is free: also where the bytes served before the commit had ended. (One
    that was interrupted as it began is aborted.)"""
    new, outcomes = {name: value for name, value in NEW.items() if name in checkpoint_state_dict(Few())}, set[str]()
    for at in itertools.count():
        model = Few()
        old = raw(checkpoint_state_dict(model))
        session = reload(model, policy=policy)
        session.begin()
        session.load(new)
        session.prepare()
        if not interrupted(at, (session_module, claims), session.commit):
            break
        renew()
        monkeypatch.setattr(claims, "_taking", threading.RLock())  # as storages' locks, see interrupted()
        (ReloadSession.abort if session.phase is Phase.COMMITTING else end)(session)
        outcome = session.observed.outcome
        if outcome == "refuses":
            with pytest.raises(AliasError):
                model()
        else:
            assert raw(checkpoint_state_dict(model)) == (raw(new) if outcome == "committed" else old), (at, outcome)
            model()
        outcomes.add(outcome)
        with reload(model) as again:
            again.load(new)
    assert at > 60 and "committed" in outcomes


def kernel_bytes(model: Whole) -> None:
    storage = storage_of(model.scales)
    assert storage.kernel_name is not None
    storage.put_foreign(storage.kernel_name.memory.clone() ^ 3)


def a_sleep(model: Whole) -> None:
    invalidate(model.scales)
    storage_of(model.scales).buffer.fill_(7)
    accept_kernel_bytes(model.scales)


def no_memory(model: Whole) -> None:
    model.scales.to_empty(device=storage_of(model.scales).buffer.device)


def an_exposure(model: Whole) -> None:
    with expose_for_writing(model.scales, "weight", order="kernel"):
        storage_of(model.scales).buffer.fill_(7)


def a_name(model: Whole) -> None:
    with torch.no_grad():
        cast(Tensor, model.scales.weight)[3:5].fill_(9)


def a_plain_tensor(model: Whole) -> None:
    with torch.no_grad():
        model.live_norm[3:5].fill_(9)  # type: ignore[operator]


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
@pytest.mark.parametrize("other", [kernel_bytes, a_sleep, no_memory, an_exposure, a_name, a_plain_tensor])
def test_law_10_a_journal_refuses_where_other_code_wrote_between_its_write_and_the_abort(
    policy: PolicyName, other: Callable[[Whole], None], device: torch.device
) -> None:
    """Old bytes where they differed, beside what the other wrote, are of no generation."""
    model = Whole(device)
    model.__dict__["live_norm"] = model.norm
    session = reload(model, policy=policy)
    session.begin()
    session.load(NEW)
    session.prepare()
    session.switch()
    other(model)
    with pytest.raises(ReloadError, match="cannot bring the old weights back"):
        session.abort()
    with pytest.raises(AliasError):
        model()
    with reload(model) as again:
        again.load(NEW)
    assert raw(checkpoint_state_dict(model)) == raw(NEW)


def test_law_10_a_value_that_is_declared_itself_is_written_under_no_other_lock() -> None:
    """Else two reloads, each of the other's names, could wait for each other."""

    def numbers(of: Whole) -> set[int]:
        return {storage_of(layer).lock_number for layer in (of.wide, of.fused)}

    model, sender = Whole(), Whole()
    while numbers(model) & numbers(sender):  # locks are few, and shared
        sender = Whole()
    with reload(sender) as sent:
        sent.load(NEW)
    held: list[bool] = []
    theirs, ours = (tuple(storage_of(layer) for layer in (one.wide, one.fused)) for one in (sender, model))
    need_readable = AliasedStorage.need_readable

    def looked(storage: AliasedStorage, *box: Any) -> None:
        if storage in theirs:
            held.append(any(cast(Any, one.lock)._is_owned() for one in ours))
        need_readable(storage, *box)

    with pytest.MonkeyPatch.context() as patch, reload(model, scope="partial", policy="journal") as session:
        patch.setattr(AliasedStorage, "need_readable", looked)
        session.update("wide.weight", sender.wide.weight)
        session.update("q.weight", sender.q.weight)  # type: ignore[arg-type]
    assert held and not any(held)
    assert raw(checkpoint_state_dict(model))["wide.weight"] == raw(NEW)["wide.weight"]
