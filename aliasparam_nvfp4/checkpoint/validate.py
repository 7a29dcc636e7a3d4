"""Holding a folder's headers against what a model needs, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from aliasparam import TensorSpec

from .errors import CheckpointError
from .folder import CheckpointFolder

_SHOWN = 5


def fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether a stored tensor can be what is wanted: one value may be a scalar or a vector of one."""
    one = all(math.prod(spec.shape) == 1 and len(spec.shape) <= 1 for spec in (found, wanted))
    return found == wanted or (one and found.dtype == wanted.dtype)


def check_tensors(folder: CheckpointFolder, expected: Mapping[str, TensorSpec], *, ignore: Collection[str] = ()) -> None:
    """Raise one CheckpointError which lists all that is missing, unexpected, or of another shape or dtype.

    Args:
        folder: an opened checkpoint.
        expected: every tensor the model takes.
        ignore: names which the folder may hold although the model does not take them (tied weights).
    """
    have = folder.tensors
    missing = [f"missing: {n} ({s})" for n, s in expected.items() if n not in have]
    extra = [f"unexpected: {n} ({have[n].spec}) in {have[n].file.name}" for n in have if n not in expected and n not in ignore]
    unfit = [
        f"{have[n].file.name}: {n}: expected {s}, found {have[n].spec}"
        for n, s in expected.items()
        if n in have and not fits(have[n].spec, s)
    ]
    if not (missing or extra or unfit):
        return
    lines = [line for group in (missing, extra, unfit) for line in _shortened(group)]
    raise CheckpointError(
        "the checkpoint does not fit the model; nothing was loaded",
        name=str(folder.path),
        expected=f"{len(expected)} tensors",
        found="\n            ".join(lines),
        remedy="Export the checkpoint again from the same architecture, or load the right folder.",
    )


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"… and {more} more like this"]
