"""What each policy serves meanwhile, keeps on the host, and leaves when it is aborted (laws 4, 9 and 10)."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from aliasparam import checkpoint_digest, checkpoint_state_dict, process, registry_of, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.reload import drain, journal, observe, policies
from aliasparam.reload.live import Live
from aliasparam.reload.observe import Hooks
from aliasparam.reload.patch import Patch, differences
from aliasparam.reload.policies import PolicyName
from aliasparam.testing import same_bytes
from aliasparam.testing._faults import FailingAt, Fault

from ..peak import peak_bytes
from ..small import Layer, storage_of
from .interrupted import interrupted
from .live_models import Few, Whole, changed, raw, same

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


def cold(values: dict[str, Tensor]) -> list[Tensor]:
    model = Whole()
    model.load_state_dict(values, strict=False)
    process(model)
    return model()


OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.1, 0), 0.1, 1)
SERVED_OLD, SERVED_NEW = cold(OLD), cold(NEW)


def addresses(model: Whole) -> list[int]:
    return [buffer.data_ptr() for buffer in model.buffers()] + [model.norm.data_ptr()]


@pytest.mark.parametrize("policy", POLICIES)
def test_law_9_warm_equals_cold(policy: PolicyName, device: torch.device) -> None:
    model = Whole(device)
    where = addresses(model)
    with reload(model, policy=policy) as session:
        session.load(NEW)
        if policy.startswith("staged"):
            assert same(model(), SERVED_OLD)
        else:
            with pytest.raises(AliasError):
                model()
    assert same(model(), SERVED_NEW) and where == addresses(model)
    assert raw(checkpoint_state_dict(model)) == raw(NEW)
    assert session.observed.outcome == "committed"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("after", ["some", "prepare", "switch"])
def test_law_10_an_abort_leaves_what_the_policy_says(policy: PolicyName, after: str, device: torch.device) -> None:
    model, told = Whole(device), []
    registry = registry_of(model.padded)
    assert registry is not None
    registry.on_processed.append(lambda _: told.append("processed"))
    before = checkpoint_digest(model)
    session = reload(model, policy=policy, hooks=Hooks(on_abort=[lambda s: told.append("abort")]))
    session.begin()
    if after == "some":
        session.load({name: NEW[name] for name in ("padded.weight", "wide.weight", "norm", "q.weight", "turned_plain")})
    else:
        session.load(NEW)
        session.prepare()
    if after == "switch":
        session.switch()
        with pytest.raises(AliasError):
            model()
    session.abort()
    untouched = policy.startswith("staged") and after != "switch"
    if untouched or policy.endswith("journal"):
        assert session.observed.outcome == "restored"
        assert same(model(), SERVED_OLD) and checkpoint_digest(model) == before
        assert told == (["abort"] if untouched else [*told[:-2], "processed", "abort"])
    else:
        assert session.observed.outcome == "refuses"
        with pytest.raises(AliasError):
            model()
    with reload(model) as again:
        again.load(NEW)
    assert same(model(), SERVED_NEW)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_law_4_what_a_session_holds_goes_with_it(policy: PolicyName, end: str) -> None:
    """At once, and not when the garbage collector comes: staged values are as large as the model. An end lets go of them too."""
    model = Whole()
    session = reload(model, policy=policy)
    session.begin()
    session.load(NEW)
    session.prepare()
    getattr(session, end)()
    assert session._policy.nbytes == 0
    held = weakref.ref(session._policy)
    gc.disable()
    try:
        del session
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("why", ["an earlier reload failed", "other code wrote the kernel name"])
def test_law_10_a_journal_that_cannot_restore_refuses(why: str) -> None:
    model = Whole()
    if why.startswith("an"):
        with pytest.raises(ReloadError), reload(model) as failed:
            failed.update("norm", NEW["norm"])
    session = reload(model, scope="partial", policy="journal")
    session.begin()
    session.load({name: NEW[name] for name in ("norm", "q.weight")})
    if why.startswith("other"):
        kernel_name = storage_of(model.fused).kernel_name
        assert kernel_name is not None
        kernel_name.tensor.fill_(1)
    with pytest.raises(ReloadError, match="cannot bring the old weights back"):
        session.abort()
    assert session.observed.outcome == "refuses"
    with pytest.raises(AliasError):
        model()


@pytest.mark.parametrize("written", [False, True])
def test_law_10_old_bytes_are_found_while_they_serve_and_are_those_of_the_commit(
    written: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looked = Whole(device), list[Live]()

    def counted(live: Live, *how: Any, **also: Any) -> Iterator[Patch | None]:
        looked.append(live)
        return differences(live, *how, **also)

    monkeypatch.setattr(journal, "differences", counted)
    session = reload(model, policy="staged-journal")
    session.begin()
    session.load(NEW)
    assert same(model(), SERVED_OLD) and any(live.storage is not None for live in looked)
    if written:
        with torch.no_grad():
            model.q.weight[0].fill_(0.5)  # type: ignore[index]
    old = raw(checkpoint_state_dict(model))
    session.prepare()
    looked.clear()
    session.switch()
    again = {live.storage for live in looked} - {None}
    assert again == ({storage_of(model.fused)} if written else set())
    session.abort()
    assert raw(checkpoint_state_dict(model)) == old


def test_what_ended_the_block_is_raised_and_a_journal_that_failed_is_a_note() -> None:
    model = Whole()
    with pytest.raises(ZeroDivisionError) as caught, reload(model, policy="journal") as session:
        session.update("q.weight", NEW["q.weight"])
        kernel_name = storage_of(model.fused).kernel_name
        assert kernel_name is not None
        kernel_name.tensor.fill_(1)
        _ = 1 / 0
    assert "cannot bring the old weights back" in caught.value.__notes__[0]


def test_law_4_memory_of_each_policy() -> None:
    """Rows of 1 % changed bytes: a journal holds 5 bytes for each, staging holds all; the device sees a piece at a time."""
    held: dict[str, int] = {}
    for policy in POLICIES:
        layer = Layer((256, 512))
        new = layer.weight.clone()
        new[::100, :] ^= 1
        with reload(layer, policy=policy) as session:
            session.load({"weight": new})
            assert policy != "staged" or session._policy.nbytes == new.nbytes
            session.prepare()
            session.switch()
            held[policy] = session._policy.nbytes
    assert held == {"write-through": 0, "journal": 5 * 3 * 512, "staged": new.nbytes, "staged-journal": new.nbytes + 5 * 3 * 512}


def test_law_4_a_journal_is_never_more_than_what_is_overwritten(device: torch.device) -> None:
    layer = Layer((256, 512), device=device)
    session = reload(layer, policy="journal")
    session.begin()
    new = layer.weight.clone() ^ 255
    peak = peak_bytes(lambda: session.load({"weight": new}), device)
    assert session._policy.nbytes == new.nbytes
    assert peak <= 16 * new.nbytes, peak  # positions of a piece, all bytes of which change
    session.abort()
    assert same_bytes(layer.weight, new ^ 255)


def few(values: dict[str, Tensor] | None = None) -> Few:
    model = Few()
    if values is not None:
        model.load_state_dict(values)
        process(model)
    return model


FEW_OLD = checkpoint_state_dict(Few())
FEW_NEW = changed(changed(FEW_OLD, 0.1, 0), 0.1, 1)
FEW_SERVED = {"old": few()(), "new": few(FEW_NEW)()}


def old_new_or_refusal(model: Few, what: str) -> str:
    try:
        served = model()
    except AliasError:
        return "refuses"
    exported = raw(checkpoint_state_dict(model))
    assert exported in (raw(FEW_OLD), raw(FEW_NEW)), f"{what}: a mixture is exported"
    left = "old" if exported == raw(FEW_OLD) else "new"
    assert same(served, FEW_SERVED[left]), f"{what}: a mixture serves"
    return left


@pytest.mark.parametrize("policy", POLICIES)
def test_law_10_the_kth_operator_fails(policy: PolicyName) -> None:
    """Each write, read and allocation is an operator: the k-th fails, for every k until a reload goes through."""
    found = {"old": 0, "new": 0, "refuses": 0}
    every = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" or not policy.endswith("journal") else 5
    for k in itertools.count(step=every):
        model, faults = Few(), FailingAt(k)
        with contextlib.suppress(Fault, AliasError), faults, reload(model, policy=policy) as session:
            session.load(FEW_NEW)
        if not faults.failed:
            break
        found[old_new_or_refusal(model, f"{policy}, operator {k} ({faults.failed})")] += 1
    assert same(model(), FEW_SERVED["new"]) and found["old"] and k > 30, (k, found)
    if policy.endswith("journal"):
        assert found["refuses"] == 0, found


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
def test_law_10_the_kth_operator_of_an_abort_fails(policy: PolicyName) -> None:
    found = {"old": 0, "new": 0, "refuses": 0}
    for k in itertools.count():
        model, faults = Few(), FailingAt(k)
        session = reload(model, policy=policy)
        session.begin()
        session.load(FEW_NEW)
        session.prepare()
        session.switch()
        with contextlib.suppress(Fault, AliasError), faults:
            session.abort()
        if not faults.failed:
            break
        found[old_new_or_refusal(model, f"{policy}, operator {k} ({faults.failed})")] += 1
    assert same(model(), FEW_SERVED["old"]) and found["new"] == 0 and found["refuses"] > 10, (k, found)


def test_hooks_are_retried_or_reported_and_never_lost(caplog: pytest.LogCaptureFixture) -> None:
    model, told = Whole(), []

    def once(name: str, times: int) -> Callable[[Any], None]:
        left = [times]

        def hook(session: Any) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise ValueError(name)
            told.append(name)

        return hook

    hooks = Hooks([once("begin", 0)], [once("first", 0), once("cache", 1)], [once("abort", 1), once("never", 9)])
    session = reload(model, policy="journal", hooks=hooks)
    session.begin()
    session.load(NEW)
    session.prepare()
    with pytest.raises(ValueError, match="cache"):
        session.commit()
    with pytest.raises(AliasError):
        model()
    session.commit()
    assert told == ["begin", "first", "cache"] and same(model(), SERVED_NEW)

    told.clear()
    with pytest.raises(ZeroDivisionError), reload(model, hooks=hooks):
        _ = 1 / 0
    assert told == ["begin", "abort"] and "on_abort hook failed twice" in caplog.text
    with pytest.raises(ValueError, match="no"), reload(model, hooks=Hooks(on_begin=[once("no", 1)])):
        pass
    assert same(model(), SERVED_NEW)


def test_one_log_line_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    """With the real client: what a scrape of it says."""
    client = pytest.importorskip("prometheus_client")
    total = sum(value.nbytes for value in NEW.values())

    def scraped() -> dict[str, float]:
        lines = client.generate_latest().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("weight_")}

    with reload(Whole(), source="stream") as first:
        first.load(NEW)
    before = scraped()
    caplog.set_level("INFO", "aliasparam.reload")
    model = Whole()
    for _ in range(2):
        with reload(model, source="stream") as session:
            session.load(NEW)
    with pytest.raises(ZeroDivisionError), reload(model, source="stream", policy="journal") as failed:
        failed.update("norm", NEW["norm"])
        _ = 1 / 0
    after = scraped()
    gained = {
        name: value - before.get(name, 0) for name, value in after.items() if not name.endswith('_created{source="stream"}')
    }
    assert gained['weight_load_bytes_total{source="stream"}'] == 2 * total + NEW["norm"].nbytes
    assert gained['weight_loads_total{outcome="committed",source="stream"}'] == 2
    assert gained['weight_loads_total{outcome="restored",source="stream"}'] == 1
    assert gained['weight_load_duration_seconds_count{source="stream"}'] == 3
    assert gained['weight_load_pause_seconds_count{source="stream"}'] == 2
    assert (
        0 < gained['weight_load_pause_seconds_sum{source="stream"}'] < gained['weight_load_duration_seconds_sum{source="stream"}']
    )
    assert after["weight_generation"] == 2
    record = caplog.records[0]
    assert record.__dict__["reload"]["bytes"] == total and "outcome=committed source=stream" in record.getMessage()
    assert observe._metrics.__wrapped__() is None  # names that are taken: no metrics, and no reload fails for it
    assert "no metrics of reloads: Duplicated" in caplog.text


def test_where_cuda_is_in_use_the_phases_are_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range that was begun has ended, also of what raises."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("pop"))
    model = Few()
    with reload(model, scope="partial") as session:
        session.update("norm", NEW["norm"])
    with pytest.raises(ZeroDivisionError), reload(model, scope="partial", policy="journal") as session:
        session.update("norm", NEW["norm"])
        _ = 1 / 0
    begun = [one.removeprefix("aliasparam.reload.") for one in told[::2]]
    assert begun == ["update", "flush", "process", "update", "abort"] and told[1::2] == ["pop"] * 5


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
def test_law_10_an_interrupt_at_any_line_of_a_write_leaves_weights_that_serve(policy: PolicyName) -> None:
    """Also between refusing twins in the places of plain tensors and the list of those that are to come back."""

    def whole_reload() -> None:
        with reload(model, policy=policy) as session:
            session.load(new)

    model = Few()
    new = {name: value for name, value in NEW.items() if name in checkpoint_state_dict(model)}
    served = [model()]
    whole_reload()
    served.append(model())
    model = Few()
    for at in itertools.count():
        if not interrupted(at, (drain, policies), whole_reload):
            break
        assert any(same(model(), one) for one in served), at
    assert at > 100
