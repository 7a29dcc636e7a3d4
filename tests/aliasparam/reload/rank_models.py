"""One rank as a process with a target and a draft model, which are to commit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed import TCPStore

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


def run(port: int, rank: int, delta: str, out: str, fails: bool) -> None:
    """Write what serves before, and after: digests of both models, and what was raised."""
    target, draft, error = Whole(), Few(), None
    if fails:
        registry = registry_of(draft.wide)
        assert registry is not None
        old = draft.wide.weight.clone()
        registry.checks.append(lambda _: None if draft.wide.weight.equal(old) else 1 / 0)  # type: ignore[func-returns-value]
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    member = SessionMember(staged(target), by_delta(draft, delta))
    try:
        Ranks(store, rank, 2, group="models", ready_seconds=60, done_seconds=60, patience=30).change(member, "0", "1", 1)
    except RanksError as refusal:
        error = str(refusal)
    target(), draft()  # both serve
    Path(out).write_text(json.dumps([checkpoint_digest(target).whole, checkpoint_digest(draft).whole, error]))
