"""One rank as a process with a target and a draft model, which are to commit together."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore

from aliasparam import checkpoint_digest, checkpoint_state_dict, registry_of, reload
from aliasparam.reload import prepare_delta
from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.errors import RanksError
from aliasparam.reload.member import SessionMember
from aliasparam.reload.ranks_store import Ranks
from aliasparam.reload.session import ReloadSession

from .live_models import Few, Whole, changed


def new_of(model: Whole) -> dict[str, Any]:
    return changed(changed(checkpoint_state_dict(model), 0.2, 0), 0.2, 1)


def staged(model: Whole) -> Callable[[], tuple[ReloadSession, str]]:
    def prepare() -> tuple[ReloadSession, str]:
        session = reload(model, policy="staged-journal")
        session.begin()
        session.load(new_of(model))
        session.prepare()
        return session, "target 1"

    return prepare


def by_delta(model: nn.Module, folder: str) -> Callable[[], tuple[ReloadSession, str]]:
    def prepare() -> tuple[ReloadSession, str]:
        with DeltaFolder(folder) as delta:
            return prepare_delta(model, delta, serving=0), f"draft {delta.version}"

    return prepare


class Killed(SessionMember):
    """A rank that is killed when it is to commit."""

    def commit(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def run(port: int, rank: int, backend: str, delta: str, out: str, fate: str) -> None:
    """As one of a process group of two, on a GPU of its own over NCCL. Writes what serves in the end: digests of both models, and
    what was raised.
    """
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1, device=device))  # the ranks are connected, and one may be lost
    target, draft, error = Whole(device), Few(device), None
    if fate == "a check fails":
        registry = registry_of(draft.wide)
        assert registry is not None
        old = draft.wide.weight.clone()
        registry.checks.append(lambda _: None if draft.wide.weight.equal(old) else 1 / 0)  # type: ignore[func-returns-value]
    member = (Killed if fate == "killed" else SessionMember)(staged(target), by_delta(draft, delta))
    try:
        Ranks(store, rank, 2, group="models", ready_seconds=60, done_seconds=15, patience=30).change(member, "0", "1", 1)
    except RanksError as refusal:
        error = str(refusal)
    target(), draft()  # both serve
    Path(out).write_text(json.dumps([checkpoint_digest(target).whole, checkpoint_digest(draft).whole, error]))
    os._exit(0)  # without the group's end, which would wait for a rank that is gone
