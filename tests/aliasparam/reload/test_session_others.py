"""What else sees a session: threads, copies, memory that two names share, modules that were processed before another failed."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam import Derivation, apply_delta, checkpoint_state_dict, process, registry_of, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.module.registry import registries
from aliasparam.reload import claims
from aliasparam.reload.delta_folder import Chain
from aliasparam.reload.patch import Patch
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.session import ReloadSession

from ..small import Layer
from .delta_cases import trainer_writes
from .live_models import Whole, changed, folder_of, raw, same
from .test_session import Few

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.2, 0), 0.2, 1)


@pytest.mark.parametrize("step", [ReloadSession.commit, ReloadSession.switch])
@pytest.mark.parametrize("policy", ["write-through", "journal", "staged", "staged-journal"])
def test_law_8_after_a_commit_that_fails_each_module_refuses(policy: Any, step: Callable[[ReloadSession], None]) -> None:
    """Those too whose new values were processed before those of the module that refuses them."""

    def alpha(scale: Tensor) -> Tensor:
        if fails:
            raise ValueError("a bad scale")
        return scale.max().reshape(1)

    model, fails = nn.ModuleList([Layer(scale=True), Layer(scale=True)]), False
    registry = registry_of(model[1])
    assert registry is not None
    registry.rederive([Derivation("alpha", ("scale",), alpha, (1,), torch.float32)])
    process(model)
    before = [layer() for layer in model]
    with reload(model, policy=policy) as session:
        session.load({name: value + 1 for name, value in checkpoint_state_dict(model).items()})
        session.prepare()
        fails = True
        with pytest.raises(AliasError, match="a bad scale"):
            step(session)
        for layer in model:
            with pytest.raises(AliasError):
                layer()
        fails = False
    assert [layer().equal(old) for layer, old in zip(model, before, strict=True)] == [False, False]


def test_law_10_of_two_threads_that_begin_at_once_one_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look whether it is free before either takes it."""
    model, looked, began = Few(), threading.Barrier(2), []

    def slow(of: nn.Module) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            looked.wait(0.3)
        return registries(of)

    def begin() -> None:
        with contextlib.suppress(ReloadError):
            session = reload(model)
            session.begin()
            began.append(session)

    monkeypatch.setattr(claims, "registries", slow)
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) == 1
    began[0].abort()


def test_law_10_who_begins_while_another_ends_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whose claim it is and its removal."""
    model, real = Few(), claims._claim_of
    first, second, third = (reload(model, scope="partial") for _ in range(3))
    first.begin()
    begins = threading.Thread(target=second.begin)

    def slow(module: nn.Module) -> Any:
        found = real(module)
        if threading.current_thread() is not begins and not begins.ident:
            begins.start()
            begins.join(0.2)
        return found

    monkeypatch.setattr(claims, "_claim_of", slow)
    first.abort()
    begins.join()
    with pytest.raises(ReloadError, match="already open"):
        third.begin()
    second.prepare()
    second.commit()


@pytest.mark.parametrize("make", [Few, lambda: nn.Linear(4, 4).requires_grad_(False)])
def test_law_10_nobody_begins_while_an_abort_restores(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be given old bytes between its own, or its own would be those that cannot be brought back."""
    model, put, refused = make(), Patch.put, []
    old = checkpoint_state_dict(model)

    def slow(patch: Patch, values: Tensor) -> None:
        with pytest.raises(ReloadError, match="already open"):
            reload(model).begin()
        refused.append(patch)
        put(patch, values)

    session = reload(model, policy="journal")
    session.begin()
    session.load(changed(changed(old, 0.1, 0), 0.1, 1))
    monkeypatch.setattr(Patch, "put", slow)
    session.abort()
    assert refused and raw(checkpoint_state_dict(model)) == raw(old)
    reload(model).begin()


