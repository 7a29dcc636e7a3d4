"""The ranks of one engine change generation together: each says yes or no in a ``torch.distributed`` Store, never by a
collective, so that one which failed does not leave the others waiting in one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from aliasparam.errors import ReloadError

#: How long the slowest rank may take.
PATIENCE = timedelta(minutes=10)
_numbers = itertools.count()
_T = TypeVar("_T")


class World(NamedTuple):
    """The ranks of one engine, and a store of ``torch.distributed`` that all of them reach. Alone a rank agrees with itself."""

    rank: int = 0
    ranks: int = 1
    name: str = ""
    store: Any = None

    @classmethod
    def of(cls, rank: int, members: Sequence[int]) -> World:
        """In torch's default store. ``members``: of the group, by their numbers in all."""
        if len(members) == 1:
            return cls()
        return cls(rank, len(members), "-".join(map(str, members)), dist.distributed_c10d._get_default_store())


class Agreement:
    """One reload's votes. Every rank makes one for every reload, in the same order. ``questions``: how often they are asked."""

    def __init__(self, world: World, questions: int = 2) -> None:
        self._store, self._rank, self._ranks = world.store, world.rank, world.ranks
        self._prefix = f"aliasparam-nvfp4/{world.name}/{next(_numbers)}"
        self._questions = questions
        self._said: list[str] = []

    def agree(self) -> None:
        """Say yes, and wait for the others.

        Raises:
            ReloadError: one said no, or nothing in time.
        """
        self._say("yes")
        if self._ranks == 1:
            return
        stage = len(self._said) - 1
        keys = [self._key(stage, rank) for rank in range(self._ranks)]
        try:
            self._store.wait(keys, PATIENCE)
            answers = [self._store.get(key).decode() for key in keys]
        except Exception as error:
            raise ReloadError("a rank did not answer; this one does not change either", found=str(error)) from None
        if refused := {rank: answer for rank, answer in enumerate(answers) if answer != "yes"}:
            raise ReloadError("another rank refused this reload; no rank changes", found=refused)

    def refuse(self, why: BaseException | str) -> None:
        """Say no to all that is still asked."""
        while len(self._said) < self._questions:
            self._say(f"no: {str(why)[:500]}")

    def refused_elsewhere(self) -> bool:
        """Whether a rank has said no already."""
        keys = [self._key(len(self._said), rank) for rank in range(self._ranks)] if self._ranks > 1 else []
        return any(self._store.check([key]) and self._store.get(key) != b"yes" for key in keys)

    def _say(self, answer: str) -> None:
        if self._ranks > 1:
            self._store.set(self._key(len(self._said), self._rank), answer)
        self._said.append(answer)

    def _key(self, stage: int, rank: int) -> str:
        return f"{self._prefix}/{stage}/{rank}"


def agree_on(world: World, step: Callable[[], _T]) -> _T:
    """What ``step`` gives, where it did not raise on any rank.

    Raises:
        ReloadError: it raised on another rank. What it raised here is raised here.
    """
    votes = Agreement(world, questions=1)
    try:
        found = step()
    except Exception as error:
        votes.refuse(error)
        raise
    votes.agree()
    return found
