"""What a session allows when, what it is of, and that nothing of it stays on the model."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Derivation, checkpoint_state_dict, process, registry_of, reload
from aliasparam.errors import AliasError, ReloadError, StateError
from aliasparam.reload import Hooks
from aliasparam.reload.session import ReloadSession

from .live_models import Whole, changed, raw, same

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.2, 0), 0.2, 1)


def served(values: dict[str, Tensor]) -> list[Tensor]:
    model = Whole()
    with reload(model) as session:
        session.load(values)
    return model()


STEPS: dict[str, Callable[[ReloadSession], Any]] = {
    "begin": ReloadSession.begin,
    "update": lambda session: session.update("norm", NEW["norm"]),
    "prepare": ReloadSession.prepare,
    "switch": ReloadSession.switch,
    "commit": ReloadSession.commit,
    "abort": ReloadSession.abort,
}
#: Phase and step -> the phase after it.
ALLOWED = {
    ("not begun", "begin"): "open", ("not begun", "abort"): "ended",
    ("open", "update"): "open", ("open", "prepare"): "prepared", ("open", "abort"): "ended",
    ("prepared", "switch"): "switched", ("prepared", "commit"): "committed", ("prepared", "abort"): "ended",
    ("switched", "commit"): "committed", ("switched", "abort"): "ended",
    ("committed", "commit"): "committed", ("committed", "abort"): "committed", ("ended", "abort"): "ended",
}  # fmt: skip


def test_only_the_order_of_the_steps_is_allowed() -> None:
    """Every sequence of four; what is refused changes nothing, and says in which phase the reload is."""
    for steps in itertools.product(STEPS, repeat=4):
        session, phase, updated = reload(Few(), scope="partial", policy="staged-journal"), "not begun", False
        for step in steps:
            after, twice = ALLOWED.get((phase, step)), step == "update" and updated
            if after is None or twice:
                with pytest.raises(ReloadError) as caught:
                    STEPS[step](session)
                assert ("arrived twice" if after else f"cannot {step}: this reload is {phase}") in str(caught.value), steps
            else:
                STEPS[step](session)
                phase, updated = after, updated or step == "update"
            assert session.phase.value == phase, steps
        session.abort()


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(OLD["norm"].clone(), requires_grad=False)


@pytest.mark.parametrize("policy", ["write-through", "staged"])
def test_process_is_refused_inside(policy: Any) -> None:
    model = Whole()
    with reload(model, policy=policy) as session:
        session.load(NEW)
        with pytest.raises(AliasError):  # of what was written; where nothing was, there is nothing to do
            process(model)
            raise StateError("nothing was written yet")
    assert same(model(), served(NEW))


class Hooked(Whole):
    """Its state dict has other names, a tensor that a hook makes, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_state_dict_post_hook(_rename)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("a reload sets no extra state")


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state["normal"] = state.pop("norm")
    del state["tied"]
    state["norm_twice"] = state["normal"].detach() * 2


def test_what_is_written_are_live_tensors_by_the_names_of_the_state_dict() -> None:
    """A hook's new name counts; what a hook or extra state made for saving, and buffers that are not saved, do not."""
    model = Hooked()
    with reload(model, scope="partial") as session:
        assert {*session.expected} == {"normal" if name == "norm" else name for name in OLD}
        for name in ("norm_twice", "_extra_state", "scratch"):
            with pytest.raises(ReloadError, match="no tensor of this name"):
                session.update(name, torch.zeros(9))
        session.update("normal", NEW["norm"])
    assert torch.equal(model.norm, NEW["norm"])


@pytest.mark.parametrize("policy", ["write-through", "journal", "staged", "staged-journal"])
def test_a_copy_of_a_model_is_of_no_session(policy: Any) -> None:
    """Taken before a write, it serves and is reloaded by itself; nothing in it knows the session of the first."""
    model = Whole()
    with reload(model, policy=policy) as session:
        twin = copy.deepcopy(model)
        process(twin)
        assert same(twin(), served(OLD))
        session.load(NEW)
        with reload(twin, policy=policy) as other:
            other.load(NEW)
        assert same(twin(), served(NEW))
    assert same(model(), served(NEW)) and raw(checkpoint_state_dict(twin)) == raw(NEW)


