"""Digests of checkpoint values: of a folder, and of a live model, which are equal where the model holds the folder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

#: How the name of a head ends.
_HEAD = ("lm_head.", "weight")


def model_digest(model: nn.Module, kind: str = "adler32") -> dict[str, Any]:
    """``{"digest": ..., "kind": kind, "tensors": {name: hex}}``, from live kernel bytes by pieces."""
    from aliasparam import checkpoint_digest

    return _shown(checkpoint_digest(model, kind))


def folder_digest(folder: Any, kind: str = "adler32", served: Collection[str] | None = None) -> dict[str, Any]:
    """The same of a folder: a path, or an opened :class:`~aliasparam_nvfp4.checkpoint.CheckpointFolder`.

    ``served``: names of the model that is compared with it. A head which it lacks, and which is in the folder what another of
    these names is, in that one's dtype, is one tensor with that in the model, and is left out.
    """
    from aliasparam.layout.bound import flat_bytes
    from aliasparam.reload import CheckpointDigest, digest_of_folder
    from aliasparam.reload.digest import digest_of
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(getattr(folder, "path", folder)) as opened:
        found = digest_of_folder(opened, kind)
        all_of_it = {name: (entry.dtype, entry.shape, found.tensors[name]) for name, entry in opened.tensors.items()}
        if served is None:
            return _shown(found)
        there = {all_of_it[name] for name in served if name in all_of_it}

        def is_there(name: str) -> bool:
            shape = all_of_it[name][1]
            dtypes = {dtype for dtype, other, _ in there if other == shape}
            held = ((dtype, shape, digest_of(flat_bytes(opened.read(name).to(dtype)), kind)) for dtype in dtypes)
            return all_of_it[name] in there or any(one in there for one in held)

        tied = {n for n in all_of_it.keys() - set(served) if n.rpartition("lm_head.")[1:] == _HEAD and is_there(n)}
    return _shown(CheckpointDigest.of(kind, ((name, *one) for name, one in all_of_it.items() if name not in tied)))


def _shown(found: Any) -> dict[str, Any]:
    return {"digest": f"sha256:{found.whole}", "kind": found.kind, "tensors": dict(found.tensors)}
