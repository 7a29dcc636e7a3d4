"""Who must know before the bytes of a storage change, and who changes them from outside."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol


class Listener(Protocol):
    """A registry that shows a storage's kernel name or derives from it."""

    @property
    def is_open(self) -> bool: ...
    def open(self) -> None: ...


class Listeners:
    """Held weakly; each once."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Listener]] = []

    def add(self, listener: Listener) -> None:
        self._references = [r for r in self._references if r() not in (None, listener)] + [weakref.ref(listener)]

    def __iter__(self) -> Iterator[Listener]:
        return iter([found for reference in self._references if (found := reference()) is not None])

    def open_all(self) -> None:
        """Each refuses from now on, until it is processed."""
        for reference in self._references:
            listener = reference()
            if listener is not None and not listener.is_open:
                listener.open()


class RawWriter(Protocol):
    """Who outside writes the raw bytes: an exposure in kernel order."""

    writer: str
