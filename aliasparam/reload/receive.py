"""Taking what other code writes to declared names for updates of a session.

Engines have loaders of their own, which know how the files' tensors are divided and fused, and write ``param.data`` and slices of
it. While a :class:`Receiver` is open such a write changes nothing by itself: it arrives in the session as a rectangle of its
tensor, is checked, counted, and kept or written as the session's policy says.
"""

from __future__ import annotations

import threading
from types import TracebackType

from torch import Tensor

from ..errors import ReloadError
from ..storage.coverage import Box
from ..storage.delivery import deliver_no_more, deliver_to
from ..storage.storage import AliasedStorage
from ..tensors.faces import _Aliased
from .session import ReloadSession


class Receiver:
    """Open from its making until :meth:`close`; a context. The session must have begun.

    Args:
        session: gets an update for every write, whose name is that of the storage's own tensor. It may be of fewer tensors than
            are declared: what it does not know is written as ever.

    Attributes:
        begun: the names that were written.
        names: those that can be.

    Raises:
        ReloadError: a storage that is shown as several names, none of which is the whole; another receiver has one.
    """

    def __init__(self, session: ReloadSession) -> None:
        self.session = session
        self.begun: set[str] = set()
        self._names: dict[AliasedStorage, str] = {}
        self._busy = threading.local()
        self._lock = threading.RLock()
        for name, live in session.tensors.items():
            if isinstance(live, _Aliased):
                self._names[_whole(name, live)] = name
        self.names = frozenset(self._names.values())
        try:
            for storage in self._names:
                deliver_to(storage, self)
        except ReloadError:
            self.close()
            raise

    def receive(self, storage: AliasedStorage, box: Box, value: Tensor) -> bool:
        """Take a write over; False where it is the session's own."""
        if getattr(self._busy, "writing", False):
            return False
        with self._lock:
            self._busy.writing = True
            try:
                name = self._names[storage]
                self.begun.add(name)
                self.session.update(name, value.to(storage.spec.dtype), box=box)
            finally:
                self._busy.writing = False
        return True

    def close(self) -> None:
        """From now on writes are writes again. May be called again."""
        for storage in self._names:
            deliver_no_more(storage, self)

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _whole(name: str, live: _Aliased) -> AliasedStorage:
    storage = live._alias_storage
    if tuple(live.shape) != storage.spec.shape:
        raise ReloadError(
            "what is written cannot be told apart by names: this one is a part of a fused tensor",
            name=name,
            expected=f"a name of the whole {storage.spec}",
            found=f"{list(live.shape)}",
            remedy="Send the tensors to the session by name.",
        )
    return storage
