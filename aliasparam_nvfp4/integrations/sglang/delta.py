"""Published deltas (docs/reload.md) applied inside kernel bytes, with no copy of the checkpoint on the host; on several ranks, to
the tensors of the folder that was loaded first.

``update_weights_from_disk`` of ``SOURCE/weight_v000007``, a folder whose index says ``delta_encoding``, applies the chain of
deltas from the version that serves, or from the newest full version on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aliasparam import TensorSpec
from aliasparam.reload import ReloadSession, prepare_delta
from aliasparam.reload.delta_folder import Chain
from aliasparam.reload.delta_held import Places
from aliasparam.storage.coverage import Box

from ...checkpoint import CheckpointError
from ...checkpoint.quant_config import read_json
from ...quantize.block_scales import finite_after
from ..patched import PatchedFolder
from .loaders import written_to
from .served import served

Parts = Mapping[str, list[tuple[str, Box]]]


def is_delta(path: str) -> bool:
    """Whether the folder is a version that is a delta."""
    try:
        index = read_json(Path(path) / "model.safetensors.index.json")
    except CheckpointError:
        return False
    return "delta_encoding" in (index.get("metadata") or {})


def full_version(path: str, serving: int) -> str | None:
    """The newest full version on the way from ``serving`` to this delta, or None where deltas lead there.

    Raises:
        DeltaError: no chain leads there.
        SourceError: a version is missing or malformed.
    """
    with _chain(path, serving) as chain:
        return None if chain.full is None else str(chain.full.path)


def prepare(model: Any, path: str, stack: ExitStack) -> ReloadSession:
    """A prepared session that brings a model of one rank to the version at ``path``, every checksum verified.

    Raises:
        DeltaError: wrong version or checksums, a malformed delta, or tensors that this rank does not hold whole.
        ScaleError: block scales that are NaN.
    """
    chain = stack.enter_context(_chain(path, served(model).version))
    places = Places(inside=parts_of(model, served(model).tensors))
    return prepare_delta(model, chain, serving=served(model).version, names=places, check=finite_after(model))


def patched(model: Any, path: str, base: str, stack: ExitStack) -> PatchedFolder:
    """For several ranks: the tensors of the version at ``path``, every checksum verified. ``base``: the folder that was loaded.

    Raises:
        DeltaError: as :func:`prepare`.
        SourceError: ``base`` is no folder of safetensors.
    """
    chain = stack.enter_context(Chain(Path(path).parent, served(model).base, version_of(path)))
    folder = stack.enter_context(PatchedFolder(base, [delta.path for delta in chain.deltas]))
    folder.verify()
    return folder


def version_of(path: str) -> int:
    return int(Path(path).name.rpartition("_v")[2])


def _chain(path: str, serving: int) -> Chain:
    return Chain(Path(path).parent, serving, version_of(path))


def parts_of(model: Any, tensors: Mapping[str, TensorSpec]) -> Parts:
    """Name in the checkpoint -> (the model's tensor, rectangle of it) wherever it lies whole.

    The model's own ``load_weights`` is run with tensors without memory, on stand-ins (aliasparam/reload/loading.py)."""
    rehearsal = _Rehearsal(tensors)
    with written_to(model, rehearsal.write), torch.no_grad():
        model.load_weights(iter(rehearsal))
    return rehearsal.parts


class _Rehearsal:
    """Tensors as the checkpoint has them, and where a loader put them. Single values are real: loaders ask for their number."""

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        self.parts: dict[str, list[tuple[str, Box]]] = {}
        self._tensors = tensors
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []
        self._now = ""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, spec in self._tensors.items():
            device = "cpu" if spec.numel == 1 else "meta"
            tensor = torch.ones(spec.shape, device=device).to(spec.dtype)
            self._names[tensor.untyped_storage()._cdata], self._now = name, name
            self._held.append(tensor)
            yield name, tensor

    def write(self, label: str, box: Box, value: Tensor) -> None:
        name = self._now if value.numel() == 1 else self._names.get(value.untyped_storage()._cdata)
        if name is not None and value.numel() == self._tensors[name].numel:
            self.parts.setdefault(name, []).append((label, box))
