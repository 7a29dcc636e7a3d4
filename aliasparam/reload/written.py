"""What a session has written, and what becomes of it. Apart from the session, so that an abandoned one can still be ended."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.coverage import Box
from ..tensors.faces import _Aliased
from .plain import PlainName
from .targets import Target


class Written:
    """The tensors that were begun: declared names, and plain ones behind their refusing twins."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._declared: dict[int, _Aliased] = {}
        self._plain: dict[int, tuple[PlainName, Target]] = {}
        self._ended = False

    @property
    def any(self) -> bool:
        """Whether a tensor was begun."""
        return bool(self._declared or self._plain)

    def write(self, target: Target, box: Box, value: Tensor) -> None:
        """Write ``value`` in place; from now on the tensor refuses."""
        self.begin(target)
        live = target.tensor
        part = live[tuple(slice(start, stop) for start, stop in box)] if box else live
        with torch.no_grad():
            part.copy_(value)

    def begin(self, target: Target) -> None:
        """The tensor is about to be written: it refuses from now on."""
        live = target.tensor
        if isinstance(live, _Aliased):
            self._declared[id(live)] = live
        elif id(live) not in self._plain:
            name = PlainName(target.label, live)
            self._plain[id(live)] = name, target
            for holder, key in target.places:
                dict.__setitem__(holder, key, name.refusing)

    def reopen(self) -> None:
        """What was processed refuses again, with its new weights in place."""
        for tensor in self._declared.values():
            with tensor._alias_storage.lock:
                tensor._alias_storage.tell()

    def commit(self, *, whole: bool) -> None:
        """Everything that was written may be read. ``whole``: what an earlier reload left refusing was written too."""
        for name, target in self._plain.values():
            for holder, key in target.places:
                if whole or holder.get(key) is name.refusing:
                    dict.__setitem__(holder, key, target.tensor)
        self._ended = True

    def spoil(self) -> None:
        """What was written is of no generation: it refuses until it is loaded whole. Plain twins stay where they are."""
        if self._ended:
            return
        for tensor in self._declared.values():
            tensor._alias_storage.invalidate("a reload failed after it had written this tensor")
        self._ended = True
