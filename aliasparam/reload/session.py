"""`reload`: replace a serving model's weights in one transaction.

Every incoming tensor is checked against the live names before it is written; preparing checks coverage, committing processes what
changed. What is written refuses from its first write to the commit: declared modules by themselves, plain parameters and buffers
by a refusing twin (see targets.py), in compiled callers and parents too. What an abort leaves is the policy's (see policies.py):
the old weights, or a refusal until a whole reload succeeds. A mixture never serves.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ReloadError
from ..module.adopt import adopt
from ..spec import TensorSpec
from ..storage.coverage import Box
from .claims import Claim
from .collector import collector_paused
from .drain import Drain
from .live import Live
from .observe import Hook, Hooks, Observed, call_abort_hooks, phase
from .patch import Patch
from .policies import AnyPolicy, Policy
from .targets import Target, find_targets, fitted, in_scope, need_no_loader, need_whole, target_of

#: "all": every tensor must arrive; "partial": each tensor that is begun must; or dotted prefixes, under which every tensor must.
Scope = Literal["all", "partial"] | Iterable[str]


class Phase(Enum):
    """COMMITTING: in its switch or commit, where hooks and derivations run. Only an abort may come between."""

    NEW = "not begun"
    OPEN = "open"
    PREPARED = "prepared"
    COMMITTING = "being committed"
    SWITCHED = "switched"
    COMMITTED = "committed"
    ENDED = "ended"


class ReloadSession:
    """One reload in progress. Made by :func:`reload`; a context, or begin, update, prepare, commit, abort. Threads may update.

    Attributes:
        processed: how many sources were new and derivations computed, after the commit.
        observed: figures, complete at the end.
        failed_hooks: (hook, error) of ``on_abort`` hooks that failed twice.
    """

    def __init__(
        self, model: nn.Module, scope: Scope, policy: AnyPolicy, source: str, hooks: Hooks, drain_seconds: float = 30.0
    ) -> None:
        self.model = model
        self.scope = scope if isinstance(scope, str) else tuple(scope)
        self.phase = Phase.NEW
        self.processed = 0
        self.failed_hooks: list[tuple[Hook, Exception]] = []
        self.observed = Observed(source, policy)
        self._hooks, self._to_call = hooks, list(hooks.on_commit)
        self._targets: dict[str, Target] = {}
        self.stand_ins: Collection[object] = ()  # of a loader, in the places of the tensors (see loading.py)
        self.drain = Drain(model, drain_seconds)
        self._claim = Claim(self)
        self._policy = Policy(policy, self._label, self.drain)
        self._lock = threading.RLock()  # of updates and of the phase; no hook and no derivation runs under it
        self._aborting = threading.RLock()  # nobody waits for it; an interrupt at its end may leave it held, by this thread

    # -- the transaction -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look the model's names up. Nothing is written, and nothing refuses yet.

        Raises:
            ReloadError: another session has this model, or a part of it; or this one was begun before.
        """
        self._need((Phase.NEW,), "begin")
        self._claim.take(self.model)
        try:
            with torch.no_grad(), collector_paused():
                for registry in self._claim.registries:
                    if not registry.is_untouched:
                        adopt(registry)
                self._targets = find_targets(self.model)
            self.drain.begin(self._claim.modules)
            self.phase = Phase.OPEN
            weakref.finalize(self, self._policy.abandon)  # a session that was dropped leaves a refusal
            for hook in self._hooks.on_begin:
                hook(self)
        except BaseException:
            self.abort()
            raise

    def prepare(self) -> None:
        """Check that everything arrived.

        Raises:
            ReloadError: tensors of the scope did not arrive whole. The session stays open: send them, or abort.
        """
        with self._lock:
            self._need((Phase.OPEN,), "prepare")
            need_whole(self._label, self.scope, in_scope(self._targets, self.scope))
            self.phase = Phase.PREPARED

    def switch(self) -> None:
        """Put the new weights in place and compute what derives from them; the model refuses until :meth:`commit`. For ranks.

        Raises:
            ReloadError: not prepared.
            AliasError: processing refuses the new values. The session is still prepared.
        """
        self._put_in_place("switch", (Phase.PREPARED,), self._reopen, Phase.SWITCHED)

    def commit(self) -> None:
        """Let the model run with what was written. If it fails the session is still prepared: commit again, or abort.

        Raises:
            ReloadError: not prepared, or inside a loader's block.
            AliasError: processing refuses the new values.
        """
        if self.phase is not Phase.COMMITTED:
            started = time.perf_counter()
            self._put_in_place("commit", (Phase.PREPARED, Phase.SWITCHED), self._serve, Phase.COMMITTED)
            self.observed.pause_seconds = time.perf_counter() - started
        self._end_commit()

    def abort(self) -> None:
        """End without a commit. By policy the old weights serve again, or what was written refuses until it is loaded whole.

        Raises:
            AliasError: the policy keeps the old weights, and they cannot be brought back. What was written refuses.
            ReloadError: inside a loader's block. Nothing has changed.
        """
        need_no_loader(self._label, self.stand_ins, "abort")
        if not self._aborting.acquire(blocking=False):
            return  # another thread is at it: what it restores may not be poisoned
        begun = restored = False
        try:
            with self._lock:  # an update of another thread ends, and no other begins
                if self.phase is Phase.COMMITTED:
                    self._end_commit()
                    return
                begun, self.phase = self.phase not in (Phase.NEW, Phase.ENDED), Phase.ENDED
            if begun:
                self._claim.lend()  # and no more: another session would be given old bytes between its own
                with phase("abort"):
                    restored = self._policy.restore()
        finally:
            self._policy.poison()
            self._claim.end()
            self._aborting.release()
            if begun:
                self.failed_hooks = call_abort_hooks(self._hooks, self)
                self.observed.ended(self.model, "restored" if restored else "refuses")

    def __enter__(self) -> ReloadSession:
        if self.phase is not Phase.PREPARED:  # as prepare_delta() gives it
            self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and self.phase is Phase.OPEN:
                self.prepare()
            if error is None and self.phase in (Phase.PREPARED, Phase.SWITCHED):
                self.commit()
        except BaseException as own:
            error = own
            raise
        finally:
            self._abort_after(error)

    def _abort_after(self, error: BaseException | None) -> None:
        """What ended the block is what is raised; that the old weights could not be brought back either is a note on it."""
        try:
            self.abort()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _put_in_place(self, doing: str, phases: tuple[Phase, ...], finish: Callable[[], None], after: Phase) -> None:
        """Write what was held, call the hooks, process, ``finish``; only an abort comes between. May be called again."""
        need_no_loader(self._label, self.stand_ins, doing)
        with self._lock:
            self._need(phases, doing)
            before, self.phase = self.phase, Phase.COMMITTING
        try:
            with self._lock, phase("flush"):
                if before is Phase.PREPARED:
                    self._policy.flush()
            self._claim.lend()
            while self._to_call:
                self._to_call[0](self)
                self._need((Phase.COMMITTING,), doing)
                del self._to_call[0]
            registries = self._claim.registries_of(self.model)
            with phase("process"):
                self.processed += sum(registry.process() for registry in registries)
            with self._lock:
                self._need((Phase.COMMITTING,), doing)
                finish()
                self.phase = after
        except BaseException:
            with self._lock:
                if self.phase is Phase.COMMITTING:
                    self._reopen()  # of what was processed before the failure
                    self.phase = before
            raise

    def _serve(self) -> None:
        if self._policy.wrote:
            self.drain.wait_for_devices()
        self._policy.commit(whole=self.scope == "all")

    def _end_commit(self) -> None:
        self._policy.end()
        self._claim.end()
        with self._lock:  # another thread may abort
            if not self.observed.outcome:
                self.observed.ended(self.model, "committed")

    def _reopen(self) -> None:
        self._policy.reopen()
        self._claim.hold()

    # -- updates -------------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> Mapping[str, TensorSpec]:
        """Every checkpoint name of the model and what must arrive under it. Tied names count once."""
        return {name: TensorSpec.of(tensor) for name, tensor in self.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The live tensors under these names."""
        return {name: target.tensor for name, target in self._targets.items()}

    def update(self, name: str, value: Tensor, *, first_row: int | None = None, box: Box | None = None) -> None:
        """Write one tensor, rows of it from ``first_row`` on, or a rectangle of it.

        Args:
            name: a name of :attr:`expected`.
            value: of the tensor's dtype, on any device. Nothing of it is kept.
            first_row: where the rows of ``value`` begin.
            box: (start, stop) for each dim; not with ``first_row``.

        Raises:
            ReloadError: unknown name, wrong shape or dtype, outside the tensor, or elements sent twice. Nothing is written then.
        """
        with self._lock:
            self._need((Phase.OPEN,), "update")
            target = self._target(name)
            value, box = fitted(target, self._label, value, first_row, box)
            with phase("update"):
                self._policy.update(target, box, value)
            target.arrived.add(box)
            self.observed.took(value.nbytes)

    def load(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | tuple[str, Tensor, Box | None]]) -> None:
        """Write every (name, tensor) of a mapping or iterable; of a stream (name, tensor, box)."""
        for name, value, *box in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self.update(name, value, box=box[0] if box else None)

    def watch(self, name: str) -> Live:
        """The live tensor, which must not change until the commit. For sessions of :func:`~aliasparam.reload.prepare_delta`."""
        self._need((Phase.OPEN,), "patch")
        return self._policy.watch(self._target(name))

    def hold(self, name: str, live: Live, patches: list[Patch]) -> None:
        """Hold what the commit is to change in a tensor that is watched, or in a part of it."""
        self._need((Phase.OPEN,), "patch")
        self._policy.hold(self._target(name), live, patches)
        self.observed.took(sum(patch.nbytes for patch in patches))

    def _target(self, name: str) -> Target:
        return target_of(self._targets, self.scope, self._label, name)

    def _need(self, phases: tuple[Phase, ...], doing: str) -> None:
        if self.phase not in phases:
            raise ReloadError(
                f"cannot {doing}: this reload is {self.phase.value}",
                module=self._label,
                expected=f"a reload that is {' or '.join(one.value for one in phases)}",
                found=self.phase.value,
                remedy="The order is begin, update, prepare, commit; or use it inside `with reload(model) as r:`.",
            )

    @property
    def _label(self) -> str:
        return type(self.model).__name__
