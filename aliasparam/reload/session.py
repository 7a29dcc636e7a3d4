"""`reload`: replace a serving model's weights in one transaction.

Every incoming tensor is checked against the declared names before it is written; leaving the block checks coverage and
processes what changed. A failure before the first write leaves the old weights serving. A failure after it invalidates what
was written and makes the model refuse to run until a whole reload succeeds: a mixture never serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ReloadError, StaleKernelError
from ..module.adopt import adopt
from ..module.registry_of import registries
from ..module.verbs import checkpoint_names, process
from ..spec import TensorSpec
from ..tensors.faces import _Aliased
from ..torch_private import refused_when_traced

Scope = Literal["all", "partial"]


class ReloadSession:
    """One reload in progress. Made by :func:`reload`."""

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        self.model = model
        self.scope = scope
        #: Rows seen of each tensor, as (first, last+1) intervals.
        self._seen: dict[int, list[tuple[int, int]]] = {}
        self._targets: dict[str, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        self._open = False
        self.processed = 0

    # -- the transaction -----------------------------------------------------------------------------------------------

    def __enter__(self) -> ReloadSession:
        if self.model.__dict__.get("_alias_reload_open", False):
            raise ReloadError(
                "a reload of this model is already open",
                module=self._label,
                expected="one reload at a time",
                found="another one in progress",
                remedy="Finish or abort it first.",
            )
        for _, registry in registries(self.model):
            with torch.no_grad():
                adopt(registry)
        self._targets = checkpoint_names(self.model)
        self.model.__dict__["_alias_reload_open"] = True
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        self.model.__dict__.pop("_alias_reload_open", None)
        if error is not None:
            self._abort()
            return
        try:
            self._check_coverage()
            self.processed = process(self.model)
        except BaseException:
            self._abort()
            raise
        if self.scope == "all":
            _lift_refusal(self.model)

    def _abort(self) -> None:
        if not self._written:
            return
        for tensor in self._written.values():
            if isinstance(tensor, _Aliased):
                tensor._alias_storage.invalidate()
        _refuse_forward(self.model)

    def _check_coverage(self) -> None:
        if self.scope == "partial":
            missing = [n for n, t in self._targets.items() if id(t) in self._seen and not self._is_covered(t)]
        else:
            missing = [n for n, t in self._targets.items() if not self._is_covered(t)]
        if missing:
            raise ReloadError(
                f"{len(missing)} of {len(self._targets)} tensors did not arrive whole",
                module=self._label,
                name=", ".join(missing[:5]) + (", …" if len(missing) > 5 else ""),
                expected="every row of every tensor once" if self.scope == "all" else "every row of each tensor that was begun",
                found=f"{len(missing)} without all their rows",
                remedy='Send the missing tensors, or open the reload with scope="partial" for a deliberate partial update.',
            )

    def _is_covered(self, target: Tensor) -> bool:
        covered = 0
        for first, last in sorted(self._seen.get(id(target), [])):
            if first > covered:
                return False
            covered = max(covered, last)
        return covered >= _rows(target) and id(target) in self._seen

    # -- updates -------------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> Mapping[str, TensorSpec]:
        """Every checkpoint name of the model and what must arrive under it. Tied names count once."""
        return {name: TensorSpec.of(tensor) for name, tensor in self._targets.items()}

    def update(self, name: str, value: Tensor, *, first_row: int | None = None) -> None:
        """Write one tensor, or rows of it from ``first_row`` on.

        Raises:
            ReloadError: unknown name, wrong shape or dtype, or rows sent twice. Nothing is written then.
        """
        target = self._target(name)
        start, rows = first_row or 0, _rows(value) if first_row is not None else _rows(target)
        destination = target if first_row is None else target[start : start + rows]
        if destination.shape != value.shape or destination.dtype != value.dtype:
            raise ReloadError(
                "the new tensor does not fit",
                module=self._label,
                name=name,
                expected=TensorSpec.of(destination),
                found=TensorSpec.of(value),
                remedy="Send it in the shape and dtype of the checkpoint that was loaded first.",
            )
        seen = self._seen.setdefault(id(target), [])
        if any(start < last and first < start + rows for first, last in seen):
            raise ReloadError(
                "these rows arrived twice in one reload",
                module=self._label,
                name=name,
                expected="every row once",
                found=f"rows {start} to {start + rows - 1} again",
                remedy="Drop the duplicate from the stream, or open another reload for it.",
            )
        self._written[id(target)] = target
        with torch.no_grad():
            destination.copy_(value)
        seen.append((start, start + rows))

    def _target(self, name: str) -> Tensor:
        if not self._open:
            raise ReloadError(
                "this reload is not open",
                module=self._label,
                name=name,
                expected="an update inside the block",
                found="one before or after it",
                remedy="Use it inside `with reload(model) as r:`.",
            )
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
        return target

    @property
    def _label(self) -> str:
        return type(self.model).__name__

    def load(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Write every (name, tensor) of a mapping or iterable."""
        for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self.update(name, value)


def reload(model: nn.Module, *, scope: Scope = "all") -> ReloadSession:
    """A transaction that replaces weights of a serving model: ``with reload(model) as r: r.load(tensors)``.

    Args:
        model: any module tree; declared modules are processed at the end, other parameters and persistent buffers are
            copied in place.
        scope: "all": every tensor must arrive, row for row, exactly once. "partial": each tensor that is begun must.

    Raises (at the end of the block, or from ``update``):
        ReloadError: missing, unexpected, duplicate or ill-fitting tensors.
    """
    if scope not in ("all", "partial"):
        raise ReloadError(
            "unknown scope",
            module=type(model).__name__,
            expected="'all' or 'partial'",
            found=repr(scope),
            remedy="'all' is the default.",
        )
    return ReloadSession(model, scope)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


# -- refusing to run on a mixture ----------------------------------------------------------------------------------------

_REFUSAL = "_alias_reload_refusal"


def _refuse_forward(model: nn.Module) -> None:
    if _REFUSAL not in model.__dict__:
        # On every module: whoever calls an inner part directly meets the mixture too.
        model.__dict__[_REFUSAL] = [m.register_forward_pre_hook(_refuse, prepend=True) for m in model.modules()]


def _lift_refusal(model: nn.Module) -> None:
    handles: list[Any] = model.__dict__.pop(_REFUSAL, [])
    for handle in handles:
        handle.remove()


def _refuse(module: nn.Module, args: Any) -> None:
    raise StaleKernelError(
        "the last reload failed half-way: the weights are a mixture of old and new",
        module=type(module).__name__,
        expected="a whole reload",
        found="one that failed after its first write",
        remedy="Reload the whole model; until then it does not run.",
    )


refused_when_traced(_refuse, "the last reload failed half-way, the weights are stale: reload the whole model")
