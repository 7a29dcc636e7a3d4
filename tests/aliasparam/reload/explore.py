"""Every interleaving of a few ranks, with a few faults anywhere: all states that the protocol can reach, each looked at once.

A step is one request of one rank, carried out and answered; the store is linearizable, so no finer interleaving differs. A rank's
future depends on its generators' frames alone, by which states are told apart. A generator cannot be copied: it is made again
from the replies that it had. Time passes by itself where every rank waits; where one does not, that is a fault ("stall").
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from aliasparam.reload import ranks as protocol
from aliasparam.reload.ranks import LOST, Act, Claim, Look, Outcome, Pause, Plan, Reply, Request

FAULTS = ("crash", "lost", "lost reply", "duplicate", "late", "stall", "fail")
#: A deadline and a patience are 1 s each; a tick is past the one, two ticks are past both.
TICK = 1.5
#: Generators' locals that do not change what they will do.
_IDLE = frozenset({"plan", "pause", "_"})
#: Frames by number: a number is told apart faster.
_NUMBERS: dict[Hashable, int] = {}


@dataclass(frozen=True)
class Rank:
    """One rank: what it runs, the replies that it had, what it serves and what it could go back to."""

    number: int
    ranks: int
    runs: str = "change"  # then "doubt", "restart", "dead", or "" when it has ended
    crashed: bool = False
    replies: tuple[Reply, ...] = ()
    since: float = 0.0
    clock: float = 0.0
    serving: str | None = "old"
    has_old: bool = True
    committed: bool = False

    @cached_property
    def asked(self) -> tuple[Request | Outcome | None, Hashable]:
        """What it wants now (an Outcome if it has ended; None if it does not run), and what its future depends on."""
        return (None, None) if self.runs in ("", "dead") else _asks(self.number, self.ranks, self.runs, self.since, self.replies)

    def answered(self, value: Any) -> Rank:
        return replace(self, replies=(*self.replies, (value, self.clock))).settled()

    def settled(self) -> Rank:
        """This rank after it has acted upon its outcome, if it has one, as a server does."""
        outcome, _ = self.asked
        if not isinstance(outcome, Outcome):
            return self
        if outcome.broken:
            return self.dead()
        if outcome.kept is None:
            assert self.serving is None, "a rank in doubt serves"
            return replace(self, runs="restart" if self.crashed else "doubt", replies=(), since=self.clock)
        serving = ("new" if outcome.kept else "old") if self.crashed else self.serving
        return replace(self, runs="", replies=(), since=0.0, clock=0.0, serving=serving)

    def dead(self) -> Rank:
        return Rank(self.number, self.ranks, "dead", crashed=True, serving=None)


@cache
def _asks(number: int, ranks: int, runs: str, since: float, replies: tuple[Reply, ...]) -> tuple[Request | Outcome, Hashable]:
    plan = Plan(number, ranks, 1, "old", "new", ready_by=1.0, done_within=1.0, patience=1.0)
    again = protocol.ask_again(plan, since + plan.patience, restarted=runs == "restart")
    steps = protocol.change(plan) if runs == "change" else again
    try:
        request = next(steps)
        for reply in replies:
            request = steps.send(reply)
    except StopIteration as end:
        return end.value, None
    frames = []
    inner: Any = steps
    while inner is not None:
        values = sorted((name, repr(value)) for name, value in inner.gi_frame.f_locals.items() if name not in _IDLE)
        frames.append((inner.gi_code.co_name, inner.gi_frame.f_lasti, tuple(values)))
        inner = inner.gi_yieldfrom
    return request, _NUMBERS.setdefault(tuple(frames), len(_NUMBERS))


@dataclass(frozen=True)
class State:
    ranks: tuple[Rank, ...]
    faults: int
    store: frozenset[tuple[str, str]] = frozenset()
    floating: frozenset[Request] = frozenset()  # carried out at some time, or never
    story: tuple[Any, ...] = field(default=(), compare=False)  # (the state before, what happened)

    def told(self) -> str:
        lines, state = [], self
        while state.story:
            lines.append(str(state.story[1]))
            state = state.story[0]
        return "\n".join([*reversed(lines), str(sorted(self.store)), str([rank.serving for rank in self.ranks])])

    def then(self, what: Any, *ranks: Rank, **changes: Any) -> State:
        """The state after ``what``, with ``ranks`` in their places."""
        new = {rank.number: rank for rank in ranks}
        return replace(self, ranks=tuple(new.get(r.number, r) for r in self.ranks), story=(self, what), **changes)

    def stored(self, request: Request) -> tuple[Any, frozenset[tuple[str, str]]]:
        """The store's reply to a request, and the store after it."""
        values = dict(self.store)
        return reply_of(values, request), frozenset(values.items())


