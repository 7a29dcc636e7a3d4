"""Digests of tensors in checkpoint coordinates, from bytes in any order and on any device: the checksums that delta folders use.

adler32 of bytes d_0 .. d_{n-1} (RFC 1950, section 8.2) is a = 1 + sum d_i, b = n + sum (n - i) d_i, both mod 65521: two sums
over (position, value). So it can be taken from kernel bytes wherever they lie, piece by piece, rank by rank, and corrected
for bytes that change without looking at the others.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from .errors import DeltaError
from .held_file import memory_of

_MOD = 65521
_PLAIN = Layout("n -> n")
#: Bytes looked at in one step: scratch is 16 times as much.
_PIECE = 1 << 20
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


def sums_of_run(flat: Tensor) -> Tensor:
    """int64 ``[2]`` on their device: the sums of contiguous bytes (uint8 ``[n]``), congruent mod 65521."""
    sums = _PLAIN.bind(flat.shape, torch.uint8).positional_sums(flat, ((0, flat.numel()),))
    if sums is not None:
        return sums
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _PIECE):
        wide = flat[first : first + _PIECE].to(torch.int64)
        places = torch.arange(first, first + wide.numel(), device=flat.device) % _MOD
        sums += torch.stack((wide.sum(), (wide * places).sum())) % _MOD  # at most 2**20 * 255 * 65520 < 2**45
    return sums


class PositionalAdler32:
    """The two sums of adler32, of those bytes that were added so far.

    Sums stay on the device of the values, and nothing waits for it before :meth:`hexdigest`.
    Every byte must be added exactly once; bytes that change are added once more, as ``add(new, start)`` after
    ``add(old, start, sign=-1)``, or by :meth:`change`.

    Attributes:
        count: bytes added less bytes taken away.
    """

    def __init__(self) -> None:
        self.count = 0
        self._host = (0, 0)
        self._sums: dict[torch.device, Tensor] = {}

    def add(self, values: Tensor, start: int, *, sign: int = 1) -> None:
        """Bytes ``values`` (uint8, any shape, contiguous in the checkpoint) from checkpoint byte ``start`` on."""
        flat = values.reshape(-1)
        if flat.device.type == "cpu":
            digest, nbytes = zlib.adler32(memory_of(flat)), flat.numel()
            plain = (digest & 0xFFFF) - 1
            weighted = nbytes + nbytes * plain - (digest >> 16) + start * plain
            self.merge_sums(sign * nbytes, (sign * plain, sign * weighted))
            return
        sums = sums_of_run(flat)
        sums[1].add_(sums[0], alpha=start % _MOD)
        self.add_sums(sign * flat.numel(), sign * sums)

    def change(self, old: Tensor, new: Tensor, at: Tensor) -> None:
        """Bytes ``old``, added before, became ``new`` (uint8 [n], n at most 2**20) at checkpoint bytes ``at`` (int64 [n])."""
        step = new.to(torch.int64) - old
        self.add_sums(0, torch.stack((step.sum(), (step * (at % _MOD)).sum())) % _MOD)

    def add_sums(self, count: int, sums: Tensor) -> None:
        """``count`` bytes whose sums (int64 ``[2]``: of the bytes, of position times byte, mod 65521) were taken on a device."""
        self.count += count
        now = self._sums.get(sums.device)
        self._sums[sums.device] = sums if now is None else (now + sums) % _MOD

    def merge_sums(self, count: int, sums: Sequence[int]) -> None:
        """The same of sums on the host: of other pieces, devices or ranks (a rank sends ``count`` and ``sums()``)."""
        self.count += count
        self._host = (self._host[0] + sums[0]) % _MOD, (self._host[1] + sums[1]) % _MOD

    def sums(self) -> tuple[int, int]:
        """(sum of the bytes, sum of position times byte), mod 65521. Waits for the devices."""
        self.to_host([self])
        return self._host

    def hexdigest(self, nbytes: int) -> str:
        """adler32 of the tensor of ``nbytes`` bytes, as eight hex digits (``f"{zlib.adler32(data):08x}"``).

        Raises:
            DeltaError: not as many bytes were added.
        """
        if self.count != nbytes:
            raise DeltaError("a digest of a part of a tensor", expected=f"{nbytes} bytes", found=f"{self.count} bytes")
        plain, weighted = self.sums()
        return f"{(nbytes + nbytes * plain - weighted) % _MOD << 16 | (1 + plain) % _MOD:08x}"

    @staticmethod
    def to_host(many: Sequence[PositionalAdler32]) -> None:
        """Bring the sums of all of them to the host, with one transfer from each device."""
        for device in {device for one in many for device in one._sums}:
            those = [one for one in many if device in one._sums]
            for one, pair in zip(those, torch.stack([one._sums.pop(device) for one in those]).tolist(), strict=True):
                one.merge_sums(0, pair)


class Hashed:
    """xxh3-128 or blake3, of bytes in order, on the host."""

    def __init__(self, package: str, name: str) -> None:
        self._state = getattr(optional(package), name)()

    def add(self, values: Tensor, start: int) -> None:
        """Bytes (uint8 [n]) from ``start`` on, where those before ended."""
        self._state.update(memory_of(values.cpu()))

    def hexdigest(self, nbytes: int) -> str:
        return str(self._state.hexdigest())


def new_digest(kind: str) -> PositionalAdler32 | Hashed:
    """
    Raises:
        DeltaError: an unknown format, or its package is not installed.
    """
    if kind not in FORMATS:
        raise DeltaError("unknown checksum_format", expected=" or ".join(FORMATS), found=repr(kind)[:80])
    return PositionalAdler32() if kind == "adler32" else Hashed(*_PACKAGES[kind])


def digest_of(flat: Tensor, kind: str) -> str:
    """Of all bytes of a tensor, uint8 [n]."""
    digest = new_digest(kind)
    digest.add(flat, 0)
    return digest.hexdigest(flat.numel())
