"""Digests of checkpoint values: of a folder, and of a live model, which are equal where the model holds the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn, uint8

_PIECE = 16 << 20


def model_digest(model: nn.Module) -> dict[str, Any]:
    """``{"digest": ..., "tensors": {name: sha256}}`` of the model's checkpoint state dict, one tensor at a time."""
    from aliasparam import iterate_checkpoint

    return digest(iterate_checkpoint(model))


def folder_digest(folder: Any) -> dict[str, Any]:
    """The same of an opened :class:`~aliasparam_nvfp4.checkpoint.CheckpointFolder`."""
    return digest((name, folder.read(name)) for name in folder.tensors)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """sha256 of every tensor (dtype, shape and bytes), and of all of them in the order of their names."""
    found = {name: _one(tensor) for name, tensor in tensors}
    whole = hashlib.sha256("".join(f"{name} {found[name]}\n" for name in sorted(found)).encode())
    return {"digest": f"sha256:{whole.hexdigest()}", "tensors": found}


def _one(tensor: Tensor) -> str:
    state = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(uint8)
    for begin in range(0, flat.numel(), _PIECE):
        state.update(flat[begin : begin + _PIECE].cpu().numpy().tobytes())
    return state.hexdigest()
