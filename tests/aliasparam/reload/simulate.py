"""N ranks and a store in one process: time, messages and failures come from a seed, the protocol is the library's own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from aliasparam.reload import ranks as protocol
from aliasparam.reload.ranks import LOST, Act, Outcome, Pause, Plan, Reply, Request

from .explore import FAULTS, reply_of

RPC_SECONDS = 0.3


@dataclass
class Member:
    """One rank as users see it: what it serves, and what it could go back to."""

    serving: str | None = "old"
    has_old: bool = True
    committed: bool = False


@dataclass
class World:
    """``fault(rank, step, request)`` names the fault of a request, or None. After ``dust`` seconds there are no more."""

    seed: int
    ranks: int
    fault: Callable[[int, int, Request], str | None]
    dust: float = 20.0
    now: float = 0.0
    store: dict[str, str] = field(default_factory=dict)
    trace: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.members = [Member() for _ in range(self.ranks)]
        self.life = [0] * self.ranks  # grows with every crash: what an earlier life had asked for is not heard
        self.steps = [0] * self.ranks
        self.rate = [self.random.uniform(0.9, 1.1) for _ in range(self.ranks)]
        self.plans = [Plan(rank, self.ranks, 1, "old", "new", self.clock(rank) + 2.0, 2.0, 1.0) for rank in range(self.ranks)]

    def run(self) -> World:
        for rank in range(self.ranks):
            self.later(self.random.uniform(0, 0.2), lambda rank=rank: self.begin(rank, protocol.change(self.plans[rank])))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
            self.check()
        self.settled()
        return self

    # -- laws ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At no time do two ranks serve different generations, and nobody has forgotten the old before all have the new."""
        serving = {member.serving for member in self.members} - {None}
        assert len(serving) < 2, self.story("two generations serve")

    def settled(self) -> None:
        """Law 10: the same on all, and what the record says."""
        expected = "new" if self.store.get("1/done") == "yes" else "old"
        assert [member.serving for member in self.members] == [expected] * self.ranks, self.story(f"not all serve {expected}")

    def story(self, what: str) -> str:
        lines = [
            f"seed {self.seed}: {what}: {[member.serving for member in self.members]}",
            *map(str, self.trace),
            str(self.store),
        ]
        return "\n".join(lines)

    # -- running -------------------------------------------------------------------------------------------------------

    def clock(self, rank: int) -> float:
        return 100.0 * rank + self.now * self.rate[rank]

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))

    def begin(self, rank: int, steps: Generator[Request, Reply, Outcome]) -> None:
        life = self.life[rank]
        heard = [-1]

        def go(reply: Any, number: int) -> None:
            if self.life[rank] != life or number <= heard[0]:
                return  # of a former life, or the second reply to one request
            heard[0] = number
            try:
                request = next(steps) if number == 0 else steps.send((reply, self.clock(rank)))
            except StopIteration as end:
                self.ended(rank, end.value)
                return
            self.ask(rank, request, lambda reply: go(reply, number + 1))

        go(None, 0)

    def ask(self, rank: int, request: Request, answer: Callable[[Any], None]) -> None:
        fault = self.fault(rank, self.steps[rank], request) if self.now < self.dust else None
        self.trace.append((self.now, rank, self.steps[rank], request, fault))
        self.steps[rank] += 1
        life = self.life[rank]
        delay = self.random.expovariate(50)
        if fault == "crash":
            when = self.random.choice([0, delay / 2, 2 * delay])
            self.later(when, lambda: self.crash(rank) if self.life[rank] == life else None)
        if fault == "stall":
            delay += self.random.uniform(0, 12)
        if isinstance(request, Pause):
            self.later(request.seconds + delay * (fault == "stall"), lambda: answer(None))
        elif isinstance(request, Act):
            self.later(delay, lambda: answer(self.act(rank, request, fault == "fail")) if self.life[rank] == life else None)
        else:
            self.send(request, answer, fault, delay)

    def send(self, request: Request, answer: Callable[[Any], None], fault: str | None, delay: float) -> None:
        def carry_out(reply: bool) -> None:
            value = reply_of(self.store, request)
            if reply:
                self.later(self.random.expovariate(50), lambda: answer(value))

        if fault != "lost":
            late = self.random.uniform(RPC_SECONDS, 8) if fault == "late" else 0
            self.later(delay + late, lambda: carry_out(reply=fault not in ("late", "lost reply")))
        if fault == "duplicate":
            self.later(delay + self.random.uniform(0, 8), lambda: carry_out(reply=False))
        if fault in ("lost", "late", "lost reply"):
            self.later(RPC_SECONDS, lambda: answer(LOST))

    def act(self, rank: int, request: Act, fails: bool) -> tuple[bool, str]:
        member = self.members[rank]
        if request.what == "commit":
            member.serving = None
            member.committed = not fails
        elif request.what == "keep":
            assert member.committed, self.story("kept what was not committed")
            behind = [other for other, life in zip(self.members, self.life, strict=True) if life == 0 and not other.committed]
            assert not behind, self.story("the old generation is forgotten before all have the new")
            member.has_old, member.serving = False, None if fails else "new"
        elif request.what == "revert":
            assert member.has_old, self.story("there is no way back")
            member.serving = None if fails else "old"
        return (False, "it failed") if fails else (True, "token")

    def crash(self, rank: int) -> None:
        """All of the rank's memory is gone; some time later it is started again and asks what to load."""
        self.trace.append((self.now, rank, "crashes"))
        self.life[rank] += 1
        self.members[rank].serving = None
        self.later(self.random.choice([0.01, 1, 6, 30]), lambda: self.restart(rank))

    def restart(self, rank: int) -> None:
        plan = self.plans[rank]
        self.begin(rank, protocol.ask_again(plan, self.clock(rank) + plan.patience, restarted=True))

    def ended(self, rank: int, outcome: Outcome) -> None:
        self.trace.append((self.now, rank, outcome))
        member = self.members[rank]
        if outcome.broken:
            self.crash(rank)
        elif self.life[rank] and outcome.kept is not None:
            member.serving = "new" if outcome.kept else "old"
        elif outcome.kept is None:
            assert member.serving is None, self.story("a rank in doubt serves")
            plan, restarted = self.plans[rank], self.life[rank] > 0
            self.later(1.0, lambda: self.begin(rank, protocol.ask_again(plan, self.clock(rank), restarted=restarted)))


def random_faults(seed: int) -> Callable[[int, int, Request], str | None]:
    """Of a rate that the seed chooses; some schedules have one kind of fault only, and much of it."""
    chance = random.Random(-seed - 1)
    rate = chance.choice([0.01, 0.03, 0.1, 0.3])
    kinds = chance.sample(FAULTS, chance.choice([1, 2, len(FAULTS)]))
    return lambda rank, step, request: chance.choice(kinds) if chance.random() < rate else None
