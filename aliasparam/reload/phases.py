"""The steps of a reload, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ..errors import ReloadError


class Phase(Enum):
    """COMMITTING: in its switch or commit, where hooks and derivations run. Only an abort may come between."""

    NEW = "not begun"
    OPEN = "open"
    PREPARED = "prepared"
    COMMITTING = "being committed"
    SWITCHED = "switched"
    ENDED = "ended"


def need(label: str, phase: Phase, wanted: Sequence[Phase], doing: str) -> None:
    """Raise ReloadError where a reload of the model ``label`` is in none of the ``wanted`` phases."""
    if phase in wanted:
        return
    raise ReloadError(
        f"cannot {doing}: this reload is {phase.value}",
        module=label,
        expected=f"a reload that is {' or '.join(one.value for one in wanted)}",
        found=phase.value,
        remedy="The order is begin, update, prepare, commit; or use it inside `with reload(model) as r:`.",
    )
