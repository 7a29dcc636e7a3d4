"""The checksums that delta folders use, over bytes in checkpoint order."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .digest import PositionalAdler32
from .errors import DeltaError
from .held_file import memory_of
from .sources import SafetensorsFolder


class Hasher(Protocol):
    """Fed with bytes in order; ``hexdigest`` at the end."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any, /) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


#: Name in ``checksum_format`` -> (what makes a hasher, hex digits of its digest).
FORMATS: dict[str, tuple[Callable[[], Hasher], int]] = {
    "adler32": (_Adler32, 8),
    "xxh3-128": (lambda: optional("xxhash").xxh3_128(), 32),
    "blake3": (lambda: optional("blake3").blake3(), 64),
}


def optional(package: str) -> Any:
    """A package of the extra ``delta``.

    Raises:
        DeltaError: not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DeltaError(f"{package} is not installed", remedy="pip install 'aliasparam[delta]'") from None


def hasher(checksum_format: str) -> Hasher:
    """
    Raises:
        DeltaError: an unknown format, or its package is not installed.
    """
    if checksum_format not in FORMATS:
        raise DeltaError("unknown checksum_format", expected=" or ".join(FORMATS), found=repr(checksum_format)[:80])
    return FORMATS[checksum_format][0]()


class Digest:
    """Of a tensor's bytes in order: adler32 on their device, the others on the host.

    Attributes:
        sums: of adler32, which may be added to in any order; None for the others.
    """

    def __init__(self, kind: str) -> None:
        self._state = hasher(kind)
        self.sums = PositionalAdler32() if kind == "adler32" else None

    def add(self, run: Tensor, start: int) -> None:
        """Bytes (uint8 [n]) from ``start`` on."""
        if self.sums is not None:
            self.sums.add_run(run, start)
        else:
            self._state.update(memory_of(run.cpu()))

    def hexdigest(self, nbytes: int) -> str:
        return self._state.hexdigest() if self.sums is None else self.sums.hexdigest(nbytes)


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
