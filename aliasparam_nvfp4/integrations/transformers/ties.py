"""Tensors that are one in the model. Where the files have both, transformers ties them if they are equal: so does a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aliasparam import TensorSpec
from aliasparam.layout.boxes import Box, tiles, whole
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.sources import SafetensorsFolder

from ...checkpoint import CheckpointError, CheckpointFolder

_PIECE = 4 << 20  # elements


def tied_names(model: Any, ours: Mapping[str, str]) -> dict[str, str]:
    """Name of each tied tensor (a head) -> name of what it is tied to (an embedding), as the files call them.

    Args:
        model: unwrapped.
        ours: name in the files -> name in the model.
    """
    stored = {mine: theirs for theirs, mine in ours.items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {stored.get(name, name): stored.get(source, source) for name, source in tied.items()}


def need_equal(tied: Mapping[str, str], folder: CheckpointFolder, specs: Mapping[str, TensorSpec]) -> None:
    """
    Args:
        tied: from :func:`tied_names`.
        folder: opened.
        specs: the model's tensors, as the files call them.

    Raises:
        CheckpointError: the folder has others for what the model ties.
    """

    def read(name: str, box: Box) -> Tensor:
        return folder.read(name, *(slice(*side) for side in box))

    for name, source in tied.items():
        shapes = [folder.tensors[one].shape for one in (name, source) if one in folder.tensors]
        if len(shapes) == 2 and not _same(read, name, source, shapes, specs[source].dtype):
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
    shapes = [folder.tensors[one].shape for one in (name, source) if one in folder.tensors]
    return len(shapes) == 2 and _same(folder.read, name, source, shapes, folder.tensors[source].dtype)


def _same(
    read: Callable[[str, Box], Tensor], name: str, source: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype
) -> bool:
    """As transformers compares them: both in the dtype in which the model holds them."""
    boxes = tiles(whole(shapes[0]), _PIECE)
    return shapes[0] == shapes[1] and all(torch.equal(read(name, box).to(dtype), read(source, box).to(dtype)) for box in boxes)


def _untied(name: str, source: str) -> CheckpointError:
    return CheckpointError(
        "the files have another tensor for what the model ties",
        name=name,
        expected=f"the values of {source}: the model has one tensor for both",
        found="others",
        remedy="Load a model from this folder: transformers does not tie them then.",
    )
