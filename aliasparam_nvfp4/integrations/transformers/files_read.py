"""Which files of a folder transformers reads: experts, headers and reloads come from the same, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...checkpoint import CheckpointError, CheckpointFolder

_SINGLE = "model.safetensors"


def need_same_files(folder: CheckpointFolder, read: Iterable[str | Path] | None = None) -> None:
    """Raise CheckpointError where transformers reads others than :class:`CheckpointFolder`, whose files would be checked for it.

    Args:
        folder: opened.
        read: what ``from_pretrained`` was told to read; None for what it would choose.
    """
    ours, theirs = _files(folder), {Path(file).name for file in read or files_to_read(folder)}
    if ours and ours != theirs:
        raise CheckpointError(
            "transformers would read other files than those that describe this checkpoint",
            name=str(folder.path),
            expected=f"{_SINGLE}, or the files of model.safetensors.index.json",
            found=f"{_shown(theirs)} to be read, {_shown(ours)} described",
            remedy="Leave one checkpoint in the folder (an index of an older one may be left there), without variant=.",
        )


def files_to_read(folder: CheckpointFolder) -> list[Path]:
    """What ``from_pretrained`` chooses of a folder: model.safetensors before an index."""
    names = {_SINGLE} if (folder.path / _SINGLE).exists() else _files(folder)
    return [folder.path / name for name in sorted(names)]


def _files(folder: CheckpointFolder) -> set[str]:
    return {entry.file.name for entry in folder.tensors.values()}


def _shown(names: set[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
