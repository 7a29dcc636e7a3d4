"""`reload`: replace a serving model's weights in one transaction.

Every incoming tensor is checked against the live names before it is written; preparing checks coverage, committing processes what
changed. What is written refuses from its first write to the commit: declared modules by themselves, plain parameters and buffers
by a refusing twin (see plain.py), in compiled callers and parents too. A failure before the first write leaves the old weights
serving; after it what was written is invalid, and refuses until a whole reload succeeds: a mixture never serves.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ReloadError
from ..module.adopt import adopt
from ..module.registry_of import registries
from ..module.verbs import process
from ..spec import TensorSpec
from ..storage.coverage import Box, Coverage
from .targets import Target, find_targets, in_scope
from .written import Written

#: "all": every tensor must arrive; "partial": each tensor that is begun must; or dotted prefixes, under which every tensor must.
Scope = Literal["all", "partial"] | Iterable[str]


class Phase(Enum):
    NEW = "not begun"
    OPEN = "open"
    PREPARED = "prepared"
    ENDED = "ended"


class ReloadSession:
    """One reload in progress. Made by :func:`reload`; a context, or step by step: begin, update, prepare, commit, abort."""

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        self.model = model
        self.scope = scope if isinstance(scope, str) else tuple(scope)
        self.phase = Phase.NEW
        #: How many sources were new and derivations computed, after the commit.
        self.processed = 0
        self._targets: dict[str, Target] = {}
        self._arrived: dict[int, Coverage] = {}
        self._written = Written(type(model).__name__)

    # -- the transaction -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look the model's names up. Nothing is written, and nothing refuses yet.

        Raises:
            ReloadError: another session has this model, or a part of it; or this one was begun before.
        """
        self._need(Phase.NEW, "begin")
        with torch.no_grad():
            for _, registry in registries(self.model):
                adopt(registry)
        _claim(self)
        self._targets = find_targets(self.model)
        self.phase = Phase.OPEN
        weakref.finalize(self, self._written.spoil)  # an abandoned session ends like a failed one

    def prepare(self) -> None:
        """Check that everything arrived.

        Raises:
            ReloadError: tensors of the scope did not arrive whole. The session stays open: send them, or abort.
        """
        self._need(Phase.OPEN, "prepare")
        wanted = in_scope(self._targets, self.scope, self._arrived)
        missing = [name for name, target in wanted.items() if not self._coverage(target).whole]
        if missing:
            first = self._coverage(self._targets[missing[0]]).missing()
            raise ReloadError(
                f"{len(missing)} of {len(wanted)} tensors did not arrive whole",
                module=self._label,
                name=", ".join(missing[:5]) + (", …" if len(missing) > 5 else ""),
                expected="every element of each tensor that was begun" if self.scope == "partial" else "every element once",
                found=f"{missing[0]} without {', '.join(map(_shown, first[:3]))}",
                remedy='Send the missing tensors, or open the reload with scope="partial" for a deliberate partial update.',
            )
        self.phase = Phase.PREPARED

    def commit(self) -> None:
        """Let the model run with what was written. If it fails the session is still prepared: commit again, or abort.

        Raises:
            ReloadError: not prepared.
            AliasError: processing refuses the new values.
        """
        self._need(Phase.PREPARED, "commit")
        _release(self)
        try:
            self.processed = process(self.model)
        except BaseException:
            _claim(self)
            raise
        self._written.commit(whole=self.scope == "all")
        self.phase = Phase.ENDED

    def abort(self) -> None:
        """End without a commit: what was written is invalid, and refuses until it is loaded whole."""
        if self.phase is not Phase.ENDED:
            self._written.spoil()
            _release(self)
            self.phase = Phase.ENDED

    def __enter__(self) -> ReloadSession:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and self.phase is Phase.OPEN:
                self.prepare()
            if error is None and self.phase is Phase.PREPARED:
                self.commit()
        finally:
            self.abort()

    # -- updates -------------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> Mapping[str, TensorSpec]:
        """Every checkpoint name of the model and what must arrive under it. Tied names count once."""
        return {name: TensorSpec.of(target.tensor) for name, target in self._targets.items()}

    def update(self, name: str, value: Tensor, *, first_row: int | None = None, box: Box | None = None) -> None:
        """Write one tensor, rows of it from ``first_row`` on, or a rectangle of it.

        Args:
            name: a name of :attr:`expected`.
            value: of the tensor's dtype, on any device. Nothing of it is kept.
            first_row: where the rows of ``value`` begin.
            box: (start, stop) for each dim.

        Raises:
            ReloadError: unknown name, wrong shape or dtype, outside the tensor, or elements sent twice. Nothing is written then.
        """
        self._need(Phase.OPEN, "update")
        target = self._targets.get(name)
        if target is None:
            raise ReloadError(
                "the model has no tensor of this name",
                module=self._label,
                name=name,
                expected=f"one of its {len(self._targets)} names",
                found=name,
                remedy="r.expected lists them. Map the sender's names to those first.",
            )
        self._need_in_scope(name)
        live = target.tensor
        if value.numel() == live.numel() == 1 and value.dim() <= 1 and live.dim() <= 1:
            value = value.reshape(live.shape)  # 0-d and [1] are one thing
        box = _box(live, value, first_row, box)
        self._need_fit(name, live, value, box)
        coverage = self._coverage(target)
        if coverage.overlap(box) is not None:
            raise ReloadError(
                "these elements arrived twice in one reload",
                module=self._label,
                name=name,
                expected="every element once",
                found=f"{_shown(box)} again",
                remedy="Drop the duplicate from the stream, or open another reload for it.",
            )
        self._written.write(target, box, value)
        coverage.add(box)

    def load(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Write every (name, tensor) of a mapping or iterable."""
        for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self.update(name, value)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _need(self, phase: Phase, doing: str) -> None:
        if self.phase is not phase:
            raise ReloadError(
                f"cannot {doing}: this reload is {self.phase.value}",
                module=self._label,
                expected=f"a reload that is {phase.value}",
                found=self.phase.value,
                remedy="The order is begin, update, prepare, commit; or use it inside `with reload(model) as r:`.",
            )

    def _need_in_scope(self, name: str) -> None:
        if not isinstance(self.scope, str) and name not in in_scope(self._targets, self.scope, {}):
            raise ReloadError(
                "this tensor is outside the scope of the reload",
                module=self._label,
                name=name,
                expected=f"names under {', '.join(self.scope)}",
                found=name,
                remedy="Open the reload with a scope that has it.",
            )

    def _need_fit(self, name: str, live: Tensor, value: Tensor, box: Box) -> None:
        sizes = tuple(stop - start for start, stop in box)
        inside = len(box) == live.dim() and all(0 <= a <= b <= n for (a, b), n in zip(box, live.shape, strict=True))
        if inside and tuple(value.shape) == sizes and value.dtype == live.dtype and value.device.type != "meta":
            return
        raise ReloadError(
            "the new tensor does not fit",
            module=self._label,
            name=name,
            expected=f"{TensorSpec.of(live)}" + ("" if value.dim() and sizes == tuple(live.shape) else f", {_shown(box)} of it"),
            found=f"{TensorSpec.of(value)}{' on meta' if value.device.type == 'meta' else ''}",
            remedy="Send it in the shape and dtype of the checkpoint that was loaded first.",
        )

    def _coverage(self, target: Target) -> Coverage:
        key = id(target.tensor)
        if key not in self._arrived:
            found = Coverage(target.tensor.shape)
            if not target.tensor.numel():
                return found  # nothing is missing from it, also where nobody sends it
            self._arrived[key] = found
        return self._arrived[key]

    @property
    def _label(self) -> str:
        return type(self.model).__name__


def reload(model: nn.Module, *, scope: Scope = "all") -> ReloadSession:
    """A transaction that replaces weights of a serving model: ``with reload(model) as r: r.load(tensors)``.

    Args:
        model: any module tree; declared modules are processed at the end, other parameters and persistent buffers are
            copied in place.
        scope: "all": every tensor must arrive, element for element, exactly once. "partial": each tensor that is begun must.
            Dotted prefixes (``["model.layers.3"]``): every tensor under them must, and no other may.

    Raises (at the end of the block, or from the steps):
        ReloadError: missing, unexpected, duplicate or ill-fitting tensors; a scope that is none.
    """
    if isinstance(scope, str) and scope not in ("all", "partial"):
        raise ReloadError(
            "unknown scope",
            module=type(model).__name__,
            expected="'all', 'partial', or dotted prefixes in a list",
            found=repr(scope),
            remedy="'all' is the default.",
        )
    return ReloadSession(model, scope)


def _box(live: Tensor, value: Tensor, first_row: int | None, box: Box | None) -> Box:
    if box is not None:
        return tuple((int(a), int(b)) for a, b in box)
    whole = tuple((0, n) for n in live.shape)
    if first_row is None or not whole:
        return whole
    return ((first_row, first_row + (value.shape[0] if value.dim() else 1)), *whole[1:])


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


# -- one session a module ------------------------------------------------------------------------------------------------

#: Which session has a module. Neither keeps the other alive, so an abandoned session frees its modules.
_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ReloadSession]] = weakref.WeakKeyDictionary()


def _claim(session: ReloadSession) -> None:
    modules = list(session.model.modules())
    for module in modules:
        other = _sessions.get(module)
        if other is not None and other() not in (None, session):
            raise ReloadError(
                "a reload of this model is already open",
                module=type(session.model).__name__,
                expected="one reload at a time",
                found=f"another one, of {type(module).__name__}, in progress",
                remedy="Finish or abort it first.",
            )
    reference = weakref.ref(session)
    for module in modules:
        _sessions[module] = reference
    for _, registry in registries(session.model):
        registry.holder = reference


def _release(session: ReloadSession) -> None:
    for module in session.model.modules():
        if module in _sessions and _sessions[module]() is session:
            del _sessions[module]
    for _, registry in registries(session.model):
        registry.holder = None
