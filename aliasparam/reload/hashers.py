"""The checksums that delta folders use, over bytes in checkpoint order."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

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


def folder_digest(folder: SafetensorsFolder, name: str, checksum_format: str, buffer: Tensor) -> str:
    """Digest of one tensor's bytes as its file has them, read by way of ``buffer`` (uint8 [n])."""
    state, nbytes = hasher(checksum_format), folder.entry(name).nbytes
    for start in range(0, nbytes, buffer.numel()):
        piece = buffer[: min(buffer.numel(), nbytes - start)]
        folder.raw(name, start, piece)
        state.update(memory_of(piece))
    return state.hexdigest()


def folder_digests(folder: SafetensorsFolder, checksum_format: str) -> dict[str, str]:
    """Digest of every tensor of a folder, in 8 MiB of memory."""
    buffer = torch.empty(8 << 20, dtype=torch.uint8)
    return {name: folder_digest(folder, name, checksum_format, buffer) for name in folder.tensors}
