"""Filling a storage from outside: RDMA, CUDA IPC, or a collective straight into the raw buffer.

Such writes go past every operator, so the library must be told which bytes are going to change, and when they have.
"""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn

from ._parameter import _Aliased
from .errors import ReloadError


class Exposure:
    """Raw checkpoint-format memory that somebody outside may write. Made by :func:`expose_for_writing`.

    Attributes:
        memory: plain tensor over the exposed bytes, checkpoint format, same shape and dtype as the name (or its rows).
            Strided over its leading dims where experts are padded; contiguous otherwise.
        address: where it begins; it never changes.
    """

    def __init__(self, target: _Aliased, writer: str) -> None:
        self._storage = target._alias_storage
        self.memory: Tensor = target._alias_memory
        self.address: int = self.memory.data_ptr()
        with self._storage.lock:
            self._storage.expose(self.memory, writer)
        self._open = True

    def written(self, rows: slice | None = None) -> None:
        """The writer is done: ``rows`` of the exposed memory (default: all) are new checkpoint bytes, the others as before."""
        views = [self.memory if rows is None else self.memory[rows]]
        self._close()
        with self._storage.lock:
            self._storage.close_exposure(views)

    def abandon(self) -> None:
        """The writer failed: what was exposed holds rubbish, and refuses to be read until it is loaded again."""
        self._close()
        with self._storage.lock:
            self._storage.close_exposure([], failed=[self.memory])

    def _close(self) -> None:
        if not self._open:
            raise ReloadError(
                "this exposure is closed already",
                label=self._storage.label,
                expected="one written() or abandon()",
                found="a second one",
                remedy="Expose the name again.",
            )
        self._open = False

    def __enter__(self) -> Exposure:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open:
            self.written() if error is None else self.abandon()


def expose_for_writing(module: nn.Module, name: str, rows: slice | None = None, *, writer: str = "an outside writer") -> Exposure:
    """Hand out the raw memory of a checkpoint name (or of some of its rows), to be filled from outside.

    The bytes are brought to checkpoint format first. Until ``written()`` or ``abandon()`` is called (leaving a ``with`` block
    calls one of them) the tensor cannot be read, written or processed, and the module's forward refuses.

    Args:
        module: the module that has the parameter.
        name: checkpoint-format name, dotted below ``module``.
        rows: the rows that will be written; default all.
        writer: who writes, for messages.

    Raises:
        ReloadError: the name is not a declared checkpoint name.
        StateError: the name is exposed already, or only rows are asked for and the memory holds kernel bytes without an inverse.
    """
    owner, _, leaf = name.rpartition(".")
    holder = dict(module.named_modules()).get(owner)
    parameter = None if holder is None else holder._parameters.get(leaf)
    if not isinstance(parameter, _Aliased):
        raise ReloadError(
            "only declared checkpoint names can be exposed",
            module=type(module).__name__,
            name=name,
            expected="a declared Parameter, dotted below the module",
            found="no such module" if holder is None else "no such Parameter" if parameter is None else type(parameter).__name__,
            remedy="Declare it first, or write an undeclared Parameter directly.",
        )
    target = parameter if rows is None else parameter[rows]
    return Exposure(target, writer)
