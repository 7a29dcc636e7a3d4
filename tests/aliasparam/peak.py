"""Peak of live tensor memory during a call: CUDA's allocator where there is one, else counted per operator."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):
    """Adds up storages that appear while it is active, and takes them off when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            self._known.add(Tensor.untyped_storage(tensor)._cdata)
        self._known |= {arg._cdata for arg in args if isinstance(arg, torch.UntypedStorage)}  # set_(storage) allocates nothing
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            storage = Tensor.untyped_storage(tensor)
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def peak_bytes(do: Callable[[], Any], device: torch.device) -> int:
    """Bytes above what was allocated before, at the highest point."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        do()
        return torch.cuda.max_memory_allocated() - before
    with _Counting() as counting:
        do()
    return counting.peak
