"""Law 10 on many ranks: all on the same generation, whatever crashes, is lost, comes twice or late."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest

from aliasparam.reload import ranks as protocol
from aliasparam.reload.ranks import YES, Act, Outcome, Plan, Reply, Request

from .explore import FAULTS, explore
from .simulate import World, random_faults

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SCHEDULES = 100_000 if NIGHTLY else 2_000


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


@pytest.mark.parametrize("kind", FAULTS)
def test_law_10_every_interleaving_of_three_ranks(kind: str) -> None:
    """One fault of each kind, at any request of any rank in any phase: all states that can be reached, not a sample."""
    states, ends = explore(3, 1, (kind,))
    assert states > 5_000
    # One lost message is asked again, and all change.
    assert ends == ({"new"} if kind in ("lost", "lost reply", "duplicate", "late") else {"old", "new"})


def test_law_10_every_interleaving_with_two_faults() -> None:
    assert explore(2, 2)[1] == {"old", "new"}
    if NIGHTLY:
        assert explore(3, 2, ("crash", "late", "stall"))[1] == {"old", "new"}


# -- both find what is wrong with a protocol that is almost right ---------------------------------------------


def keeps_when_ready(plan: Plan) -> Generator[Request, Reply, Outcome]:
    """One round: what all have prepared is kept at once."""
    _, record = yield from protocol._round(plan, "ready")
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


@pytest.mark.parametrize("name", MUTANTS)
def test_the_exploration_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, name.strip(), MUTANTS[name])
    with pytest.raises(AssertionError, match=r"serve|forgotten"):
        explore(2, 2)
