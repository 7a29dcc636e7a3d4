"""The ranks protocol on torch's stores: threads on a HashStore, and processes on a TCPStore that are killed."""

from __future__ import annotations

import multiprocessing
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, TCPStore

from aliasparam.reload.errors import RanksError
from aliasparam.reload.ranks_store import Ranks

from . import rank_process


class Member:
    def __init__(self, token: str = "t", fails: str = "", dies: str = "") -> None:
        self.token, self.fails, self.dies = token, fails, dies
        self.serving: str | None = "old"
        self.done: list[str] = []

    def _do(self, what: str, serving: str | None) -> None:
        self.done.append(what)
        if self.dies == what:
            self.dies = ""
            raise KeyboardInterrupt
        if self.fails == what:
            raise ValueError(f"{what} fails")
        self.serving = serving

    def prepare(self) -> str:
        self._do("prepare", "old")
        return self.token

    def commit(self) -> None:
        self._do("commit", None)

    def keep(self) -> None:
        self._do("keep", "new")

    def revert(self) -> None:
        self._do("revert", "old")


def on_all(
    store: Any, members: list[Member], sequence: int = 1, **times: float
) -> tuple[list[Ranks], list[BaseException | None]]:
    limits = {"ready_seconds": 1.0, "done_seconds": 1.0, "patience": 0.5, **times}
    all_ranks = [Ranks(store, rank, len(members), **limits) for rank in range(len(members))]

    def change(rank: int) -> BaseException | None:
        try:
            return all_ranks[rank].change(members[rank], "old", "new", sequence)
        except (RanksError, KeyboardInterrupt) as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return all_ranks, list(pool.map(change, range(len(members))))


@pytest.mark.parametrize("make", [lambda path: HashStore(), lambda path: FileStore(str(path / "s"), 3)], ids=["hash", "file"])
def test_all_ranks_change_and_the_keys_of_the_last_but_one_are_deleted(make: Callable[[Path], Any], tmp_path: Path) -> None:
    store = make(tmp_path)
    for sequence in (1, 2, 3):
        members = [Member() for _ in range(3)]
        _, errors = on_all(store, members, sequence)
        assert errors == [None] * 3 and [member.done for member in members] == [["prepare", "commit", "keep"]] * 3
    assert not store.check(["aliasparam/1/done"]) and not store.check(["aliasparam/2/ready/vote/1"])
    assert store.check(["aliasparam/3/done", "aliasparam/3/settled/2"])


