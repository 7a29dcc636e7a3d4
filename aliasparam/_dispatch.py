"""What an operator does with a checkpoint name, decided once per operator from its schema.

Every operator that touches an aliased tensor arrives here. There are five behaviours and a refusal:

- *read*: aliased arguments become plain tensors with checkpoint values (the memory itself, or a converted copy);
- *view*: the result is again an aliased tensor over the same storage, so writes through slices are seen;
- *write*: the regions under the written arguments become checkpoint format first, and their dependents stale after;
- *blank*: operators that want a tensor like this one, without its values;
- *collective*: c10d schemas do not say what they write, their argument names do: what is sent is read, the rest is written;
- *refuse*: operators that would move or re-shape the allocation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._storage import all_locked
from ._writes import Writes, apart, write_one
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
#: Operators outside of torch's pointwise ones that check their arguments before they write: a raise has changed nothing.
_CHECKS_FIRST = (_OVERWRITES | {"masked_fill_"}) - {"_foreach_copy_", "_foreach_zero_"}
#: Operators that look at shape, dtype and device alone.
_BLANK = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"})
#: Arguments of c10d operators that are only read, and operators whose ``tensors`` are read, or wholly overwritten.
_SENT = frozenset({"input_tensors", "input_tensor", "input_list", "inputs", "input"})
_SENDS = frozenset({"send"})
_REDUCES = frozenset({"allreduce_", "reduce_", "allreduce_coalesced_"})

_COPY = torch.ops.aten.copy_.default

_handlers: dict[Any, _Handler] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _handlers.get(func)
    if handler is None:
        handler = _handlers[func] = _handler_for(func)
    return handler(func, args, kwargs)


def _locked(handler: _Handler) -> _Handler:
    """``handler`` with the locks of all storages in its arguments held."""

    def locked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        storages = _storages(args, kwargs)
        with storages[0].lock if len(storages) == 1 else all_locked(storages):
            return handler(func, args, kwargs)

    return locked


def _storages(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The distinct storages among the arguments. Nearly always there is one, in a plain argument."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, _types.aliased):
            storage = value._alias_storage  # type: ignore[attr-defined]
            if storage not in found:
                found.append(storage)
        elif isinstance(value, (list, tuple)):
            found += [t._alias_storage for t in _aliased(value) if t._alias_storage not in found]
    return found


def _handler_for(func: Any) -> _Handler:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if name in _BLANK or name.startswith("new_"):
        return _blank
    if name in _MOVES_MEMORY or torch.Tag.inplace_view in func.tags:
        return _refuse
    if namespace == "c10d":
        return _locked(_collective(func))
    if schema.is_mutable:
        return _writer(func)
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return _view  # looks at no bytes, takes no lock
    return _locked(_read)


# -- handlers ----------------------------------------------------------------------------------------------------------


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*_map(_values, args), **_map_kwargs(_values, kwargs))


def _blank(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*_map(_memory, args), **_map_kwargs(_memory, kwargs))
    if "empty" in func._schema.name:
        result._alias_uninitialized = True  # Module.to_empty() assigns it: then nothing is loaded any more
    return result


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = args[0] if isinstance(args[0], _types.aliased) else next(iter(_aliased((*args, *kwargs.values()))))
    if owner is args[0] and not kwargs:  # view operators take one tensor, the first argument
        return _rewrap(func(owner._alias_memory, *args[1:]), owner)
    return _rewrap(func(*_map(_memory, args), **_map_kwargs(_memory, kwargs)), owner)


def _rewrap(result: Any, owner: Any) -> Any:
    if isinstance(result, Tensor):
        return _types.view(owner._alias_storage, result)
    return type(result)(_rewrap(part, owner) for part in result)


def _writer(func: Any) -> _Handler:
    """A handler for one mutating operator, with the written arguments looked up in its schema once."""
    schema = func._schema
    positions = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    names = [schema.arguments[i].name for i in positions]
    base = schema.name.partition("::")[2]
    overwrites, checks_first = base in _OVERWRITES, base in _CHECKS_FIRST or torch.Tag.pointwise in func.tags
    if all(schema.arguments[i].is_out for i in positions):
        return _locked(_into_out(func, names))

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        originals = [args[i] if i < len(args) else kwargs.get(n) for i, n in zip(positions, names, strict=True)]
        written = list(_aliased(originals))
        storages = [t._alias_storage for t in written]

        # What is read is read first: as plain tensors of which none lies in memory that is about to change format.
        def plain(value: Any, is_written: bool) -> Any:
            return _map_one(_memory, value) if is_written else _map_one(_values, apart(value, storages))

        with Writes(written, overwrites, checks_first=checks_first) as writes:
            plain_args = [plain(arg, i in positions) for i, arg in enumerate(args)]
            plain_kwargs = {k: plain(v, k in names) for k, v in kwargs.items()}
            writes.begin()
            func(*plain_args, **plain_kwargs)
        return _returned(schema, originals)

    general = _locked(write)
    if positions != [0]:
        return general

    def write_first(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The loaders' ``copy_``, ``fill_``, ``zero_``: into an aliased tensor, from a plain one."""
        target = args[0]
        if kwargs or not isinstance(target, _types.aliased):
            return general(func, args, kwargs)
        for other in args[1:]:
            if isinstance(other, _types.compound):
                return general(func, args, kwargs)
        write_one(func, target, args[1:], overwrites, checks_first)
        return target

    return write_first


