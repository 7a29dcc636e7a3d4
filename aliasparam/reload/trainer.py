"""What a trainer says of its own tensors: their digest, and the delta between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .delta import PIECE
from .delta_writer import DeltaWriter, check_same
from .digest import digest_of
from .live import flat_bytes
from .live_digest import CheckpointDigest


def digest_of_tensors(tensors: Mapping[str, Tensor], kind: str = "adler32") -> CheckpointDigest:
    """What :func:`~aliasparam.checkpoint_digest` gives of a model that holds these under the same names.

    Args:
        tensors: of any device and strides. adler32 is summed on their device, the others pass the host.

    Raises:
        DeltaError: an unknown kind, or its package is not installed.
    """
    digests = ((n, t.dtype, t.shape, digest_of(flat_bytes(t.detach()), kind)) for n, t in tensors.items())
    return CheckpointDigest.of(kind, digests)


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
    with torch.no_grad():
        before, after = flat_bytes(old.detach()), flat_bytes(new.detach())
        for start in range(0, after.numel(), PIECE):
            yield before[start : start + PIECE].cpu(), after[start : start + PIECE].cpu()
