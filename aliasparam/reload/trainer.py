"""What a trainer says of its own tensors: their digest, and the delta between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .delta import PIECE
from .delta_writer import DeltaWriter, check_same
from .live import Live
from .live_digest import digest_of_tensors as digest_of_tensors


def diff_tensors(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], out: str | Path, version: int, base_version: int, **options: Any
) -> int:
    """Publish the delta that makes ``new`` of ``old`` as the folder ``out``; how many tensors changed.

    Args:
        old, new: the same names, dtypes and shapes, of any device.
        options: :class:`~aliasparam.reload.delta_writer.DeltaWriter`'s.

    Raises:
        DeltaError: other names, dtypes or shapes (then a full version is what to publish), or as ``DeltaWriter``.
    """
    specs = ({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (old, new))
    check_same(*zip(("the old step", "the new step"), specs, strict=True))
    with DeltaWriter(out, version, base_version, **options) as writer:
        return sum(writer.add(name, tensor.nbytes, _pairs(old[name], tensor)) for name, tensor in new.items())


def _pairs(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    was, now = Live(old), Live(new)
    for _, box in now.pieces(PIECE):
        yield was.bytes(box).cpu(), now.bytes(box).cpu()
