"""Many ranks change to a new generation together: the protocol, without any input or output.

[Note: two rounds, two records]
1. *ready*: each rank prepares while it serves the old generation, and votes. All votes alike: the record says "yes".
2. *done*: each rank that reads "yes" stops serving, commits, keeps what it needs to go back, and votes again. All voted yes: the
   record says "yes" and everybody serves the new generation and forgets the old one. Otherwise everybody goes back.
A record, like a vote, is one key of a store, written by compare-and-set from nothing, so there is one answer, whoever asks, how
often and when. Whoever's deadline passes tries to write "no"; the record decides, not the writer.

[Note: why no two ranks serve different generations]
A rank serves the new generation after it has read "yes" in *done*, for which every rank has voted, for which every rank has
stopped serving the old one. A rank that has not voted yes in *done* can go back by itself, because the record cannot become
"yes" without it. A rank that has, and cannot reach the store, is in doubt: it serves nothing until it can ask. A rank that was
restarted asks too, by trying to write "no", and loads what the record says.

The protocol is generators of requests; :mod:`aliasparam.reload.ranks_store` carries them out on a ``torch.distributed`` Store.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class Claim:
    """Set ``key`` if what it has is ``standing`` ("": no value yet). Reply: the value that it has then, or LOST."""

    key: str
    value: str
    standing: str = ""


@dataclass(frozen=True)
class Look:
    """Reply: the values of ``keys`` (None where there is none; with ``all_or_none``, Nones unless all are there), or LOST."""

    keys: tuple[str, ...]
    all_or_none: bool = True


@dataclass(frozen=True)
class Pause:
    """Reply, after ``seconds``: None."""

    seconds: float


@dataclass(frozen=True)
class Act:
    """The rank's own part. Reply: (True, token or "") or (False, why not). "keep" and "revert" may be asked for twice."""

    what: Literal["prepare", "commit", "keep", "revert"]


class _Lost(Enum):
    LOST = "no reply: it was carried out, or not, or will be later"


LOST = _Lost.LOST
Request: TypeAlias = Claim | Look | Pause | Act
#: Each reply comes with the rank's own clock, in seconds.
Reply: TypeAlias = tuple[Any, float]
YES = "yes"


@dataclass(frozen=True)
class Plan:
    """One change of generation, as one rank sees it.

    ``sequence`` is used once: keys of another attempt are other keys; all of them begin with ``prefix``. ``ready_by``: when the
    first round ends, on the rank's clock; ``done_within``: seconds from the rank's own commit to the end of the second.
    ``patience``: seconds after that, without any reply, until a rank stops asking.
    """

    rank: int
    ranks: int
    sequence: int
    base: str
    target: str
    ready_by: float
    done_within: float
    patience: float
    prefix: str = ""

    def key(self, name: str) -> str:
        return f"{self.prefix}{self.sequence}/{name}"

    def of_all(self, name: str) -> tuple[str, ...]:
        """The keys of this name that each rank has for itself."""
        return tuple(self.key(f"{name}/{rank}") for rank in range(self.ranks))


@dataclass(frozen=True)
class Outcome:
    """``kept``: the target serves; False: the base does, as before; None: in doubt, nothing may serve until it is asked again.

    ``broken``: going back failed too, so this rank must refuse until it is loaded afresh.
    """

    kept: bool | None
    reason: str
    broken: bool = False


def change(plan: Plan) -> Generator[Request, Reply, Outcome]:
    """The whole transaction of one rank."""
    _, ready = yield from _round(plan, "ready")
    if ready != YES:
        reason = ready or f"rank {plan.rank} could not reach the store"
        if ready is None:  # the others may have read "yes": spares them their deadline, and costs nothing else if it is lost
            yield Claim(plan.key("done"), reason)
        return (yield from _settle(plan, reason))
    acknowledged, done = yield from _round(plan, "done")
    if done is None and acknowledged:
        return Outcome(None, f"rank {plan.rank} could not reach the store after it had acknowledged")
    return (yield from _settle(plan, done or f"rank {plan.rank} could not reach the store"))


def ask_again(plan: Plan, until: float, *, restarted: bool = False) -> Generator[Request, Reply, Outcome]:
    """For a rank in doubt, or one that was restarted (which then has nothing to keep or revert, but to load what is said)."""
    reason = f"rank {plan.rank} " + ("was restarted" if restarted else "was in doubt")
    record = yield from _claim(plan, "done", reason, until)
    if record is None:
        return Outcome(None, f"rank {plan.rank} could not reach the store")
    if restarted:
        return Outcome(record == YES, record)
    return (yield from _settle(plan, record))


def _round(plan: Plan, name: Literal["ready", "done"]) -> Generator[Request, Reply, tuple[bool, str | None]]:
    """Act and vote, then wait for the record of the round, or write it. (Whether the vote is yes; the record, or None if the
    store gives no reply.)"""
    (fine, said), now = yield Act("prepare" if name == "ready" else "commit")
    vote = f"yes {plan.base} {plan.target} {said}" if fine else f"no rank {plan.rank}: {said}"
    deadline = plan.ready_by if name == "ready" else now + plan.done_within
    cast, pause = False, 0.001
    while True:
        if not cast:
            reply, _ = yield Claim(plan.key(f"{name}/vote/{plan.rank}"), vote)
            cast = reply is not LOST
        reply, now = yield Look((plan.key(name),))
        if reply is not LOST and reply[0] is not None:
            return fine, str(reply[0])
        verdict = yield from _verdict(plan, name, vote, now > deadline)
        if verdict is not None:
            return fine, (yield from _claim(plan, name, verdict, max(now, deadline) + plan.patience))
        if now > deadline + plan.patience:
            return fine, None
        yield Pause(pause)
        pause = min(2 * pause, 0.05)


def _verdict(plan: Plan, name: str, vote: str, late: bool) -> Generator[Request, Reply, str | None]:
    """What the record should say, if it can be said by now."""
    if not vote.startswith("yes "):
        return vote
    votes = plan.of_all(f"{name}/vote")
    reply, _ = yield Look(votes)
    if reply is LOST:
        return None
    if None not in reply:
        others = sorted(set(reply) - {vote})
        refusals = [other for other in others if other.startswith("no ")]
        return YES if not others else refusals[0] if refusals else f"no: {vote!r} and {others[0]!r}"
    if not late:
        return None
    reply, _ = yield Look(votes, all_or_none=False)
    if reply is LOST:
        return None
    missing = [str(rank) for rank, value in enumerate(reply) if value is None]
    return f"no: nothing from rank {', '.join(missing)} in time ({name})" if missing else None


def _claim(plan: Plan, name: str, verdict: str, until: float) -> Generator[Request, Reply, str | None]:
    while True:
        reply, now = yield Claim(plan.key(name), verdict)
        if reply is not LOST:
            return str(reply)
        if now > until:
            return None
        yield Pause(0.05)


def _settle(plan: Plan, record: str) -> Generator[Request, Reply, Outcome]:
    (fine, said), _ = yield Act("keep" if record == YES else "revert")
    if not fine:
        return Outcome(record == YES, f"{record}; then: {said}", broken=True)
    yield Claim(plan.key(f"settled/{plan.rank}"), record)
    return Outcome(record == YES, record)