CASES = {
    "prepare fails": (
        [Member(), Member(fails="prepare"), Member()],
        r"rank 1: ValueError: prepare fails\n.*generation new\n.*old serves",
    ),
    "commit fails": ([Member(), Member(), Member(fails="commit")], r"rank 2: ValueError: commit fails"),
    "other things": ([Member(), Member("u"), Member()], r"'yes old new [tu]' and 'yes old new [tu]'"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_that_cannot_keeps_all_on_the_old(case: str) -> None:
    members, message = CASES[case]
    _, errors = on_all(HashStore(), members)
    for member, error in zip(members, errors, strict=True):
        assert member.serving == "old" and re.search(message, str(error)), str(error)
        assert "Try again with the next sequence number" in str(error)


def test_a_rank_that_does_not_come_is_named() -> None:
    ranks = Ranks(HashStore(), 0, 3, ready_seconds=0.1)
    member = Member()
    with pytest.raises(RanksError, match=r"nothing from rank 1, 2 in time \(ready\)"):
        ranks.change(member, "old", "new", 1)
    assert member.serving == "old" and member.done == ["prepare", "revert"]


def test_a_rank_that_cannot_go_back_says_so() -> None:
    members = [Member(), Member()]
    members[0].fails, members[1].fails = "revert", "commit"
    _, errors = on_all(HashStore(), members)
    assert members[1].serving == "old" and re.search("revert fails\n.*\n.*are neither\n.*afresh", str(errors[0]))


@pytest.mark.parametrize("when", ["prepare", "commit", "keep"])
def test_law_10_an_interrupt_leaves_a_rank_in_doubt_until_it_asks(when: str) -> None:
    members = [Member(), Member(dies=when), Member()]
    all_ranks, errors = on_all(HashStore(), members)
    assert isinstance(errors[1], KeyboardInterrupt)
    with pytest.raises(RanksError, match="in doubt about an earlier change"):
        all_ranks[1].change(members[1], "old", "new", 2)
    assert all_ranks[1].ask_again(members[1]) == (when == "keep") and not all_ranks[0].ask_again(members[0])
    assert [member.serving for member in members] == ["new" if when == "keep" else "old"] * 3


class Breaking:
    """A store that breaks down after a key was set, until it is mended."""

    def __init__(self, key: str) -> None:
        self.store, self.key, self.broken = HashStore(), key, False

    def __getattr__(self, name: str) -> Any:
        if self.broken:
            raise RuntimeError("connection reset by peer")
        return getattr(self.store, name)

    def compare_set(self, key: str, standing: str, value: str) -> bytes:
        found: bytes = self.__getattr__("compare_set")(key, standing, value)
        self.broken = self.key in key
        return found


class Between:
    """A store that does something else before one of its calls."""

    def __init__(self, store: Any, call: str, key: str, then: Callable[[], object]) -> None:
        self.store, self.call, self.key, self.then = store, call, key, then

    def __getattr__(self, name: str) -> Any:
        def called(key: Any, *values: str) -> Any:
            if name == self.call and key == self.key:
                self.call = ""
                self.then()
            return getattr(self.store, name)(key, *values)

        return called


def test_law_10_a_rank_that_is_restarted_while_another_begins_the_next_change_loads_what_serves() -> None:
    """Whatever is deleted then, and also where the next one is never announced."""
    store, member = HashStore(), Member()
    Ranks(store, 0, 1).change(member, "old", "new", 1)

    def begin_the_next() -> None:
        with pytest.raises(RanksError, match="prepare fails"):
            Ranks(store, 0, 1).change(Member(fails="prepare"), "new", "newer", 2)

    assert Ranks(Between(store, "compare_set", "aliasparam/1/done", begin_the_next), 0, 1).generation_to_load() == "new"

    store = HashStore()
    Ranks(store, 0, 1).change(member, "old", "new", 1)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ranks(Between(store, "compare_set", "aliasparam/last", killed), 0, 1).change(member, "new", "newer", 2)
    assert Ranks(store, 0, 1).generation_to_load() == "new"


def test_a_rank_that_loses_the_store_after_it_acknowledged_is_in_doubt() -> None:
    store = Breaking("done/vote")
    ranks, member = Ranks(store, 0, 1, done_seconds=0.1, patience=0.1), Member()
    with pytest.raises(RanksError, match=r"after it had acknowledged\n.*\n.*in doubt\n.*must not serve"):
        ranks.change(member, "old", "new", 1)
    assert member.serving is None
    with pytest.raises(RanksError, match="could not reach the store"):
        ranks.ask_again(member)
    store.broken, store.key = False, " "
    assert ranks.ask_again(member) is False and member.serving == "old"  # nobody had written the record: now it says no
    assert Ranks(store, 0, 1).generation_to_load() == "old"


def test_a_rank_that_loses_the_store_before_that_goes_back_by_itself() -> None:
    store = Breaking("ready/vote")
    ranks, member = Ranks(store, 0, 1, ready_seconds=0.1, patience=0.1), Member()
    with pytest.raises(RanksError, match=r"could not reach the store\n.*\n.*old serves, as before"):
        ranks.change(member, "old", "new", 1)
    assert member.serving == "old"


def test_without_a_store_nothing_begins() -> None:
    store = Breaking("")
    store.broken = True
    member = Member()
    with pytest.raises(RanksError, match="the store cannot be reached\n  Nothing was changed"):
        Ranks(store, 0, 1).change(member, "old", "new", 1)
    with pytest.raises(RanksError, match="the store cannot be reached"):
        Ranks(store, 0, 1).generation_to_load()
    assert member.done == []


def test_a_sequence_is_used_once() -> None:
    store = HashStore()
    assert Ranks(store, 0, 1).generation_to_load() is None
    Ranks(store, 0, 1).change(Member(), "old", "new", 5)
    assert Ranks(store, 0, 1).generation_to_load() == "new"
    for sequence, target in ((5, "new"), (5, "other"), (4, "new")):
        member = Member()
        with pytest.raises(RanksError, match="another change" if target == "other" else "a sequence is used once"):
            Ranks(store, 0, 1).change(member, "old", target, sequence)
        assert member.done == []


def test_law_10_ranks_that_disagree_on_how_many_they_are_change_nothing() -> None:
    """Two of three would agree without the third, which could not prepare."""
    store, members = HashStore(), [Member(), Member(fails="prepare")]
    few, many = (Ranks(store, rank, ranks, ready_seconds=0.2) for rank, ranks in ((0, 2), (2, 3)))
    for ranks, member, message in (
        (few, members[0], "nothing from rank 1"),
        (many, members[1], "another change"),
    ):
        with pytest.raises(RanksError, match=message):
            ranks.change(member, "old", "new", 1)
    assert [member.serving for member in members] == ["old", "old"]


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), ("0", 1), (True, 2)])
def test_what_is_no_rank_is_refused(rank: Any, ranks: Any) -> None:
    with pytest.raises(RanksError, match="no such rank"):
        Ranks(HashStore(), rank, ranks)


