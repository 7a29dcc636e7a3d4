"""Digests of checkpoint values: of a folder, and of a live model, which are equal where the model holds the folder."""

from __future__ import annotations

from typing import Any

from torch import nn


def model_digest(model: nn.Module, kind: str = "adler32") -> dict[str, Any]:
    """``{"digest": ..., "kind": kind, "tensors": {name: hex}}``, from live kernel bytes by pieces."""
    from aliasparam import checkpoint_digest

    return _shown(checkpoint_digest(model, kind))


def folder_digest(folder: Any, kind: str = "adler32") -> dict[str, Any]:
    """The same of a folder: a path, or an opened :class:`~aliasparam_nvfp4.checkpoint.CheckpointFolder`."""
    from aliasparam.reload import digest_of_folder
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(getattr(folder, "path", folder)) as opened:
        return _shown(digest_of_folder(opened, kind))


def _shown(found: Any) -> dict[str, Any]:
    return {"digest": f"sha256:{found.whole}", "kind": found.kind, "tensors": dict(found.tensors)}
