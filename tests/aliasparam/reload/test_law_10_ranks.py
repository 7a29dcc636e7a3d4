"""Law 10 on many ranks: all on the same generation, whatever crashes, is lost, comes twice or late."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest

from aliasparam.reload import ranks as protocol
from aliasparam.reload.ranks import YES, Act, Outcome, Plan, Reply, Request

from .simulate import FAULTS, World, one_fault, random_faults

SCHEDULES = 100_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 2_000


def test_law_10_without_faults_all_ranks_change() -> None:
    for ranks in range(1, 9):
        world = World(ranks, ranks, lambda *_: None).run()
        assert {member.serving for member in world.members} == {"new"} and world.now < 1


def test_law_10_any_schedule_of_faults() -> None:
    ends: Counter[str | None] = Counter()
    for seed in range(SCHEDULES):
        world = World(seed, 2 + seed % 4, random_faults(seed)).run()
        ends[world.members[0].serving] += 1
    assert ends["old"] > SCHEDULES / 10 and ends["new"] > SCHEDULES / 10 and ends[None] == 0


PHASES = {
    "prepare": lambda request: isinstance(request, Act) and request.what == "prepare",
    "vote": lambda request: "ready/vote" in getattr(request, "key", "") or "ready/vote" in str(getattr(request, "keys", "")),
    "decision": lambda request: getattr(request, "key", "") == "1/ready" or getattr(request, "keys", ()) == ("1/ready",),
    "commit": lambda request: isinstance(request, Act) and request.what in ("commit", "keep", "revert"),
    "acknowledge": lambda request: "done" in getattr(request, "key", "") or "done" in str(getattr(request, "keys", "")),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("phase", PHASES)
def test_law_10_each_fault_in_each_phase_of_each_rank(phase: str, kind: str) -> None:
    """3 ranks: the fault meets the first, second, .. request of the phase, and all of them, under several interleavings."""
    for rank in range(3):
        for nth in (0, 1, 2, None):
            for seed in range(4):
                met = 0

                def fault(r: int, step: int, request: Request, rank: int = rank, nth: int | None = nth) -> str | None:
                    nonlocal met
                    if r != rank or not PHASES[phase](request):
                        return None
                    met += 1
                    return kind if nth is None or met - 1 == nth else None

                World(seed, 3, fault, dust=8.0).run()


def test_law_10_one_fault_at_any_step() -> None:
    """Every step of every rank of 3, every kind of fault."""
    steps = World(0, 3, lambda *_: None).run().steps
    for kind in FAULTS:
        for rank in range(3):
            for step in range(steps[rank] + 1):
                world = World(0, 3, one_fault(rank, step, kind)).run()
                if kind in ("lost", "lost reply", "duplicate", "late"):  # one message is asked again, and all change
                    assert world.members[0].serving == "new", world.story("one lost message ended the change")


# -- the simulation finds what is wrong with a protocol that is almost right ---------------------------------------------


def keeps_when_ready(plan: Plan) -> Generator[Request, Reply, Outcome]:
    """One round: what all have prepared is kept at once."""
    yield Act("prepare")
    record = yield from protocol._round(plan, "ready", "yes", plan.ready_by)
    if record == YES:
        yield Act("commit")
    return (yield from protocol._settle(plan, record or "no"))


def reverts_in_doubt(plan: Plan) -> Generator[Request, Reply, Outcome]:
    outcome = yield from CHANGE(plan)
    return (yield from protocol._settle(plan, "no")) if outcome.kept is None else outcome


def decides_by_itself(plan: Plan, name: str, verdict: str, until: float) -> Generator[Request, Reply, str | None]:
    yield from CLAIM(plan, name, verdict, until)
    return verdict


def restarts_with_the_old(plan: Plan, until: float, *, restarted: bool = False) -> Generator[Request, Reply, Outcome]:
    if restarted:
        return Outcome(False, "")
    return (yield from ASK_AGAIN(plan, until))


CHANGE, CLAIM, ASK_AGAIN = protocol.change, protocol._claim, protocol.ask_again
MUTANTS: dict[str, Callable[..., Any]] = {
    "change": keeps_when_ready,
    "change ": reverts_in_doubt,
    "_claim": decides_by_itself,
    "ask_again": restarts_with_the_old,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, name.strip(), MUTANTS[name])
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(2_000):
            World(seed, 2 + seed % 4, random_faults(seed)).run()
