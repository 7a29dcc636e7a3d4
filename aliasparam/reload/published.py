"""Where a trainer's versions lie, and which is the newest one: slime's folders, and stitch's board.

| layout | a version | the newest |
|---|---|---|
| slime, SGLang, miles | ``SOURCE/weight_v000007/`` | the highest that is complete |
| slime under stitch | ``SOURCE/[RUN/]weight_v000007/`` | ``SOURCE/latest``: ``[RUN/]weight_v000007``, or ``000007`` |
| stitch's own | ``SOURCE/versions/weight_v000007/`` with a ``manifest.json`` | ``SOURCE/latest.json``: ``{"version": 7}`` |

From the receivers' code: SGLang's ``/pull_weights``; stitch's ``bulletin.py``, ``protocol.py`` and ``types.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from os.path import lexists
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DeltaError, SourceError
from .header import MAX_JSON_BYTES, parse_json
from .held_file import HeldFile
from .sources import SafetensorsFolder

_POINTER_BYTES = 4096
_PROTOCOL = 1
_COMPLETE = ("model.safetensors.index.json", "model.safetensors")


class Published(NamedTuple):
    """
    Attributes:
        folder: the source whose versions these are: what :class:`~aliasparam.reload.delta_folder.Chain` takes.
        version: the newest; 0 if there is none but the base checkpoint.
    """

    folder: Path
    version: int


def version_number(field: object) -> int | None:
    """What a trainer wrote as a version: zero-padded text; some write numbers. None where it is neither."""
    if isinstance(field, str) and re.fullmatch(r"[0-9]{1,18}", field):
        return int(field)
    return field if type(field) is int and field >= 0 else None


def version_path(source: str | Path, version: int) -> Path:
    nested = Path(source) / "versions"
    return (nested if nested.is_dir() else Path(source)) / f"weight_v{version:06d}"


def newest(source: str | Path) -> Published:
    """What the source's pointer says, or else the highest version that is complete (its index is written last).

    Raises:
        SourceError: the source cannot be listed, or its pointer cannot be read: then nobody knows which version is meant.
    """
    root = Path(source)
    if lexists(root / "latest.json"):
        fields = parse_json(_read(root / "latest.json", _POINTER_BYTES), root / "latest.json")
        version = fields.get("version")
        if fields.get("protocol_version", _PROTOCOL) != _PROTOCOL or type(version) is not int or version < 0:
            raise _no_pointer(root / "latest.json", repr(fields), "protocol_version 1 and a version")
        return Published(root, version)
    if lexists(root / "latest"):
        text = _read(root / "latest", _POINTER_BYTES).decode(errors="replace").strip()
        match = re.fullmatch(r"(?:((?:[\w-][\w.-]*/)*[\w-][\w.-]*)/)?(?:weight_v)?([0-9]{1,18})", text, re.ASCII)
        if match is None:
            raise _no_pointer(root / "latest", repr(text), "[RUN/]weight_v000007")
        return Published(root / match[1] if match[1] else root, int(match[2]))
    return Published(root, _highest(root))


def _highest(root: Path) -> int:
    versions = [0]
    try:
        for path in version_path(root, 0).parent.iterdir():
            match = re.fullmatch(r"weight_v([0-9]{6,18})", path.name)
            if match and any((path / name).exists() for name in _COMPLETE):
                versions.append(int(match[1]))
    except OSError as error:
        raise SourceError(f"the source cannot be listed: {error.strerror}", name=str(root)) from None
    return max(versions)


# -- manifests ---------------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """``manifest.json`` of a version, if it has one.

    Raises:
        DeltaError: of another protocol, whose deltas are encoded otherwise.
        SourceError: not JSON, or too long.
    """
    file = path / "manifest.json"
    if not lexists(file):
        return None
    fields = parse_json(_read(file, MAX_JSON_BYTES), file)
    if fields.get("protocol_version", _PROTOCOL) != _PROTOCOL:
        codec = fields.get("codec_profile")
        raise DeltaError(
            "the version is published in another protocol",
            name=str(file),
            expected=f"protocol_version {_PROTOCOL}: safetensors of zstd frames",
            found=f"{fields['protocol_version']!r}"[:80] + (f", codec {codec!r}"[:80] if codec else ""),
            remedy="Publish with xor or overwrite and zstd, or a full version.",
        )
    return fields


def check_manifest(manifest: Mapping[str, Any], version: int, folder: SafetensorsFolder) -> None:
    """That a manifest says what the files of its version say.

    Raises:
        DeltaError: another version, base, encoding or files; a file of another size.
    """
    for what, expected, found in _said(manifest, version, folder):
        if found != expected:
            where, text = f"{folder.path / 'manifest.json'}: {what}", str(expected)[:200]
            raise DeltaError("the manifest and its version disagree", name=where, expected=text, found=repr(found)[:80])


def _said(manifest: Mapping[str, Any], version: int, folder: SafetensorsFolder) -> Iterator[tuple[str, object, object]]:
    """(what the manifest says something of, what the files say, what it says)."""
    index, sizes = folder.index_metadata, {entry.file.path.name: entry.file.size for entry in folder.tensors.values()}
    yield "version", version, manifest.get("version")
    if (base := version_number(index.get("base_version"))) is not None:
        yield "base_version", base, manifest.get("base_version")
    for key in ("delta_encoding", "compression_format", "checksum_format"):
        if manifest.get(key) is not None:
            yield key, index.get(key), manifest[key]
    if named := manifest.get("transition_files"):
        yield "transition_files", sorted(sizes), sorted(set(map(str, named))) if isinstance(named, list) else named
    artifacts = manifest.get("artifacts") or []
    for artifact in artifacts if isinstance(artifacts, list) else [artifacts]:
        path = artifact.get("path") if isinstance(artifact, dict) else None
        if not isinstance(path, str):
            yield "artifacts", "objects with a path", [artifact]
        elif artifact.get("size_bytes") is not None and path in sizes:
            yield f"size_bytes of {path[:80]}", sizes[path], artifact["size_bytes"]


def _read(path: Path, limit: int) -> bytes:
    with closing(HeldFile(path, path.parent)) as file:
        return file.read_all(limit)


def _no_pointer(path: Path, found: str, expected: str) -> SourceError:
    return SourceError("the pointer to the newest version cannot be read", name=str(path), expected=expected, found=found[:80])
