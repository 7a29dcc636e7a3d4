"""Delta folders as trainers publish them: ``SOURCE/weight_v{N:06d}/``, each a full checkpoint or a delta against another version.

A delta is known by ``delta_encoding`` in the index's metadata. Its tensors are zstd frames under the checkpoint's names
(unchanged tensors are absent), and ``__metadata__`` of each file holds the checksum of each tensor's *new* bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..spec import TensorSpec
from .delta import ENCODINGS, Overwrite, Xor
from .digest import FORMATS
from .errors import DeltaError
from .held_file import Opened
from .published import check_manifest, read_manifest, version_number, version_path
from .sources import SafetensorsFolder


class DeltaFolder(Opened):
    """One delta version, opened and checked.

    Attributes:
        version, base_version: it makes the one from the other, and applies to nothing else.
        encoding: "xor" or "overwrite".
        checksum_format: "adler32", "xxh3-128" or "blake3".
        checksums: tensor name -> hex digest of its new bytes, whole and in checkpoint order.
        full: None, as of a :class:`Chain` that begins with no full version.

    Raises:
        DeltaError: not a delta, or its metadata, a tensor or a checksum is not what the format says.
        SourceError: as :class:`SafetensorsFolder`.
    """

    full = None

    def __init__(self, folder: SafetensorsFolder | str | Path) -> None:
        super().__init__()
        self.folder = self.hold(folder if isinstance(folder, SafetensorsFolder) else SafetensorsFolder(folder))
        self.path = self.folder.path
        with self.opening():
            self.encoding = self._field("delta_encoding", ENCODINGS)
            self._field("compression_format", ("zstd",))
            self.checksum_format = self._field("checksum_format", FORMATS)
            self.version, self.base_version = self._version("version"), self._version("base_version")
            if self.base_version >= self.version:
                raise self._wrong("base_version", f"a version before {self.version}", self.base_version)
            self.checksums: Mapping[str, str] = {name: self._checksum(name) for name in self.folder.tensors}

    @property
    def deltas(self) -> list[DeltaFolder]:
        """Itself: a chain of one."""
        return [self]

    def changes(self, name: str, spec: TensorSpec) -> Xor | Overwrite:
        """What it changes in one tensor."""
        return ENCODINGS[self.encoding](self.folder.entry(name), spec, f"{self.path}: {name}")

    def check(self, name: str, digest: str) -> None:
        """
        Raises:
            DeltaError: ``digest`` (of the tensor with the delta applied) is not what was promised.
        """
        if digest.lower() != self.checksums[name]:
            raise DeltaError(
                f"the checksum of the new bytes differs ({self.checksum_format})",
                name=f"{self.path}: {name}",
                expected=self.checksums[name],
                found=digest,
                remedy=f"The weights are not version {self.base_version}, or of another dtype, or the delta is damaged.",
            )

    def _field(self, key: str, known: Iterable[str]) -> str:
        found = self.folder.index_metadata.get(key)
        if found not in list(known):
            raise self._wrong(key, " or ".join(known), found)
        return str(found)

    def _version(self, key: str) -> int:
        found = self.folder.index_metadata.get(key)
        if (number := version_number(found)) is None:
            raise self._wrong(key, "a version as digits", found)
        return number

    def _checksum(self, name: str) -> str:
        entry = self.folder.tensors[name]
        if entry.dtype not in (torch.uint8, torch.int8) or len(entry.shape) != 1:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise DeltaError("no compressed delta", name=f"{self.path}: {name}", expected="bytes, uint8 [n]", found=found)
        checksum = self.folder.metadata[entry.file.path.name].get(name)
        digits = FORMATS[self.checksum_format]
        if checksum is None or not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", checksum):
            raise DeltaError(
                "no checksum of the tensor's new bytes",
                name=f"{entry.file.path}: {name}",
                expected=f"{digits} hex digits in __metadata__ ({self.checksum_format})",
                found=repr(checksum)[:80],
            )
        return checksum.lower()

    def _wrong(self, key: str, expected: str, found: object) -> DeltaError:
        return DeltaError(f"{key} in the index is wrong", name=str(self.path), expected=expected, found=repr(found)[:80])


def open_version(source: str | Path, version: int) -> SafetensorsFolder | DeltaFolder:
    """Version ``version`` of a source of versions: a full checkpoint or a delta.

    Raises:
        DeltaError: its own metadata or its manifest names another version, or is of another protocol.
        SourceError: there is none, or it is malformed.
    """
    path = version_path(source, version)
    manifest = read_manifest(path)
    folder = SafetensorsFolder(path)
    with folder.opening():
        found = DeltaFolder(folder) if "delta_encoding" in folder.index_metadata else folder
        if isinstance(found, DeltaFolder) and found.version != version:
            raise DeltaError("the folder holds another version", name=str(path), expected=str(version), found=str(found.version))
        if manifest is not None:
            check_manifest(manifest, version, folder)
    return found


class Chain(Opened):
    """What takes a receiver from the version it has to another: the newest full version on the way if there is one, then deltas.

    All folders are opened at once and held until :meth:`close`, so that what was planned is what is read.

    Args:
        source: the folder of the versions, in any layout of published.py.
        applied: the version that serves now (0: the engine's own base checkpoint).
        target: the version to come to.

    Attributes:
        full: a whole checkpoint to start from, or None: the deltas apply to ``applied``.
        deltas: in the order in which they apply.
        version: the target.

    Raises:
        DeltaError: the target is older than ``applied``, or no chain leads to it.
        SourceError: a version is missing or malformed.
    """

    def __init__(self, source: str | Path, applied: int, target: int) -> None:
        super().__init__()
        self.full: SafetensorsFolder | None = None
        self.deltas: list[DeltaFolder] = []
        self.version = target
        if target < applied:
            raise DeltaError(
                "the version is older than what serves", name=str(source), expected=f">= {applied}", found=str(target)
            )
        with self.opening():
            while target != applied and self.full is None:
                if target == 0:
                    raise DeltaError(
                        "no chain of deltas leads from what serves to the target",
                        name=str(source),
                        expected=f"a delta on version {applied}, or a full version",
                        found="deltas on " + ", ".join(str(delta.base_version) for delta in self.deltas),
                        remedy="Load the base checkpoint (version 0) first.",
                    )
                found = self.hold(open_version(source, target))
                if isinstance(found, SafetensorsFolder):
                    self.full = found
                else:
                    self.deltas.insert(0, found)
                    target = found.base_version


def need_order(deltas: Iterable[DeltaFolder], serving: int | None) -> None:
    """
    Raises:
        DeltaError: the first does not apply to version ``serving`` (None: nobody knows it), or one not to the one before it.
    """
    for delta in deltas:
        if serving is not None and delta.base_version != serving:
            raise DeltaError(
                "the delta applies to another version",
                name=str(delta.path),
                expected=f"a delta on version {serving}, which serves or comes before",
                found=f"one on version {delta.base_version}",
                remedy="Apply the chain of deltas in order, or start from a full version.",
            )
        serving = delta.version
