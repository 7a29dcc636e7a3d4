"""The protocol of :mod:`aliasparam.reload.ranks` on a ``torch.distributed`` Store: keys and deadlines, never a collective."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator
from typing import Any, Protocol

from .errors import RanksError
from .ranks import LOST, YES, Act, Claim, Look, Outcome, Pause, Plan, Reply, Request, ask_again, change


class Store(Protocol):
    """What is used of ``torch.distributed.Store`` (TCPStore, HashStore, FileStore, PrefixStore)."""

    def get(self, key: str, /) -> bytes: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> bool: ...


class Member(Protocol):
    """One rank's weights. Each method raises when it fails.

    ``prepare`` returns a token (one word) that is the same on all ranks if they are about to serve the same thing, such as a
    digest of the source; the old generation serves meanwhile. ``commit`` stops serving and switches; ``keep`` serves the new
    generation and forgets the old; ``revert`` brings the old generation back, from whichever point. These two may come twice.
    """

    def prepare(self) -> str: ...
    def commit(self) -> None: ...
    def keep(self) -> None: ...
    def revert(self) -> None: ...


class Ranks:
    """A rank's end of the protocol.

    Args:
        store: shared by the ranks; it should outlive each of them.
        rank, ranks: this one, and how many.
        group: prefix of all keys.
        ready_seconds, done_seconds: how long preparing, and committing, may take on the slowest rank.
        patience: seconds without a reply of the store after which a rank stops asking.

    Raises:
        RanksError: a rank that is none of so many.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        *,
        group: str = "aliasparam",
        ready_seconds: float = 600.0,
        done_seconds: float = 60.0,
        patience: float = 30.0,
    ) -> None:
        if type(rank) is not int or type(ranks) is not int or not 0 <= rank < ranks:
            raise RanksError("no such rank", expected="a rank from 0 to ranks - 1", found=f"rank {rank!r} of {ranks!r}")
        self._store, self._rank, self._ranks, self._prefix = store, rank, ranks, f"{group}/"
        self._ready, self._done, self._patience = ready_seconds, done_seconds, patience
        self._doubt: Plan | None = None

    def change(self, member: Member, base: str, target: str, sequence: int) -> None:
        """From generation ``base`` to ``target`` on all ranks, or on none. All ranks call it with the same arguments.

        ``sequence`` grows from attempt to attempt and is never used again.

        Raises:
            RanksError: the base serves as before (``expected`` says what was wanted, the message why not), or this rank is in
                doubt and must serve nothing until :meth:`ask_again`, or it could not go back and must be loaded afresh.
        """
        if type(sequence) is not int:
            raise RanksError("a sequence is a number", expected="an int that grows", found=repr(sequence)[:80])
        if self._doubt is not None:
            raise RanksError("this rank is in doubt about an earlier change", remedy="Call ask_again first.")
        plan = self._plan(sequence, base, target)
        self._announce(plan)
        self._forget(sequence - 1)  # now that nobody asks for it any more
        self._doubt = plan  # also if an interrupt ends the change between two lines
        outcome = self._run(change(plan), member)
        self._doubt = plan if outcome.kept is None else None
        if not outcome.kept or outcome.broken:
            raise self._error(plan, outcome)

    def ask_again(self, member: Member) -> bool:
        """End a doubt: True if the target serves now, False if the base does (or if there was no doubt).

        Raises:
            RanksError: still in doubt; or going back failed.
        """
        if self._doubt is None:
            return False
        plan = self._doubt
        outcome = self._run(ask_again(plan, time.monotonic() + self._patience), member)
        if outcome.kept is None or outcome.broken:
            raise self._error(plan, outcome)
        self._doubt = None
        return outcome.kept

    def generation_to_load(self) -> str | None:
        """For a rank that was restarted: which generation the others serve. None if there never was a change.

        A change that is still going on is ended by it: without this rank it cannot succeed.

        Raises:
            RanksError: the store cannot be reached.
        """
        loads = asked = None
        while True:
            last = self._reply(Look((self._last,)), "Start this rank again when it can.")
            if last[0] == asked:  # what a newer change has made of the records that were asked for nobody knows
                return loads
            asked = last[0]
            plan = self._announced(asked)
            outcome = self._run(ask_again(plan, time.monotonic() + self._patience, restarted=True), None)
            if outcome.kept is None:
                raise self._error(plan, outcome)
            loads = plan.target if outcome.kept else plan.base

    # -- carrying out ----------------------------------------------------------------------------------------------------

    def _run(self, steps: Generator[Request, Reply, Outcome], member: Member | None) -> Outcome:
        try:
            request = next(steps)
            while True:
                reply = _act(member, request) if isinstance(request, Act) else self._carry_out(request)
                request = steps.send((reply, time.monotonic()))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _reply(self, request: Claim | Look, remedy: str) -> Any:
        if (reply := self._carry_out(request)) is LOST:
            raise RanksError("the store cannot be reached", remedy=remedy)
        return reply

    def _carry_out(self, request: Claim | Look | Pause) -> Any:
        try:
            match request:
                case Pause(seconds):
                    return time.sleep(seconds)
                case Claim(key, value, standing):
                    return self._store.compare_set(key, standing, value).decode()
                case Look(keys, all_or_none):
                    together = self._store.check(list(keys))
                    there = [together or (not all_or_none and self._store.check([key])) for key in keys]
                    return tuple(self._store.get(key).decode() if has else None for key, has in zip(keys, there, strict=True))
        except (RuntimeError, OSError):  # torch's DistError is a RuntimeError
            return LOST

    def _announce(self, plan: Plan) -> None:
        """``last`` says which change was begun last, for those that are restarted; it only grows. Without it nothing begins."""
        facts, unchanged = ("sequence", "base", "target", "ranks"), "Nothing was changed; try again."
        mine, standing = json.dumps({fact: getattr(plan, fact) for fact in facts}), ""
        while (found := self._reply(Claim(self._last, mine, standing), unchanged)) != mine:
            last = self._announced(found).sequence
            if last == plan.sequence:
                raise RanksError("another rank means another change by this sequence", expected=found, found=mine)
            if last > plan.sequence:
                raise RanksError("a sequence is used once", expected=f"more than in {found}", found=mine)
            standing = found
        once = Claim(plan.key(f"begun/{plan.rank}"), uuid.uuid4().hex)
        if self._reply(once, unchanged) != once.value:  # by this rank before it was restarted
            raise RanksError("a sequence is used once", expected=f"more than {plan.sequence}", found=mine)

    def _announced(self, text: str) -> Plan:
        try:
            fields = json.loads(text)
            return self._plan(int(fields["sequence"]), str(fields["base"]), str(fields["target"]))
        except (ValueError, TypeError, KeyError):
            expected = "what a rank wrote there"
            raise RanksError("the store has something else", name=self._last, expected=expected, found=text[:80]) from None

    def _forget(self, sequence: int) -> None:
        """Delete the keys of a change that every rank has settled. Left alone if the store says otherwise, or nothing."""
        plan = self._plan(sequence, "", "")
        own = [key for name in ("ready/vote", "done/vote", "begun", "settled") for key in plan.of_all(name)]
        try:
            if self._rank == 0 and self._store.check(list(plan.of_all("settled"))):
                for key in (plan.key("ready"), plan.key("done"), *own):
                    self._store.delete_key(key)
        except (RuntimeError, OSError):
            return

    def _plan(self, sequence: int, base: str, target: str) -> Plan:
        ready_by = time.monotonic() + self._ready
        return Plan(self._rank, self._ranks, sequence, base, target, ready_by, self._done, self._patience, self._prefix)

    @property
    def _last(self) -> str:
        return f"{self._prefix}last"

    def _error(self, plan: Plan, outcome: Outcome) -> RanksError:
        if outcome.broken:
            found, remedy = "the weights of this rank are neither", "Load this rank afresh; it must not serve."
        elif outcome.kept is None:
            found, remedy = "in doubt", "Call ask_again when the store can be reached; this rank must not serve before."
        else:
            found, remedy = f"generation {plan.base} serves, as before", "Try again with the next sequence number."
        reason = outcome.reason.removeprefix("no: ").removeprefix("no ") if outcome.reason != YES else "keeping it failed"
        return RanksError(reason, name=f"rank {plan.rank}", expected=f"generation {plan.target}", found=found, remedy=remedy)


def _act(member: Member | None, act: Act) -> tuple[bool, str]:
    try:
        return True, getattr(member, act.what)() or ""
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:500]}"
