"""Other processes: a name that is sent arrives as its values; a declared module or a storage is not sent."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.multiprocessing.reductions import reduce_tensor

from ..errors import AdoptionError


def reduce_for_process(tensor: Any) -> Any:
    # torch would move the memory to a shared segment; a name that is sent arrives as its values, in a plain tensor.
    return reduce_tensor(tensor._snapshot().detach())  # type: ignore[no-untyped-call]


def refuse_for_process(owner: Any) -> NoReturn:
    raise AdoptionError(
        "a declared module cannot be sent to another process: torch would move its memory to a shared segment",
        label=owner.label,
        expected="values, or a module that is not declared",
        found="a declared module",
        remedy="Send checkpoint_state_dict(module), or declare in the other process.",
    )
