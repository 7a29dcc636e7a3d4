"""What an operator does with a checkpoint name, decided once per operator from its schema.

Every operator that touches an aliased tensor arrives here. There are four behaviours and a refusal:

- *read*: aliased arguments become plain tensors with checkpoint values (the memory itself, or a converted copy);
- *view*: the result is again an aliased tensor over the same storage, so writes through slices are seen;
- *write*: the regions under the written arguments become checkpoint format first, and their dependents stale after;
- *collective*: c10d schemas do not say what they write, so every aliased tensor in them counts as written;
- *refuse*: operators that would move or re-shape the allocation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .errors import PointerError

_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

#: Base names of operators that replace the storage or geometry of their argument.
_MOVES_MEMORY = frozenset({"set_", "resize_", "resize_as_", "resize", "set_data", "_resize_output_", "swap_"})
#: In-place operators whose result does not depend on what was there. All others read before they write.
_OVERWRITES = frozenset(
    {
        "copy_",
        "fill_",
        "zero_",
        "_foreach_copy_",
        "_foreach_zero_",
        "normal_",
        "uniform_",
        "random_",
        "exponential_",
    }
)
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional"})

_handlers: dict[Any, _Handler] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _handlers.get(func)
    if handler is None:
        handler = _handlers[func] = _handler_for(func)
    if handler is _view:  # looks at no bytes
        return handler(func, args, kwargs)
    storages = {t._alias_storage for t in _aliased((*args, *kwargs.values()))}
    if len(storages) == 1:
        with storages.pop().lock:
            return handler(func, args, kwargs)
    with ExitStack() as locks:
        for storage in sorted(storages, key=id):  # one order for everybody, so that no two wait for each other
            locks.enter_context(storage.lock)
        return handler(func, args, kwargs)


def _handler_for(func: Any) -> _Handler:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if name in _MOVES_MEMORY or torch.Tag.inplace_view in func.tags:
        return _refuse
    if namespace in _COLLECTIVES:
        return _collective
    if schema.is_mutable:
        return _writer(func)
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return _view
    return _read


# -- handlers ----------------------------------------------------------------------------------------------------------


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*_map(_values, args), **_map_kwargs(_values, kwargs))


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = next(iter(_aliased((*args, *kwargs.values()))))
    result = func(*_map(_memory, args), **_map_kwargs(_memory, kwargs))
    return _rewrap(result, owner)


def _rewrap(result: Any, owner: Any) -> Any:
    if isinstance(result, Tensor):
        return _types.view(owner._alias_storage, result)
    return type(result)(_rewrap(part, owner) for part in result)


def _writer(func: Any) -> _Handler:
    """A handler for one mutating operator, with the written arguments looked up in its schema once."""
    schema = func._schema
    positions = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    names = [schema.arguments[i].name for i in positions]
    returns = len(schema.returns)
    overwrites = schema.name.partition("::")[2] in _OVERWRITES or any(schema.arguments[i].is_out for i in positions)

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        originals = [args[i] if i < len(args) else kwargs.get(n) for i, n in zip(positions, names, strict=True)]
        written = list(_aliased(originals))
        # A source over the same memory is read while it is written: then nothing may be given up beforehand.
        fresh = overwrites and not _reads_from({id(t._alias_storage) for t in written}, positions, names, args, kwargs)
        undo = [(t._alias_storage, t._alias_storage.before_write(t._alias_memory, fresh)) for t in written]
        try:
            plain_args = list(args)
            for i, arg in enumerate(args):
                plain_args[i] = _map_one(_memory if i in positions else _values, arg)
            plain_kwargs = {k: _map_one(_memory if k in names else _values, v) for k, v in kwargs.items()}
            func(*plain_args, **plain_kwargs)
        except BaseException:
            for storage, changes in reversed(undo):
                storage.undo(changes)
            raise
        for tensor in written:
            tensor._alias_storage.after_write(tensor._alias_memory)
        if returns == 0:
            return None
        return originals[0] if returns == 1 else tuple(originals)

    return write


def _collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    touched = list(_aliased((*args, *kwargs.values())))
    for tensor in touched:
        # A sender's bytes must be checkpoint values too, so a region is restored even where it is about to be overwritten.
        storage, memory = tensor._alias_storage, tensor._alias_memory
        storage.restore(storage.regions_of(memory))
        storage.before_write(memory, True)
    result = func(*_map(_memory, args), **_map_kwargs(_memory, kwargs))
    for tensor in touched:
        tensor._alias_storage.after_write(tensor._alias_memory)
    return result


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = next(iter(_aliased((*args, *kwargs.values()))))
    raise PointerError(
        f"{func} would move or re-shape a fixed storage",
        name=tensor._alias_storage.label,
        expected="an operation that keeps the address, shape and dtype",
        remedy="Write the new values with copy_(), or work on a clone().",
    )


def _reads_from(storages: set[int], positions: list[int], names: list[str], args: Any, kwargs: dict[str, Any]) -> bool:
    inputs = [a for i, a in enumerate(args) if i not in positions] + [v for k, v in kwargs.items() if k not in names]
    return any(id(t._alias_storage) in storages for t in _aliased(inputs))


# -- arguments ---------------------------------------------------------------------------------------------------------


def _values(tensor: Any) -> Tensor:
    plain: Tensor = tensor._alias_storage.read(tensor._alias_memory)
    return plain


def _memory(tensor: Any) -> Tensor:
    plain: Tensor = tensor._alias_memory
    return plain


def _map_one(change: Callable[[Any], Tensor], value: Any) -> Any:
    if isinstance(value, _types.aliased):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_one(change, v) for v in value)
    return value


def _map(change: Callable[[Any], Tensor], args: tuple[Any, ...]) -> list[Any]:
    return [_map_one(change, a) for a in args]


def _map_kwargs(change: Callable[[Any], Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: _map_one(change, v) for k, v in kwargs.items()} if kwargs else kwargs


def _aliased(values: Any) -> Any:
    for value in values:
        if isinstance(value, _types.aliased):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _aliased(value)


class _types:
    """The tensor classes, filled in by _parameter.py (which imports this module)."""

    aliased: tuple[type, ...] = ()
    view: Callable[[Any, Tensor], Tensor]
