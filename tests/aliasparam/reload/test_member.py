"""A target and a draft model on two ranks: all four change in one commit, or none does."""

from __future__ import annotations

import json
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from aliasparam import checkpoint_digest, checkpoint_state_dict, process, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.reload.member import SessionMember
from aliasparam.reload.session import ReloadSession

from ...processes import imported_context
from . import rank_models
from .delta_cases import trainer_writes
from .live_models import Few, Whole, raw
from .rank_models import new_of, staged


def digests(*models: Whole, new: bool) -> list[str]:
    for model in models if new else ():
        model.load_state_dict(new_of(model), strict=False)
        process(model)
    return [checkpoint_digest(model).whole for model in models]


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
@pytest.mark.parametrize("fate", ["", "a check fails", "killed"], ids=lambda fate: f"of rank 1: {fate or 'it can'}")
def test_law_10_two_processes_two_models_one_commit(fate: str, backend: str, tmp_path: Path) -> None:
    draft = Few()
    delta = trainer_writes(tmp_path / "d", raw(checkpoint_state_dict(draft)), raw(new_of(draft)), 1, "xor", "adler32")
    context = imported_context()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    out = [tmp_path / str(rank) for rank in range(2)]
    running = [
        context.Process(
            target=rank_models.run, args=(store.port, rank, backend, str(delta), str(out[rank]), fate if rank else "")
        )
        for rank in range(2)
    ]
    for one in running:
        one.start()
    for rank, one in enumerate(running):
        one.join(120)
        assert one.exitcode == (-signal.SIGKILL if rank and fate == "killed" else 0)
    found = [json.loads(path.read_text()) for path in out if path.exists()]
    assert len(found) == (1 if fate == "killed" else 2)
    assert all(rank[:2] == digests(Whole(), Few(), new=not fate) for rank in found)
    said = {"": None, "a check fails": "ZeroDivisionError", "killed": "nothing from rank 1 in time (done)"}[fate]
    assert all(rank[2] is None if said is None else said in rank[2] for rank in found)


def test_law_10_a_member_whose_change_failed_or_was_made_can_change_again() -> None:
    model = Few()
    member = SessionMember(staged(model))
    for end in (member.revert, member.keep, member.revert):
        before = digests(model, new=False)
        member.prepare()
        member.commit()
        end()
        assert (digests(model, new=False) != before) == (end == member.keep)


def test_a_member_refuses_between_commit_and_keep_and_takes_no_session_that_cannot_go_back() -> None:
    target, draft = Whole(), Few()
    member = SessionMember(staged(target), staged(draft))
    served = target()
    assert member.prepare() == SessionMember(staged(Whole()), staged(Few())).prepare()
    assert all(a.equal(b) for a, b in zip(target(), served, strict=True))
    member.commit()
    for model in (target, draft):
        with pytest.raises(AliasError):
            model()
    member.keep()
    member.keep()
    target(), draft()

    def write_through() -> tuple[ReloadSession, str]:
        session = reload(draft)
        session.begin()
        session.load(new_of(draft))
        session.prepare()
        return session, ""

    with pytest.raises(ReloadError, match="taken back"):
        SessionMember(staged(target), write_through).prepare()
    target()
