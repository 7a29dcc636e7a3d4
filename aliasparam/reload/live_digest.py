"""`checkpoint_digest`: what a live model holds, as the digests of the checkpoint files it equals. No weights are moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..host import host_bytes
from ..layout.bound import flat_bytes
from ..module.adopt import adopt
from ..module.registry import registries
from ..module.verbs import checkpoint_names
from ..spec import no_values
from .digest import Hashed, PositionalAdler32, new_digest
from .header import DTYPES
from .live import Live
from .sources import SafetensorsFolder

#: Bytes of a tensor that are gathered at once.
_PIECE = 8 << 20


@dataclass(frozen=True)
class CheckpointDigest:
    """Equal for two models, or a model and a folder, that hold the same bytes under the same names.

    Attributes:
        kind: "adler32", "xxh3-128" or "blake3".
        whole: SHA-256 (hex) over name, dtype, shape and digest of every tensor.
        tensors: name -> hex digest of the tensor's bytes in checkpoint order.
    """

    kind: str
    whole: str
    tensors: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, kind: str, tensors: Iterable[tuple[str, torch.dtype, Sequence[int], str]]) -> Self:
        """From (name, dtype, shape, digest) of each tensor."""
        found = list(tensors)
        names = {dtype: name for name, dtype in DTYPES.items()}
        lines = sorted([name, names.get(dtype, str(dtype)), list(shape), digest] for name, dtype, shape, digest in found)
        whole = hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
        return cls(kind, whole, {name: digest for name, _, _, digest in found})


def checkpoint_digest(model: nn.Module, kind: str = "adler32") -> CheckpointDigest:
    """Digest every tensor of the state dict from live kernel bytes, in checkpoint coordinates; tied names come once.

    ``adler32`` is summed on the tensor's device (it is a sum over position and value, RFC 1950 section 8.2): on a GPU from
    kernel memory as it lies, elsewhere gathered in pieces of at most 8 MiB. The others pass the host piece by piece.

    Raises:
        DeltaError: an unknown kind, or its package is not installed.
        StateError: a tensor holds no weights, is not dense, or changed while it was read.
        StaleKernelError: a reload of the model is open, or failed.
    """
    new_digest(kind)  # before anything is read
    for _, registry in registries(model):
        if not registry.is_untouched:
            with torch.no_grad():
                adopt(registry)
    return digest_of_tensors(checkpoint_names(model), kind)


def digest_of_tensors(tensors: Mapping[str, Tensor], kind: str = "adler32") -> CheckpointDigest:
    """What :func:`~aliasparam.checkpoint_digest` gives of a model that holds these under the same names.

    Args:
        tensors: of any device and strides. adler32 is summed on their device, the others pass the host.

    Raises:
        DeltaError: an unknown kind, or its package is not installed.
        StateError: a tensor is not dense, or changed while it was read.
    """
    live = {name: _live_of(name, tensor) for name, tensor in tensors.items()}
    versions = {name: one.version for name, one in live.items()}
    digests = {name: _digest_of(one, kind) for name, one in live.items()}
    PositionalAdler32.to_host([digest for digest in digests.values() if isinstance(digest, PositionalAdler32)])
    for name, one in live.items():
        if one.version != versions[name]:
            raise StateError("the tensor changed while it was read", name=name, remedy="Read it again between two writes.")
    return CheckpointDigest.of(kind, ((n, t.dtype, t.shape, digests[n].hexdigest(t.nbytes)) for n, t in live.items()))


def _live_of(name: str, tensor: Tensor) -> Live:
    if (found := no_values(tensor)) is not None:
        raise StateError(
            "a tensor of this kind has no bytes to digest", name=name, expected="a dense tensor in memory", found=found
        )
    return Live(tensor)


def digest_of_folder(folder: SafetensorsFolder | str | Path, kind: str = "adler32") -> CheckpointDigest:
    """The same of a checkpoint's files, opened or by path, in 8 MiB of memory.

    Raises:
        DeltaError: as there.
        SourceError: a file cannot be read, or changed meanwhile.
    """
    with SafetensorsFolder(folder) if isinstance(folder, (str, Path)) else nullcontext(folder) as files:
        entries = list(files.tensors.values())
        digests, starts = [new_digest(kind) for _ in entries], [0] * len(entries)
        for index, _, values in files.stream([(entry.name, None) for entry in entries], host_bytes(_PIECE)):
            digests[index].add(flat_bytes(values), starts[index])
            starts[index] += values.nbytes
        files.check_unchanged()
    found = zip(entries, digests, strict=True)
    return CheckpointDigest.of(kind, ((e.name, e.dtype, e.shape, digest.hexdigest(e.nbytes)) for e, digest in found))


def _digest_of(live: Live, kind: str) -> PositionalAdler32 | Hashed:
    """Of a whole tensor; of adler32 on a GPU nothing has waited for it."""
    digest = new_digest(kind)
    if not isinstance(digest, PositionalAdler32) or not add_in_place(digest, live):
        add_pieces(digest, live)
    return digest


def add_in_place(sums: PositionalAdler32, live: Live) -> bool:
    """Add all bytes where they lie, if they can be summed there; whether they were."""
    found = live.positional_sums()
    if found is not None:
        sums.add_sums(live.nbytes, found)
    return found is not None


def add_pieces(digest: PositionalAdler32 | Hashed, live: Live) -> None:
    """Add all bytes, gathered in order."""
    for start, piece in live.pieces(_PIECE):
        digest.add(piece, start)
