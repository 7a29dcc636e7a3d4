"""The tensors of a folder with deltas applied, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.errors import DeltaError
from aliasparam.reload.hashers import hasher
from aliasparam.reload.held_file import memory_of
from aliasparam.reload.sources import SafetensorsFolder


class PatchedFolder:
    """A base checkpoint and deltas on it, held open; a context.

    Where an engine divides tensors among ranks none can check a tensor's digest, so a delta is applied to the files' tensors on
    their way through the loaders, and not inside kernel bytes.

    Raises:
        SourceError, DeltaError: a folder that is none, deltas that do not follow each other, or that name what the base lacks.
    """

    def __init__(self, base: str | Path, deltas: Sequence[str | Path] = ()) -> None:
        self.base = SafetensorsFolder(base)
        self.deltas: list[DeltaFolder] = []
        try:
            for path in deltas:
                self.deltas.append(DeltaFolder(path))
            self._need_order()
        except BaseException:
            self.close()
            raise

    def _need_order(self) -> None:
        for before, delta in zip([None, *self.deltas], self.deltas, strict=False):
            if before is not None and delta.base_version != before.version:
                found, expected = f"one on {delta.base_version}", f"a delta on version {before.version}"
                raise DeltaError("the delta applies to another version", name=str(delta.path), expected=expected, found=found)
            if unknown := sorted(set(delta.checksums) - set(self.base.tensors)):
                raise DeltaError(
                    "the delta names tensors that the base lacks", name=str(delta.path), found=", ".join(unknown[:5])
                )

    def verify(self) -> None:
        """Apply every delta in scratch and hold what it gives against its checksums: so a wrong base is found before a write.

        Raises:
            DeltaError: they differ.
        """
        for name in {name for delta in self.deltas for name in delta.checksums}:
            self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            DeltaError: its bytes are not what the newest delta promised.
        """
        value = self.base.read(name)
        flat = value.reshape(-1).view(torch.uint8)
        touching = [delta for delta in self.deltas if name in delta.checksums]
        for delta in touching:
            for change in delta.pieces(name, flat.numel()):
                change.apply_(flat)
        if touching:
            digest = hasher(touching[-1].checksum_format)
            digest.update(memory_of(flat))
            touching[-1].check(name, str(digest.hexdigest()))
        return value

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all of them.

        Raises:
            SourceError: a file changed since it was opened; after the last tensor.
        """
        for name in self.base.tensors:
            yield name, self.read(name)
        self.base.check_unchanged()
        for delta in self.deltas:
            delta.check_unchanged()

    def close(self) -> None:
        self.base.close()
        for delta in self.deltas:
            delta.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
