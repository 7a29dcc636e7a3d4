"""`checkpoint_digest`: what a live model holds, as the digests of the checkpoint files it equals. No weights are moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..module.adopt import adopt
from ..module.registry_of import registries
from ..module.verbs import checkpoint_names
from .digest import PositionalAdler32, whole_digest
from .hashers import folder_digests, hasher
from .held_file import memory_of
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


def checkpoint_digest(model: nn.Module, kind: str = "adler32") -> CheckpointDigest:
    """Digest every tensor of the state dict from live kernel bytes, in checkpoint coordinates; tied names come once.

    ``adler32`` is summed on the tensor's device (it is a sum over position and value, RFC 1950 section 8.2): on a GPU from
    kernel memory as it lies, elsewhere gathered in pieces of at most 8 MiB. The others pass the host piece by piece.

    Raises:
        DeltaError: an unknown kind, or its package is not installed.
        StateError: a tensor holds no weights, or changed while it was read.
        StaleKernelError: a reload of the model is open, or failed.
    """
    hasher(kind)
    for _, registry in registries(model):
        with torch.no_grad():
            adopt(registry)
    live = {name: Live(tensor) for name, tensor in checkpoint_names(model).items()}
    if kind == "adler32":
        sums = {name: adler32_of(tensor, _PIECE) for name, tensor in live.items()}
        PositionalAdler32.to_host(list(sums.values()))  # nothing waits for a device before
        digests = {name: total.hexdigest(live[name].nbytes) for name, total in sums.items()}
    else:
        digests = {name: _hashed(tensor, kind) for name, tensor in live.items()}
    return CheckpointDigest(kind, whole_digest((n, t.dtype, t.shape, digests[n]) for n, t in live.items()), digests)


def digest_of_folder(folder: SafetensorsFolder, kind: str = "adler32") -> CheckpointDigest:
    """The same of a checkpoint's files, in 8 MiB of memory.

    Raises:
        SourceError: a file cannot be read, or changed meanwhile.
    """
    digests = folder_digests(folder, kind)
    folder.check_unchanged()
    whole = whole_digest((n, e.dtype, e.shape, digests[n]) for n, e in folder.tensors.items())
    return CheckpointDigest(kind, whole, digests)


def adler32_of(live: Live, max_bytes: int) -> PositionalAdler32:
    """The sums of a whole tensor."""
    sums = PositionalAdler32()
    in_place = live.positional_sums()
    if in_place is not None:
        sums.add_sums(live.nbytes, in_place)
        return sums
    for start, piece in live.runs(max_bytes):
        sums.add_run(piece, start)
    return sums


def _hashed(live: Live, kind: str) -> str:
    state = hasher(kind)
    for _, piece in live.runs(_PIECE):
        state.update(memory_of(piece.cpu()))
    return state.hexdigest()
