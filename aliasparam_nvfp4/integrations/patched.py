"""The tensors of a folder with deltas applied, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from aliasparam.reload.delta_apply import changed
from aliasparam.reload.delta_folder import DeltaFolder, need_order
from aliasparam.reload.errors import DeltaError
from aliasparam.reload.held_file import Opened
from aliasparam.reload.sources import SafetensorsFolder


class PatchedFolder(Opened):
    """A base checkpoint and deltas on it, held open.

    Where an engine divides tensors among ranks none can check a tensor's digest, so a delta is applied to the files' tensors on
    their way through the loaders, and not inside kernel bytes.

    Raises:
        SourceError, DeltaError: no such folder, deltas that do not follow each other, or that name what the base lacks.
    """

    def __init__(self, base: str | Path, deltas: Sequence[str | Path] = ()) -> None:
        super().__init__()
        with self.opening():
            self.base = self.hold(SafetensorsFolder(base))
            self.deltas = [self.hold(DeltaFolder(path)) for path in deltas]
            need_order(self.deltas, None)
            self._need_names()

    def _need_names(self) -> None:
        for delta in self.deltas:
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
        return changed(name, self.base.read(name), self.deltas)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all of them.

        Raises:
            SourceError: a file changed since it was opened; after the last tensor.
        """
        for name in self.base.tensors:
            yield name, self.read(name)
        self.check_unchanged()
