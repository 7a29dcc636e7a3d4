"""Writes that somebody takes for something else than a write: a reload session, while an engine's loaders run."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor

from ..errors import ReloadError
from .coverage import Box


class Receiver(Protocol):
    """Who takes them."""

    def receive(self, storage: Any, box: Box, value: Tensor) -> bool:
        """Take one over; False where it shall be a write after all."""


#: By storage, while there are any. Neither keeps the other alive.
_receivers: weakref.WeakKeyDictionary[Any, weakref.ref[Receiver]] = weakref.WeakKeyDictionary()


def deliver_to(storage: Any, receiver: Receiver) -> None:
    """Give ``receiver`` what is written to ``storage`` from now on.

    Raises:
        ReloadError: another one gets it.
    """
    if _receiver(storage) not in (None, receiver):
        raise ReloadError("another session receives what is written to this tensor", label=storage.label)
    _receivers[storage] = weakref.ref(receiver)


def deliver_no_more(storage: Any, receiver: Receiver) -> None:
    if storage in _receivers and _receiver(storage) in (None, receiver):
        del _receivers[storage]


def delivered(storage: Any, box: Box, value: Tensor) -> bool:
    """Whether a receiver took this write over. A look at an empty dict where nobody receives."""
    receiver = _receiver(storage) if _receivers else None
    return receiver is not None and receiver.receive(storage, box, value)


def _receiver(storage: Any) -> Receiver | None:
    reference = _receivers.get(storage)
    return None if reference is None else reference()