def test_what_other_code_put_into_the_store_is_refused() -> None:
    store, member = HashStore(), Member()
    store.set("aliasparam/last", "[]")
    for use in (lambda: Ranks(store, 0, 1).change(member, "old", "new", 1), Ranks(store, 0, 1).generation_to_load):
        with pytest.raises(RanksError, match=r"aliasparam/last: the store has something else"):
            use()
    with pytest.raises(RanksError, match="a sequence is a number"):
        Ranks(store, 0, 1).change(member, "old", "new", "1")  # type: ignore[arg-type]
    assert member.done == []


#: Where rank 1 of 3 is killed -> what all serve in the end.
KILLED = {
    "prepare": "old",
    "before ready/vote": "old",
    "after ready/vote": "old",
    "commit": "old",
    "committed": "old",
    "before done/vote": "old",
    "after done/vote": "new",
    "keep": "new",
    "before settled": "new",
}


def test_law_10_processes_that_are_killed_in_each_phase(tmp_path: Path) -> None:
    """27 processes at once: for each place, three ranks of which one kills itself there and is started again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.aliasparam.reload.rank_process"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    group = {place: str(number) for number, place in enumerate(KILLED)}
    path = {(place, rank): str(tmp_path / f"{group[place]}-{rank}") for place in KILLED for rank in range(3)}
    # Where all votes come, none is waited for in vain: the time is a slow machine's.
    seconds = {place: 5 if generation == "old" else 60 for place, generation in KILLED.items()}
    running = {
        (place, rank): context.Process(
            target=rank_process.run,
            args=(store.port, group[place], rank, 3, path[place, rank], place if rank == 1 else None, seconds[place]),
        )
        for place, rank in path
    }
    for process in running.values():
        process.start()
    for (_, rank), process in running.items():
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if rank == 1 else 0)
    again = [
        context.Process(target=rank_process.restart, args=(store.port, group[place], 1, 3, path[place, 1])) for place in KILLED
    ]
    for process in again:
        process.start()
    for process in again:
        process.join(60)
        assert process.exitcode == 0
    served = {place: [Path(path[place, rank]).read_text() for rank in range(3)] for place in KILLED}
    assert served == {place: [generation] * 3 for place, generation in KILLED.items()}
    errors = {place for place in KILLED if Path(path[place, 0] + ".error").exists()}
    assert errors == {place for place, generation in KILLED.items() if generation == "old"}
