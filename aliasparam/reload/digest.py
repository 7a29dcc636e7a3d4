"""Digests of tensors in checkpoint coordinates, from bytes in any order and on any device.

adler32 of bytes d_0 .. d_{n-1} (RFC 1950, section 8.2) is a = 1 + sum d_i, b = n + sum (n - i) d_i, both mod 65521: two sums
over (position, value). So it can be taken from kernel bytes wherever they lie, piece by piece, rank by rank, and corrected
for bytes that change without looking at the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..layout import Layout
from .errors import DeltaError
from .header import DTYPES

_MOD = 65521
_PLAIN = Layout("n -> n")
#: Bytes looked at in one step: scratch is 4 (a run) or 16 (scattered bytes) times as much.
_PIECE = 1 << 20
#: Bytes a row: the weighted sum of a row, 255 * (0 + .. + 255), is below 2**24, so float32 holds every partial sum exactly.
_ROW = 256


def sums_of_run(flat: Tensor) -> Tensor | None:
    """int64 ``[2]``: the sums of contiguous bytes (uint8 ``[n]``), congruent mod 65521; None where no kernel takes them."""
    return _PLAIN.bind(flat.shape, torch.uint8).positional_sums(flat, ((0, flat.numel()),))


class PositionalAdler32:
    """The two sums of adler32, of those bytes that were added so far.

    Sums stay on the device of the values, and nothing waits for it before :meth:`hexdigest`, :meth:`count` apart.
    Every byte must be added exactly once; a byte that changes is added once more as ``add(new, ...)`` after
    ``add(old, ..., sign=-1)``.

    Attributes:
        count: bytes added less bytes taken away.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[torch.device, Tensor] = {}

    @classmethod
    def of_digest(cls, digest: str, nbytes: int) -> PositionalAdler32:
        """The sums of a tensor of ``nbytes`` bytes whose adler32 (hex) is known, to correct for what changes in it."""
        value = int(digest, 16)
        plain = (value & 0xFFFF) - 1
        sums = cls()
        sums.count = nbytes
        sums._sums[torch.device("cpu")] = torch.tensor([plain % _MOD, (nbytes + nbytes * plain - (value >> 16)) % _MOD])
        return sums

    def add(self, values: Tensor, positions: Tensor, *, sign: int = 1) -> None:
        """Bytes ``values`` (uint8, any shape) at checkpoint byte ``positions`` (int64, as many, on the same device)."""
        self.count += sign * values.numel()
        flat, places = values.reshape(-1), positions.reshape(-1)
        for first in range(0, flat.numel(), _PIECE):
            wide = flat[first : first + _PIECE].to(torch.int64)
            # at most 2**20 * 255 * 65520 < 2**45
            self._take(wide.sum(), (wide * (places[first : first + _PIECE] % _MOD)).sum(), sign)

    def add_run(self, values: Tensor, start: int, *, sign: int = 1) -> None:
        """Bytes ``values`` (uint8, any shape, contiguous in the checkpoint) from checkpoint byte ``start`` on."""
        flat = values.reshape(-1)
        sums = sums_of_run(flat)
        if sums is not None:
            sums[1].add_(sums[0], alpha=start % _MOD)
            self.add_sums(sign * flat.numel(), sums if sign == 1 else -sums)
            return
        body = flat.numel() // _ROW * _ROW
        self.count += sign * body
        weights = torch.ones(_ROW, 2, device=flat.device)
        weights[:, 1] = torch.arange(_ROW, device=flat.device)
        for offset in range(0, body, _PIECE):
            rows = flat[offset : min(offset + _PIECE, body)].view(-1, _ROW)
            sums = (rows.to(torch.float32) @ weights).to(torch.int64)
            begins = (torch.arange(len(rows), device=flat.device) * _ROW + (start + offset) % _MOD) % _MOD
            self._take(sums[:, 0].sum(), (sums[:, 0] * begins + sums[:, 1]).sum(), sign)
        if body < flat.numel():
            rest = torch.arange(body, flat.numel(), device=flat.device)
            self.add(flat[body:], rest + start, sign=sign)

    def add_sums(self, count: int, sums: Tensor) -> None:
        """``count`` bytes whose sums (int64 ``[2]``: of the bytes, of position times byte, mod 65521) were taken on a device."""
        self.count += count
        now = self._sums.get(sums.device)
        self._sums[sums.device] = sums if now is None else (now + sums) % _MOD

    def merge(self, other: PositionalAdler32) -> None:
        """Take in what ``other`` has added: other pieces, devices or ranks (a rank sends ``count`` and ``sums()``)."""
        self.merge_sums(other.count, other.sums())

    def merge_sums(self, count: int, sums: tuple[int, int]) -> None:
        self.count += count
        host = torch.device("cpu")
        self._sums[host] = (self._sums.get(host, torch.zeros(2, dtype=torch.int64)) + torch.tensor(sums)) % _MOD

    def sums(self) -> tuple[int, int]:
        """(sum of the bytes, sum of position times byte), mod 65521. Waits for the devices."""
        pairs = [value.tolist() for value in self._sums.values()]
        return sum(pair[0] for pair in pairs) % _MOD, sum(pair[1] for pair in pairs) % _MOD

    def hexdigest(self, nbytes: int) -> str:
        """adler32 of the tensor of ``nbytes`` bytes, as eight hex digits (``f"{zlib.adler32(data):08x}"``).

        Raises:
            DeltaError: not as many bytes were added.
        """
        if self.count != nbytes:
            raise DeltaError("a digest of a part of a tensor", expected=f"{nbytes} bytes", found=f"{self.count} bytes")
        plain, weighted = self.sums()
        return f"{(nbytes + nbytes * plain - weighted) % _MOD << 16 | (1 + plain) % _MOD:08x}"

    def _take(self, plain: Tensor, weighted: Tensor, sign: int) -> None:
        self.add_sums(0, torch.stack((plain, weighted)) * sign)

    @staticmethod
    def to_host(many: Sequence[PositionalAdler32]) -> None:
        """Bring the sums of all of them to the host, with one transfer from each device."""
        for device in {device for one in many for device in one._sums if device.type != "cpu"}:
            those = [one for one in many if device in one._sums]
            for one, pair in zip(those, torch.stack([one._sums.pop(device) for one in those]).tolist(), strict=True):
                one.merge_sums(0, pair)


def whole_digest(tensors: Iterable[tuple[str, torch.dtype, Sequence[int], str]]) -> str:
    """One digest (SHA-256, hex) of a checkpoint from (name, dtype, shape, digest of its bytes) of each tensor, in any order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    lines = sorted([name, names.get(dtype, str(dtype)), list(shape), digest] for name, dtype, shape, digest in tensors)
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