SCOPES = {
    "a layer": (["padded"], {"padded.weight", "padded.scale"}),
    "a tensor": (["norm"], {"norm"}),
    "two": (["q", "step"], {"q.weight", "step"}),
}


@pytest.mark.parametrize("case", SCOPES)
def test_a_scope_is_all_of_it_and_nothing_else(case: str) -> None:
    scope, names = SCOPES[case]
    first, *rest = sorted(names)
    with pytest.raises(ReloadError, match="outside the scope of the reload"), reload(Whole(), scope=scope) as session:
        session.update("wide.weight", NEW["wide.weight"])
    if rest:
        with pytest.raises(ReloadError, match="1 of 2 tensors did not arrive whole"), reload(Whole(), scope=scope) as session:
            session.update(first, NEW[first])
    with (
        pytest.raises(ReloadError, match=r"nrom: .*no tensor under this prefix"),
        reload(Whole(), scope=[*scope, "nrom"]) as session,
    ):
        session.load({name: NEW[name] for name in names})
    model = Whole()
    with reload(model, scope=scope) as session:
        session.load({name: NEW[name] for name in names})
    assert raw(checkpoint_state_dict(model)) == raw({**OLD, **{name: NEW[name] for name in names}})


def test_what_is_no_place_in_a_model_is_refused() -> None:
    model = Whole()
    with reload(model, scope="partial") as session:
        with pytest.raises(ReloadError, match="norm: rows and a rectangle at once"):
            session.update("norm", NEW["norm"], first_row=0, box=((0, 9),))
        with pytest.raises(ReloadError, match="the model has no tensor of this name"):
            session.load(NEW["wide.weight"])  # its rows, as if each were a name and a value
    assert same(model(), served(OLD))


# -- what comes between -------------------------------------------------------------------------------------------------

#: What a hook may try while a reload is committed.
BETWEEN: dict[str, Callable[[ReloadSession], Any]] = {
    "abort": ReloadSession.abort,
    "commit": ReloadSession.commit,
    "update": lambda session: session.update("norm", NEW["norm"]),
    "another reload": lambda session: reload(session.model).begin(),
    "a layer replaced": lambda session: setattr(session.model, "wide", type(session.model.wide)((6, 8))),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_law_10_what_a_hook_of_the_commit_does_to_the_reload_is_refused(between: str) -> None:
    """It is no commit then, and the old weights serve."""
    model, outcomes = Whole(), []
    wide = model.wide
    hooks = Hooks(on_commit=[BETWEEN[between]], on_abort=[lambda session: outcomes.append(session.observed.outcome)])
    with pytest.raises(ReloadError), reload(model, policy="journal", hooks=hooks) as session:
        session.load(NEW)
    model.wide = wide
    assert same(model(), served(OLD)) and outcomes == [""] and session.observed.outcome == "restored"
    with reload(model) as again:
        again.load(NEW)
    assert same(model(), served(NEW))


def test_law_8_no_other_reload_begins_while_derivations_run() -> None:
    model, inside = Whole(), threading.Event()
    done, found = threading.Event(), []

    def derive(scale: Tensor) -> Tensor:
        inside.set()
        assert done.wait(20)
        return scale.max().view(1)

    def other() -> None:
        assert inside.wait(20)
        with pytest.raises(ReloadError, match="already open") as caught:
            reload(model).begin()
        found.append(caught.value)
        done.set()

    registry = registry_of(model.padded)
    assert registry is not None
    registry.rederive([Derivation("alpha", ("scale",), derive, (1,), torch.float32)])
    thread = threading.Thread(target=other)
    thread.start()
    with reload(model) as session:
        session.load(NEW)
    thread.join()
    assert found and same(model(), served(NEW))


def test_a_rectangle_is_of_whole_numbers() -> None:
    model = Few()
    with reload(model, scope="partial") as session:
        for where in ({"box": ((0.9, 8),)}, {"box": 8}, {"box": (8,)}, {"box": ((0, 4, 8),)}, {"first_row": 0.5}):
            with pytest.raises(ReloadError, match=r"norm: no place in a tensor(?s:.*)whole numbers"):
                session.update("norm", NEW["norm"][:8], **where)  # type: ignore[arg-type]
    assert torch.equal(model.norm, Few().norm)