def reply_of(store: dict[str, str], request: Request) -> Any:
    """The reply to a request, which changes ``store``."""
    match request:
        case Claim(key, value, standing):
            if store.get(key, "") == standing:
                store[key] = value
            return store[key]
        case Look(keys, all_or_none):
            found = tuple(store.get(key) for key in keys)
            return tuple(None for _ in found) if all_or_none and None in found else found
    raise AssertionError(request)


def explore(ranks: int, faults: int, kinds: Sequence[str] = FAULTS) -> tuple[int, set[str]]:
    """How many states there are with at most so many ``faults`` of these ``kinds``; and what serves at the ends.

    Raises:
        AssertionError: a state that breaks law 10, with the story of how it is reached.
    """
    _asks.cache_clear()  # a test puts another protocol in place
    seen: set[Hashable] = set()
    ends: set[str] = set()
    waiting = [State(tuple(Rank(number, ranks) for number in range(ranks)), faults)]
    while waiting:
        state = waiting.pop()
        key = (state.faults, state.store, state.floating, *map(_told_apart, state.ranks))
        if key in seen:
            continue
        seen.add(key)
        assert len({rank.serving for rank in state.ranks} - {None}) < 2, f"two generations serve\n{state.told()}"
        if all(rank.runs == "" for rank in state.ranks):
            ends.add(_end(state))
        waiting += _following(state, kinds)
    return len(seen), ends


def _told_apart(rank: Rank) -> Hashable:
    return rank.runs, rank.crashed, rank.clock, rank.serving, rank.has_old, rank.committed, rank.asked[1]


def _end(state: State) -> str:
    expected = "new" if dict(state.store).get("1/done") == protocol.YES else "old"
    assert {rank.serving for rank in state.ranks} == {expected}, f"not all serve {expected}\n{state.told()}"
    return expected


def _following(state: State, kinds: Sequence[str]) -> Iterator[State]:
    for request in state.floating:
        yield state.then(("late", request), store=state.stored(request)[1], floating=state.floating - {request})
    running = [rank for rank in state.ranks if rank.asked[0] is not None]
    if running and all(_waits(state, rank) for rank in running):
        yield state.then("time passes", *(replace(rank, clock=rank.clock + TICK).answered(None) for rank in running))
    for rank in state.ranks:
        if rank.runs == "dead":
            yield state.then((rank.number, "restarts"), replace(rank, runs="restart").settled())
    for rank in running:
        yield _carried_out(state, rank, rank.asked[0])
        if state.faults:
            yield from _faulty(replace(state, faults=state.faults - 1), rank, rank.asked[0], kinds)


def _waits(state: State, rank: Rank) -> bool:
    """Whether it pauses, looks, and finds nothing for it to do."""
    seen = rank
    while isinstance(seen.asked[0], Pause if seen is rank else Look):
        seen = seen.answered(None if seen is rank else state.stored(seen.asked[0])[0])
    return seen is not rank and seen.asked == rank.asked


def _carried_out(state: State, rank: Rank, request: Any, fails: bool = False) -> State:
    what = (rank.number, request, fails)
    if isinstance(request, Pause):
        return state.then(what, rank.answered(None))
    if isinstance(request, Act):
        return state.then(what, _acted(state, rank, request, fails).answered((False, "failed") if fails else (True, "token")))
    value, store = state.stored(request)
    return state.then(what, rank.answered(value), store=store)


def _acted(state: State, rank: Rank, act: Act, fails: bool) -> Rank:
    if act.what == "commit":
        return replace(rank, serving=None, committed=not fails)
    if act.what == "keep":
        behind = [other for other in state.ranks if not other.crashed and not other.committed]
        assert not behind and rank.committed, f"the old generation is forgotten before all have the new\n{state.told()}"
        return replace(rank, has_old=False, serving=None if fails else "new")
    if act.what == "revert":
        assert rank.has_old, f"there is no way back\n{state.told()}"
        return replace(rank, serving=None if fails else "old")
    return rank


def _faulty(state: State, rank: Rank, request: Any, kinds: Sequence[str]) -> Iterator[State]:
    """Each fault of ``kinds`` that this request can have."""
    for kind in kinds:
        what = (rank.number, kind, request)
        if kind == "crash":
            yield state.then(what, rank.dead())  # before the request is carried out; after it, the next one
        elif kind == "stall":
            yield state.then(what, replace(rank, clock=rank.clock + TICK))
        elif kind == "fail" and isinstance(request, Act):
            yield _carried_out(state, rank, request, fails=True)
        elif kind in ("lost", "lost reply", "duplicate", "late") and isinstance(request, (Claim, Look)):
            value, store = state.stored(request)
            happened = kind in ("lost reply", "duplicate")
            later = {request} if kind in ("duplicate", "late") and not isinstance(request, Look) else set()
            answered = rank.answered(value if kind == "duplicate" else LOST)
            yield state.then(what, answered, store=store if happened else state.store, floating=state.floating | later)
