"""Law 10: any read of a folder or a delta fails, or finds the end of its file, under every policy."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from aliasparam import apply_delta, checkpoint_state_dict, process, reload
from aliasparam.errors import AliasError
from aliasparam.reload.policies import PolicyName

from .delta_cases import trainer_writes
from .failing_reads import failing_read, read_all
from .live_models import Few, changed, folder_of, raw, same

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
BASE = checkpoint_state_dict(Few())


def by_folder(model: Few, policy: PolicyName, folder: Path) -> None:
    with reload(model, policy=policy) as session:
        read_all(session, folder)


def by_delta(model: Few, policy: PolicyName, folder: Path) -> None:
    apply_delta(model, folder)


@pytest.mark.parametrize("how", ["error", "end"])
@pytest.mark.parametrize(("load", "policy"), [*((by_folder, policy) for policy in POLICIES), (by_delta, "journal")])
def test_law_10_the_kth_read_fails(load: Callable[..., None], policy: PolicyName, how: str, tmp_path: Path) -> None:
    new = changed(changed(BASE, 0.1, 0), 0.1, 1)
    oracle = Few()
    served = {"old": oracle()}
    oracle.load_state_dict(new)
    process(oracle)
    served["new"] = oracle()
    if load is by_folder:
        folder = folder_of(tmp_path / "new", new)
    else:
        folder = trainer_writes(tmp_path / "delta", raw(BASE), raw(new), 1, "xor", "adler32", 2)
    found = {"old": 0, "refuses": 0}
    for k in itertools.count():
        model = Few()
        with contextlib.suppress(AliasError), failing_read(k, how) as reads:
            load(model, policy, folder)
        if reads[0] <= k:
            break
        try:
            answer = model()
        except AliasError:
            found["refuses"] += 1
            continue
        assert same(answer, served["old"]) and raw(checkpoint_state_dict(model)) == raw(BASE), f"read {k}"
        found["old"] += 1
    assert same(model(), served["new"]) and k > 8 and found["old"] >= 2, (k, found)
    assert (found["refuses"] > 0) == (policy == "write-through"), found
