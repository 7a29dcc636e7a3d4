"""The checksums that delta folders use, over bytes in checkpoint order."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .digest import PositionalAdler32
from .errors import DeltaError
from .held_file import memory_of
from .sources import SafetensorsFolder

#: Name in ``checksum_format`` -> hex digits of a digest.
FORMATS = {"adler32": 8, "xxh3-128": 32, "blake3": 64}
_PACKAGES = {"xxh3-128": ("xxhash", "xxh3_128"), "blake3": ("blake3", "blake3")}


def optional(package: str) -> Any:
    """A package of the extra ``delta``.

    Raises:
        DeltaError: not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DeltaError(f"{package} is not installed", remedy="pip install 'aliasparam[delta]'") from None


class Digest:
    """Of a tensor's bytes in order: adler32 on their device, the others on the host.

    Attributes:
        sums: of adler32, which may be added to in any order; None for the others.

    Raises:
        DeltaError: an unknown format, or its package is not installed.
    """

    def __init__(self, kind: str) -> None:
        if kind not in FORMATS:
            raise DeltaError("unknown checksum_format", expected=" or ".join(FORMATS), found=repr(kind)[:80])
        self.sums = PositionalAdler32() if kind == "adler32" else None
        self._state: Any = None
        if kind in _PACKAGES:
            package, name = _PACKAGES[kind]
            self._state = getattr(optional(package), name)()

    def add(self, run: Tensor, start: int, *, sign: int = 1) -> None:
        """Bytes (uint8 [n]) from ``start`` on. ``sign``: of adler32; -1 takes them away again."""
        if self.sums is not None:
            self.sums.add(run, start, sign=sign)
        else:
            self._state.update(memory_of(run.cpu()))

    def hexdigest(self, nbytes: int) -> str:
        return str(self._state.hexdigest()) if self.sums is None else self.sums.hexdigest(nbytes)


def digest_of(flat: Tensor, kind: str) -> str:
    """Of all bytes of a tensor, uint8 [n]."""
    digest = Digest(kind)
    digest.add(flat, 0)
    return digest.hexdigest(flat.numel())


def folder_digests(folder: SafetensorsFolder, kind: str) -> dict[str, str]:
    """Digest of every tensor of a folder as its file has it, in 8 MiB of memory."""
    buffer, digests = torch.empty(8 << 20, dtype=torch.uint8), {}
    for name, entry in folder.tensors.items():
        digest = Digest(kind)
        for start in range(0, entry.nbytes, buffer.numel()):
            piece = buffer[: min(buffer.numel(), entry.nbytes - start)]
            folder.raw(name, start, piece)
            digest.add(piece, start)
        digests[name] = digest.hexdigest(entry.nbytes)
    return digests
