"""Builders of checkpoint folders, good and broken, byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

NAMES = {
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.uint8": "U8",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.int64": "I64",
}


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None, size: int | None = None) -> Path:
    """A safetensors file of this header (bytes, or what becomes JSON); ``length`` and ``size`` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text + data)
        if size is not None:
            file.truncate(size)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "U8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """What ``safetensors.torch.save_file`` writes, without it."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, tensor in tensors.items():
        raw_bytes = plain(tensor)
        header[name] = entry(list(tensor.shape), len(data), len(data) + len(raw_bytes), NAMES[str(tensor.dtype)])
        data += raw_bytes
    return raw(path, header, data)


def plain(tensor: Tensor) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def index(folder: Path, weight_map: Any, **fields: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **fields}))
    return folder
