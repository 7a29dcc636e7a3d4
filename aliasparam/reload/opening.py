"""`reload`: open a session."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import ReloadError
from .observe import Hooks
from .policies import PolicyName
from .session import ReloadSession, Scope


def reload(
    model: nn.Module,
    *,
    scope: Scope = "all",
    policy: PolicyName = "write-through",
    source: str = "tensors",
    hooks: Hooks | None = None,
    drain_seconds: float = 30.0,
) -> ReloadSession:
    """A transaction that replaces weights of a serving model: ``with reload(model) as r: r.load(tensors)``.

    Args:
        model: any module tree; declared modules are processed at the end, other parameters and persistent buffers are
            copied in place.
        scope: "all": every tensor must arrive, element for element, exactly once. "partial": each tensor that is begun must.
            Dotted prefixes (``["model.layers.3"]``): every tensor under them must, and no other may.
        policy: "write-through": values are written as they come, nothing is kept; a failure leaves a refusal. "journal": the
            same, with the old bytes that change on the host (5 bytes for each, at most what is overwritten); an abort restores
            them. "staged": the new values wait on the host while the old weights serve, and are written by the commit;
            "staged-journal": both, so that a commit can be taken back too. Device scratch: at most 32 MiB for staged values
            and 32 MiB for a journal.
        source: where the values come from, for the log and metrics.
        hooks: called at the begin, before the new weights serve, and after an abort.
        drain_seconds: the longest that a write waits for forwards that other threads began before it.

    Raises (at the end of the block, or from the steps):
        ReloadError: missing, unexpected, duplicate or ill-fitting tensors; an unknown scope or policy; a forward that did not
            end in time.
    """
    if scope not in ("all", "partial") if isinstance(scope, str) else not isinstance(scope, Iterable):
        raise ReloadError(
            "unknown scope",
            module=type(model).__name__,
            expected="'all', 'partial', or dotted prefixes in a list",
            found=repr(scope),
            remedy="'all' is the default.",
        )
    return ReloadSession(model, scope, policy, source, hooks or Hooks(), drain_seconds)
