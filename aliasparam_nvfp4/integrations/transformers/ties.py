"""Tensors that are one in the model. Where the files have both, transformers ties them if they are equal: so does a reload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from aliasparam.host import host_bytes
from aliasparam.layout.bound import flat_bytes
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.sources import SafetensorsFolder

from ...checkpoint import CheckpointError, CheckpointFolder

_PIECE = 8 << 20


def tied_names(model: Any, ours: Mapping[str, str]) -> dict[str, str]:
    """Name of each tied tensor (a head) -> name of what it is tied to (an embedding), as the files call them.

    Args:
        model: unwrapped.
        ours: name in the files -> name in the model.
    """
    stored = {mine: theirs for theirs, mine in ours.items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {stored.get(name, name): stored.get(source, source) for name, source in tied.items()}


def need_equal(tied: Mapping[str, str], folder: CheckpointFolder) -> None:
    """
    Raises:
        CheckpointError: the folder has others for what the model ties.
    """
    for name, source in tied.items():
        entry, other = folder.tensors.get(name), folder.tensors.get(source)
        if entry is None or other is None:
            continue
        if entry.spec != other.spec or not _same(folder.chunks(name), folder.chunks(source)):
            raise _untied(f"{folder.path}: {name}", source)


def equal_in_deltas(tied: Mapping[str, str], delta: DeltaFolder | Chain) -> Iterator[str]:
    """The tied names, after a look whether ``delta`` makes of each what it makes of the tensor that it is tied to.

    Raises:
        CheckpointError: it makes others. A delta on files without the tied name names what it is tied to alone.
    """
    full = delta.full
    for name, source in tied.items():
        has_both = full is not None and name in full.tensors
        if full is not None and has_both and not _same_in(full, name, source):
            raise _untied(f"{full.path}: {name}", source)
        for one in delta.deltas:
            named, other = one.checksums.get(name), one.checksums.get(source)
            if named != other and (has_both or named is not None):
                raise _untied(f"{one.path}: {name}", source)
        yield name


def _same_in(folder: SafetensorsFolder, name: str, source: str) -> bool:
    entry, other = folder.tensors[name], folder.tensors.get(source)
    if other is None or (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return False
    buffers = (host_bytes(_PIECE) for _ in range(2))
    return _same(*(folder.stream([(one, None)], buffer) for one, buffer in zip((name, source), buffers, strict=True)))


def _same(a: Iterable[tuple[Any, ...]], b: Iterable[tuple[Any, ...]]) -> bool:
    return all(torch.equal(flat_bytes(one), flat_bytes(other)) for (*_, one), (*_, other) in zip(a, b, strict=True))


def _untied(name: str, source: str) -> CheckpointError:
    return CheckpointError(
        "the files have another tensor for what the model ties",
        name=name,
        expected=f"the bytes of {source}: the model has one tensor for both",
        found="others",
        remedy="Load a model from this folder: transformers does not tie them then.",
    )
