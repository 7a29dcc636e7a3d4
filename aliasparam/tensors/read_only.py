"""A copy where a plain tensor would have given itself: it can be read, and refuses to be written.

``parameter.contiguous().fill_(0)`` writes a plain Parameter. Where the memory is in kernel order ``contiguous()`` must be
a gathered copy, and a write into it would be lost without a word. So the copy is a view of a storage that nobody may write.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..errors import StateError
from ..spec import TensorSpec
from ..storage.states import State
from ..storage.storage import AliasedStorage


class ReadOnlyStorage(AliasedStorage):
    """``values``, dense in memory of their own, flat; ``label`` is of the name that they are of."""

    def __init__(self, label: str, values: Tensor) -> None:
        memory = values.as_strided((values.numel(),), (1,)).view(torch.uint8)
        super().__init__(label, TensorSpec((values.numel(),), values.dtype), None, memory, State.LOADED)

    def need_writable(self) -> NoReturn:
        raise StateError(
            "contiguous() of a name in kernel format is a gathered copy: a write into it would be lost",
            label=self.label,
            expected="a write through the name itself",
            found="one into the copy",
            remedy="Write the parameter, its .data or a slice of them: they are contiguous in shape and strides.",
        )