def _returned(schema: Any, originals: list[Any]) -> Any:
    """What a mutating operator returns: the arguments it wrote."""
    returns = len(schema.returns)
    if returns == 0:
        return None
    return originals[0] if returns == 1 else tuple(originals)


def _into_out(func: Any, names: list[str]) -> _Handler:
    """A handler for one operator with ``out=``: torch would resize what does not fit, so it gets memory of its own."""
    schema = func._schema

    def fresh(tensor: Any) -> Tensor:
        memory = tensor._alias_memory  # aten operators give an empty tensor the shape of their result
        shape = (0,) if schema.name.startswith("aten::") else memory.shape
        return torch.empty(shape, dtype=memory.dtype, device=memory.device)

    def write_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        originals = [kwargs[n] for n in names]
        plain = {k: _map_one(fresh if k in names else _values, v) for k, v in kwargs.items()}
        func(*_map(_values, args), **plain)
        pairs = [pair for n in names for pair in _pairs(kwargs[n], plain[n])]
        for target, result in pairs:
            if target._alias_memory.shape != result.shape:
                raise PointerError(
                    f"{func} would give a fixed storage another shape",
                    label=target._alias_storage.label,
                    expected=f"a result of shape {list(target._alias_memory.shape)}",
                    found=list(result.shape),
                    remedy="Pass an out= of the result's shape: a slice of the name, or a tensor of its own.",
                )
        for target, result in pairs:
            write_one(_COPY, target, (result,), True)
        return _returned(schema, originals)

    return write_out


def _pairs(given: Any, got: Any) -> list[tuple[Any, Tensor]]:
    """(aliased tensor, the result for it) of one ``out`` argument, a tensor or a list of them."""
    pairs = zip(given, got, strict=True) if isinstance(given, (list, tuple)) else [(given, got)]
    return [(t, result) for t, result in pairs if isinstance(t, _types.aliased)]


def _collective(func: Any) -> _Handler:
    """A handler for one c10d operator: its schema does not say what it writes, its argument names do."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    names = [a.name for a in schema.arguments]

    def collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        sends = name in _SENDS or (name == "broadcast_" and _is_root(given))
        written = [t for n, v in given.items() if n not in _SENT and not sends for t in _aliased([v])]
        storages = [t._alias_storage for t in written]
        with Writes(written, name not in _REDUCES, checks_first=False) as writes:
            read = [n for n in given if sends or n in _SENT]
            plain = {n: _map_one(_values, apart(v, storages)) if n in read else _map_one(_memory, v) for n, v in given.items()}
            writes.begin()
            return func(**plain)

    return collective


def _is_root(given: dict[str, Any]) -> bool:
    from torch.distributed import ProcessGroup

    group = ProcessGroup.unbox(given["process_group"])
    return bool(group.rank() == given["root_rank"])


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = next(iter(_aliased((*args, *kwargs.values()))))
    raise PointerError(
        f"{func} would move or re-shape a fixed storage",
        label=tensor._alias_storage.label,
        expected="an operation that keeps the address, shape and dtype",
        found=str(func),
        remedy="Write the new values with copy_(), or work on a clone().",
    )


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
    #: What an argument is if it is not as plain as it looks, or may hold such a tensor.
    compound: tuple[type, ...] = ()
    view: Callable[[Any, Tensor], Tensor]
