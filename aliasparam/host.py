"""Memory on the host, whatever device is torch's default: engines load within ``torch.device("cuda")``, or build on meta."""

from __future__ import annotations

import torch
from torch import Tensor

#: Given as ``device=``, or entered around code that says no device.
HOST = torch.device("cpu")


def host_bytes(count: int, *, pinned: bool = False) -> Tensor:
    """uint8 [count], of any content."""
    return torch.empty(count, dtype=torch.uint8, device=HOST, pin_memory=pinned)
