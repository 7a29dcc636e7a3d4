"""The writes of one operator into declared names: all begin, then all end, or none is half done without a refusal (law 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._kernel_name import StaleName
from ._storage import AliasedStorage, Write


def write_one(func: Any, target: Any, rest: tuple[Any, ...], overwrites: bool, checks_first: bool = True) -> None:
    """``func(target, *rest)``, an operator that writes ``target`` alone and reads nothing aliased.

    Args:
        func: the operator.
        target: an aliased tensor.
        rest: the operator's other arguments, plain.
        overwrites: its result does not depend on what was there.
        checks_first: if it raises an Exception, it has written nothing.
    """
    storage, memory = target._alias_storage, target._alias_memory
    with storage.lock:
        if storage.holds_kernel_bytes:
            rest = tuple(apart(value, (storage,)) for value in rest)
        write = storage.before_write(memory, overwrites)
        try:
            func(memory, *rest)
            storage.after_write(memory, write)
        except BaseException as error:
            if checks_first and isinstance(error, Exception):
                storage.undo(write)
            else:
                storage.spoil(memory)
            raise


class Writes:
    """The writes of one operator to several views, as a context: leaving it ends them, or fails them.

    Args:
        tensors: the aliased tensors that are written. Their storages are locked by the caller.
        overwrites: the results do not depend on what was there.
        checks_first: if the operator raises an Exception on a single tensor, it has written nothing.
    """

    def __init__(self, tensors: Sequence[Any], overwrites: bool, *, checks_first: bool) -> None:
        self._tensors = tensors
        self._overwrites = overwrites
        self._checks_first = checks_first and len(tensors) == 1
        self._begun: list[tuple[AliasedStorage, Tensor, Write | None]] = []
        self._all_begun = False

    def begin(self) -> None:
        """Make what is written checkpoint-format memory. Everything that the operator reads was read by now."""
        for tensor in self._tensors:
            storage, memory = tensor._alias_storage, tensor._alias_memory
            self._begun.append((storage, memory, storage.before_write(memory, self._overwrites)))
        self._all_begun = True

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                for storage, memory, write in self._begun:
                    storage.after_write(memory, write)
            except BaseException:
                self._spoil()
                raise
        elif not self._all_begun or (self._checks_first and isinstance(error, Exception)):
            for storage, _, write in reversed(self._begun):
                storage.undo(write)
        else:
            self._spoil()

    def _spoil(self) -> None:
        for storage, memory, _ in self._begun:
            storage.spoil(memory)


def apart(value: Any, storages: Sequence[AliasedStorage]) -> Any:
    """``value``, or a copy of a plain tensor in it that lies in memory which is about to change format (a kernel name).

    Raises:
        StaleKernelError: a stale kernel name is in it; nothing has begun.
    """
    if isinstance(value, Tensor):
        if isinstance(value, StaleName):
            raise value.refusal()
        return value.clone() if any(_lies_in(value, storage) for storage in storages) else value
    if isinstance(value, (list, tuple)):
        return type(value)(apart(v, storages) for v in value)
    return value


def _lies_in(tensor: Tensor, storage: AliasedStorage) -> bool:
    return storage.holds_kernel_bytes and bool(torch._C._is_alias_of(tensor, storage.buffer))  # type: ignore[attr-defined]
