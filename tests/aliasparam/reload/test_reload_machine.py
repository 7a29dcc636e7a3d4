"""A state machine of reloads: forwards, whole and partial reloads, deltas, aborts, sleeps, and faults at any operator or read.

What must serve is known after every step: a set of weights, or nothing. An oracle that shares nothing with the model, loaded from
those weights, says what is answered. ``HYPOTHESIS_PROFILE=nightly`` makes more than 100 000 steps.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from aliasparam import accept_kernel_bytes, apply_delta, checkpoint_digest, checkpoint_state_dict, invalidate, process, reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.reload import digest_of_tensors
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.session import ReloadSession
from aliasparam.testing._faults import FailingAt, Fault

from .delta_cases import trainer_writes
from .failing_reads import failing_read, read_all
from .live_models import Few, changed, folder_of, raw, same

Weights = dict[str, Tensor]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
BASE = checkpoint_state_dict(Few())


class ReloadMachine(RuleBasedStateMachine):
    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.model, self.oracle = Few(self.device), Few()
        self.serving: Weights | None = BASE
        self.session: ReloadSession | None = None
        self.before: Weights = BASE  # what served when the session began
        self.begun: Weights = {}  # what was sent to it
        self.folder = Path(tempfile.mkdtemp())
        self.numbers = itertools.count()
        self.addresses = [buffer.data_ptr() for buffer in self.model.buffers()]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # -- what must hold ------------------------------------------------------------------------------------------------

    def expected(self, weights: Weights) -> list[Tensor]:
        self.oracle.load_state_dict(weights)
        process(self.oracle)
        return self.oracle()

    def left(self) -> Weights | None:
        """What the model serves and exports, of which nobody has said what it is; None where it refuses."""
        try:
            answer = self.model()
        except AliasError:
            return None
        exported = {name: tensor.clone().cpu() for name, tensor in checkpoint_state_dict(self.model).items()}
        assert same(answer, self.expected(exported)), "a mixture is served"
        return exported

    def settle(self, *allowed: Weights | None) -> None:
        """After a failure: one of these serves, or (None) nothing."""
        self.serving = self.left()
        found = None if self.serving is None else raw(self.serving)
        assert found in [None if one is None else raw(one) for one in allowed], "neither old, nor new, nor a refusal"

    def new(self, seed: int, share: float) -> Weights:
        old = self.serving or BASE
        return changed(changed(old, share, 2 * seed), share, 2 * seed + 1)

    @invariant()
    def no_address_moves(self) -> None:
        if self.session is None and self.serving is not None:
            assert [buffer.data_ptr() for buffer in self.model.buffers()] == self.addresses

    idle = precondition(lambda self: self.session is None)

    def served(self) -> Weights:
        """What serves; where nothing does, a whole reload heals first. (Which operator a fault hits depends on what was planned
        before; so no precondition may ask what it left.)"""
        if self.serving is None:
            with reload(self.model) as session:
                session.load(BASE)
            self.serving = BASE
        return self.serving

    # -- rules ---------------------------------------------------------------------------------------------------------

    @idle
    @rule()
    def forward(self) -> None:
        if self.serving is None:
            with pytest.raises(AliasError):
                self.model()
        else:
            assert same(self.model(), self.expected(self.serving))
            assert raw(checkpoint_state_dict(self.model)) == raw(self.serving)

    @idle
    @rule(kind=st.sampled_from(["adler32", "xxh3-128"]))
    def digest(self, kind: str) -> None:
        weights = self.served()
        assert checkpoint_digest(self.model, kind) == digest_of_tensors(weights, kind)

    @idle
    @rule(policy=st.sampled_from(POLICIES), seed=st.integers(0, 99), share=st.sampled_from([0.02, 1.0]), backwards=st.booleans())
    def reload(self, policy: PolicyName, seed: int, share: float, backwards: bool) -> None:
        new = self.new(seed, share)
        with reload(self.model, policy=policy) as session:
            session.load(reversed(new.items()) if backwards else new)
        self.serving = new

    @idle
    @rule(policy=st.sampled_from(POLICIES), seed=st.integers(0, 99), at=st.integers(0, 600))
    def reload_with_a_fault(self, policy: PolicyName, seed: int, at: int) -> None:
        old, new = self.serving, self.new(seed, 0.1)
        with contextlib.suppress(Fault, AliasError), FailingAt(at), reload(self.model, policy=policy) as session:
            session.load(new)
        self.settle(old, new, *([None] if old is None or not policy.endswith("journal") else []))

    @idle
    @rule(
        policy=st.sampled_from(POLICIES),
        seed=st.integers(0, 99),
        at=st.integers(0, 40),
        how=st.sampled_from(["error", "end"]),
    )
    def reload_a_folder_with_a_fault(self, policy: PolicyName, seed: int, at: int, how: str) -> None:
        old, new = self.serving, self.new(seed, 0.1)
        folder = folder_of(self.folder / str(next(self.numbers)), new)
        with contextlib.suppress(AliasError), failing_read(at, how), reload(self.model, policy=policy) as session:
            read_all(session, folder)
        self.settle(old, new, *([None] if old is None or policy == "write-through" else []))

    @idle
    @rule(policy=st.sampled_from(POLICIES), seed=st.integers(0, 99), names=st.sets(st.sampled_from(sorted(BASE)), min_size=1))
    def reload_a_part(self, policy: PolicyName, seed: int, names: set[str]) -> None:
        old, new = self.served(), self.new(seed, 0.3)
        with reload(self.model, scope="partial", policy=policy) as session:
            session.load({name: new[name] for name in sorted(names)})
        self.serving = {name: new[name] if name in names else value for name, value in old.items()}

    @idle
    @rule(
        seed=st.integers(0, 99),
        share=st.sampled_from([0.02, 0.6]),
        encoding=st.sampled_from(["xor", "overwrite"]),
        at=st.none() | st.integers(0, 500),
    )
    def delta(self, seed: int, share: float, encoding: str, at: int | None) -> None:
        old, new, number = self.served(), self.new(seed, share), next(self.numbers)
        folder = trainer_writes(self.folder / str(number), raw(old), raw(new), number + 1, encoding, "adler32")
        with contextlib.suppress(Fault, AliasError), FailingAt(at) as faults:
            apply_delta(self.model, folder)
        self.settle(*([new] if not faults.failed else [old, new]))
        if self.serving is not None and raw(self.serving) == raw(new) and encoding == "xor" and at is None:
            with pytest.raises(ReloadError):  # it is applied already
                apply_delta(self.model, folder)
            self.settle(new)

    @idle
    @rule(wake=st.booleans())
    def sleep(self, wake: bool) -> None:
        self.served()
        invalidate(self.model)
        if wake:
            accept_kernel_bytes(self.model)
            process(self.model)
        else:
            self.serving = None

    # -- a session step by step ----------------------------------------------------------------------------------------

    @idle
    @rule(policy=st.sampled_from(POLICIES))
    def begin(self, policy: PolicyName) -> None:
        self.before, self.begun = self.served(), {}
        self.session = reload(self.model, scope="partial", policy=policy)
        self.session.begin()

    @precondition(lambda self: self.session is not None)
    @rule(name=st.sampled_from(sorted(BASE)), seed=st.integers(0, 99))
    def update(self, name: str, seed: int) -> None:
        assert self.session is not None
        value = self.new(seed, 0.5)[name]
        if name in self.begun:
            with pytest.raises(ReloadError, match="twice"):
                self.session.update(name, value)
            return
        self.session.update(name, value)
        self.begun[name] = value
        if self.session.observed.policy.startswith("staged"):
            assert same(self.model(), self.expected(self.before)), "the old weights serve"
        else:
            with pytest.raises(AliasError):
                self.model()

    @precondition(lambda self: self.session is not None)
    @rule(how=st.sampled_from(["commit", "abort", "switch and commit", "switch and abort", "drop"]))
    def end(self, how: str) -> None:
        assert self.session is not None
        session, policy, new = self.session, self.session.observed.policy, {**self.before, **self.begun}
        self.session = None
        if how in ("abort", "drop"):
            kept = policy.startswith("staged") or not self.begun or (policy == "journal" and how == "abort")
            if how == "abort":
                session.abort()
            del session
            self.settle(self.before if kept else None)
            return
        session.prepare()
        if how.startswith("switch"):
            session.switch()
            if self.begun:
                with pytest.raises(AliasError):
                    self.model()
        if how.endswith("commit"):
            session.commit()
            self.settle(new)
        else:
            session.abort()
            self.settle(self.before if policy.endswith("journal") or not self.begun else None)


class OnCuda(ReloadMachine):
    device = "cuda"


STEPS = settings(settings(), max_examples=2000 if NIGHTLY else 12, stateful_step_count=60 if NIGHTLY else 25)


class TestReloadMachine_laws_8_9_10(ReloadMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
class TestReloadMachineOnCuda_laws_8_9_10(OnCuda.TestCase):  # type: ignore[name-defined,misc]
    settings = STEPS
