"""Locks of storages: few, shared, taken in one order, and new in a forked child.

[Note: locks] Whatever looks at a state and then touches bytes holds the storage's lock; code that is not the library's
(derivations, checks, hooks) never runs under one. Storages share a fixed set of locks by number, so a lock is never copied or
pickled with its storage, and a child process, where the thread that held one does not exist, gets a new set. What that thread
was writing says so by its state (INVALID while bytes move).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

_COUNT = 64
LOCKS = [threading.RLock() for _ in range(_COUNT + 1)]
#: The number of the last, for counters of kernel names: a module tells all its names of a write to one. Under it none is taken.
COUNTERS = _COUNT
_numbers = itertools.count()


def renew() -> None:
    """Whoever held a lock holds it no more."""
    LOCKS[:] = [threading.RLock() for _ in LOCKS]


os.register_at_fork(after_in_child=renew)


def lock_number() -> int:
    """The number of a lock for one more storage."""
    return next(_numbers) % _COUNT


def all_locked(numbers: Iterable[int]) -> AbstractContextManager[Any]:
    """Hold several locks, in the order in which everybody takes them."""
    wanted = sorted(set(numbers))
    return LOCKS[wanted[0]] if len(wanted) == 1 else _held(wanted)


@contextmanager
def _held(numbers: Iterable[int]) -> Iterator[None]:
    with ExitStack() as held:
        for number in numbers:
            held.enter_context(LOCKS[number])
        yield