def test_law_10_two_threads_that_abort_at_once_lose_no_old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second found the session ended, and what the first was restoring poisoned."""
    model, put = Whole(), Patch.put
    served = model()

    def slow(patch: Patch, values: Tensor) -> None:
        second = threading.Thread(target=session.abort)
        second.start()
        second.join(0.2)
        assert not second.is_alive()
        put(patch, values)

    session = reload(model, policy="journal")
    session.begin()
    session.load(NEW)
    monkeypatch.setattr(Patch, "put", slow)
    session.abort()
    assert session.observed.outcome == "restored" and same(model(), served)


def test_law_10_elements_that_two_threads_send_at_once_are_refused_once() -> None:
    """The second finds them arrived, also where the first still waits for a forward."""
    model, started = Few(), threading.Event()
    with reload(model, scope="partial") as session:
        write = session._policy.update

        def slow(*args: Any) -> None:
            started.set()
            second.join(0.2)
            write(*args)

        session._policy.update = slow  # type: ignore[method-assign]
        found: list[BaseException] = []

        def send() -> None:
            assert started.wait(20)
            try:
                session.update("norm", OLD["norm"])
            except ReloadError as error:
                found.append(error)

        second = threading.Thread(target=send)
        second.start()
        session.update("norm", NEW["norm"])
        second.join()
        assert [str(error) for error in found if "arrived twice" in str(error)]
    assert torch.equal(model.norm, NEW["norm"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_law_8_a_copy_of_a_half_written_model_refuses_until_it_is_reloaded_by_itself(copied: Any) -> None:
    model, expected = Whole(), Whole()
    del model.turned, expected.turned  # its functions cannot be pickled
    new = {name: value for name, value in NEW.items() if not name.startswith("turned.")}
    with reload(expected) as session:
        session.load(new)
    with pytest.raises(KeyError), reload(model) as session:
        session.load({name: new[name] for name in ("norm", "padded.weight", "turned_plain")})
        twin = copied(model)
        raise KeyError
    with pytest.raises(AliasError):
        twin()
    with reload(twin) as session:
        session.load(new)
    assert same(twin(), expected()) and twin.tied is twin.norm
    with pytest.raises(AliasError):
        model()


def test_law_8_parameters_in_one_memory_refuse_together() -> None:
    """``b = nn.Parameter(a.data)`` is a tie that nobody sees by the objects; a part of it too."""
    model = Few()
    model.shared = nn.Parameter(model.norm.data, requires_grad=False)
    model.part = nn.Parameter(model.norm.data[3:5], requires_grad=False)
    model.apart = nn.Parameter(torch.ones(2), requires_grad=False)
    with reload(model, scope="partial") as session:
        session.update("norm", NEW["norm"])
        for name in ("norm", "shared", "part"):
            with pytest.raises(AliasError):
                getattr(model, name) + 0
        model.apart + 0
    assert torch.equal(model.shared, NEW["norm"]) and torch.equal(model.part, NEW["norm"][3:5])


class Views(nn.Module):
    """Plain parameters that are views of one memory of 24 bytes."""

    def __init__(self, views: list[slice]) -> None:
        super().__init__()
        self.memory = [torch.arange(24, dtype=torch.uint8)]
        for number, view in enumerate(views):
            setattr(self, f"v{number}", nn.Parameter(self.memory[0][view], requires_grad=False))


#: The last of these has the sum, and the sum of position times value, of no change at all.
CHANGES = [{}, {0: 1}, {1: 7, 2: -7}, {0: 1, 1: -2, 2: 1}]
VIEWS = st.builds(slice, st.integers(0, 20), st.just(24), st.sampled_from([1, 1, 2, 3])).filter(lambda s: len(range(24)[s]) >= 3)


@given(
    views=st.lists(VIEWS, min_size=2, max_size=4),
    other=st.sampled_from(CHANGES),
    way=st.sampled_from([*get_args(PolicyName), "full", "xor", "overwrite"]),
    step=st.integers(1, 9),
)
def test_law_8_views_of_one_memory_hold_what_each_was_given(
    views: list[slice], other: dict[int, int], way: Any, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By any policy, a full version or a delta: what contradicts is refused, however small it is. A delta gives what it names."""
    model, old, new = Views(views), torch.arange(24, dtype=torch.uint8), torch.arange(24, dtype=torch.uint8)
    new[::step] += 100
    values = {f"v{number}": new[view].clone() for number, view in enumerate(views)}
    for place, change in other.items():
        values["v0"][place] += change
    is_delta, expected = way in ("xor", "overwrite"), old.clone()
    given = [
        (view, value) for view, value in zip(views, values.values(), strict=True) if not is_delta or (value != old[view]).any()
    ]
    for view, value in given:
        expected[view] = value
    agree = all(torch.equal(expected[view], value) for view, value in given)

    with contextlib.nullcontext() if agree else pytest.raises(ReloadError, match="other values"):
        if way in get_args(PolicyName):
            with reload(model, policy=way) as session:
                session.load(values)
        else:
            source = tmp_path_factory.mktemp("d")
            if way == "full":
                folder_of(source / "weight_v000001", values)
            else:
                was = {f"v{number}": old[view] for number, view in enumerate(views)}
                trainer_writes(source / "weight_v000001", raw(was), raw(values), 1, way, "adler32")
            with Chain(source, 0, 1) as chain:
                apply_delta(model, chain)
    if agree or way not in ("write-through", "staged"):
        model.v0 + 0
        assert torch.equal(model.memory[0], expected if agree else old)
    else:
        with pytest.raises(AliasError):
            model.v0 + 0


class Together(nn.Module):
    """Three plain parameters in one memory."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.arange(12.0)
        self.a, self.b, self.c = (nn.Parameter(part, requires_grad=False) for part in (memory[:8], memory[4:], memory))


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
@pytest.mark.parametrize("of_b", [20.0, 30.0])
def test_law_10_an_abort_restores_parameters_in_one_memory(policy: Any, of_b: float) -> None:
    """Writing one makes the others refuse, which hold weights all the same."""
    model = Together()
    session = reload(model, policy=policy)
    session.begin()
    session.load({"a": torch.full((8,), 20.0), "b": torch.full((8,), of_b), "c": torch.full((12,), 20.0)})
    session.prepare()
    with pytest.raises(ReloadError, match="other values") if of_b != 20.0 else contextlib.nullcontext():
        session.switch()
    session.abort()
    assert torch.equal(model.c + 0, torch.arange(12.0)) and torch.equal(model.b + 0, model.c[4:])


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_law_8_parameters_in_one_memory_are_given_one_value(policy: Any) -> None:
    """What agrees where they overlap is taken, in parts and in any order; what does not is refused, and both are named."""
    new = torch.arange(12.0) + 100
    model = Together()
    with reload(model, policy=policy) as session:
        session.update("b", new[4:])
        session.update("a", new[:3], first_row=0)
        session.update("a", new[3:8], first_row=3)
        session.update("c", new)
    assert torch.equal(model.c + 0, new)
    with (
        pytest.raises(ReloadError, match=r"b: it shares memory .*other values\n.*\n.*others for a\n"),
        reload(model, scope="partial", policy=policy) as session,
    ):
        session.update("b", new[4:] + 1)
        session.update("a", new[:8])
    if policy.endswith("journal"):
        assert torch.equal(model.c + 0, new)
    else:
        with pytest.raises(AliasError):
            model.c + 0
    with reload(model, policy=policy) as session:
        session.load({"a": new[:8] * 2, "b": new[4:] * 2, "c": new * 2})
    assert torch.equal(model.c + 0, new * 2)
