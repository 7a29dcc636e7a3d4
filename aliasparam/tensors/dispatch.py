"""What an operator does with a checkpoint name, decided once per operator from its schema.

Every operator that touches an aliased tensor arrives here. There are four behaviours and a refusal:

- *read*: aliased arguments become plain tensors with checkpoint values;
- *view*: the result is again an aliased tensor over the same storage, so writes through slices are seen;
- *write*: the operator computes on plain values, which land by one transaction at the end: if it raises, nothing was written.
  Collectives are such operators;
- *blank*: operators that want a tensor like this one, without its values;
- *refuse*: operators that would move or re-shape the allocation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PointerError, StateError
from ..storage.kernel_name import RefusingName
from ..storage.locks import all_locked
from ..storage.storage import AliasedStorage
from ..storage.transaction import is_brought_whole, write_all
from ..torch_private import is_traced_by_jit, shares_memory, stand_ins, writes_counted
from .call import UPDATES_STATISTICS, Aliased, Call, aliased_in, called, mapped, waited_for
from .geometry import once, parts_of, read_view

_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

#: Types of values that nothing else wants a say in.
PLAIN = (Tensor, nn.Parameter)
#: Base names of operators that replace the storage or geometry of their argument.
_MOVES_MEMORY = frozenset({"set_", "resize_", "resize_as_", "resize", "set_data", "_resize_output_", "swap_"})
#: Operators that look at shape, dtype and device alone.
_BLANK = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"})
_handlers: dict[Any, _Handler] = {}
_geometry = attrgetter("_alias_geometry")


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _handlers.get(func)
    if handler is None:
        handler = _handlers[func] = _handler_for(func)
    mode = stand_ins()
    if mode is not None:
        return _among_stand_ins(func, args, kwargs, handler, takes_real=mode.allow_non_fake_inputs)
    return handler(func, args, kwargs)


def write_one(target: Any, value: Tensor, non_blocking: bool = False) -> None:
    """``target.copy_(value, non_blocking)`` for a plain value: converted and broadcast as ``copy_`` does it.

    Raises:
        RuntimeError: torch's own, where the shapes do not fit. Nothing is written then.
        StaleKernelError: the value is a kernel name of an open module. Nothing is written then.
    """
    storage, view = target._alias_storage, target._alias_geometry
    if type(value) in PLAIN and value.layout is torch.strided:
        if storage.write_shard(view, value):
            return
        if view.is_cuda and is_brought_whole(value, view.dtype):
            value = value.to(view.device, non_blocking=non_blocking)
            if storage.write_shard(view, value):
                return
    elif isinstance(value, RefusingName):
        raise value.refusal()
    _land([(target, value if value.shape == view.shape else value.expand(view.shape))], non_blocking)


def _handler_for(func: Any) -> _Handler:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if name in _BLANK or name.startswith("new_"):
        return _blank
    if name in _MOVES_MEMORY or torch.Tag.inplace_view in func.tags:
        return _refuse
    if namespace == "c10d" or schema.is_mutable or name in UPDATES_STATISTICS:
        return _copy if func is torch.ops.aten.copy_.default else _write
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return _view
    return _SPECIAL.get(func, _read)


# -- handlers ----------------------------------------------------------------------------------------------------------


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return called(func, values_of, args, kwargs)


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        return func(args[0]._alias_geometry, **kwargs)  # engines record shapes before anything is loaded
    version = args[0]._alias_storage.version
    result = _read(func, args, kwargs)
    if result.device != args[0].device and not result.is_inference():
        result._alias_copied = weakref.ref(args[0]), version, result._version  # Module.to() assigns it
    return result


def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = values_of(args[0])
    if kwargs or values.is_conj() or values.is_neg():  # a clone has no such bits, which torch resolves by it
        return func(values, **kwargs)
    is_gathered = values.untyped_storage().nbytes() == values.nbytes and not args[0]._alias_storage.bound.is_identity
    return values if is_gathered else func(values)  # a copy of a copy would be twice its size


_SPECIAL: dict[Any, _Handler] = {torch.ops.aten._to_copy.default: _to_copy, torch.ops.aten.clone.default: _clone}


def _blank(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = called(func, _geometry, args, kwargs)
    if "empty" in func._schema.name:
        result._alias_uninitialized = writes_counted(result)  # Module.to_empty() assigns it: then nothing is loaded any more
    return result


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = args[0] if isinstance(args[0], Aliased) else next(aliased_in((*args, *kwargs.values())))
    return _rewrap(called(func, _geometry, args, kwargs), owner)


def _rewrap(result: Any, owner: Aliased) -> Any:
    if isinstance(result, Tensor):
        return owner._alias_view(result)
    return type(result)(_rewrap(part, owner) for part in result)


def _among_stand_ins(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], handler: _Handler, *, takes_real: bool) -> Any:
    """Stand-ins (``FakeTensorMode``) have shape and dtype, which the geometry tells. A view would be none of the name's memory:
    what is written to it would be lost without a word."""
    if handler in (_write, _copy):
        for written in aliased_in(Call.of(func, args, kwargs).written.values()):
            written._alias_storage.need_writable()
    if handler in (_view, _refuse) or not takes_real:
        name = next(aliased_in((*args, *kwargs.values())))
        raise name._alias_storage.among_stand_ins(f"{func} of a real tensor among stand-ins for tensors")
    return called(func, _geometry, args, kwargs)


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, value, *non_blocking = args
    if not isinstance(target, Aliased):
        return _read(func, args, kwargs)
    if not isinstance(value, Tensor):  # a number
        return _write(func, args, kwargs)
    value = values_of(value) if isinstance(value, Aliased) else value
    write_one(target, value, *non_blocking, **kwargs)
    return target


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = Call.of(func, args, kwargs)
    written = list(aliased_in(call.written.values()))
    plain = _plain(written, call)
    given = {n: mapped(lambda t: plain[id(t)], v) for n, v in call.written.items()}
    result = func(**given, **{n: mapped(values_of, v) for n, v in call.read.items()})
    if written:
        result = waited_for(result)  # the values land when they are there
        _land([(once(t), once(plain[id(t)])) for t in written])
    if not func._schema.returns or func._schema.returns[0].alias_info is None:
        return result
    returned = tuple(call.written.values())[: len(func._schema.returns)]  # what the schema does not mark is behind these
    return returned[0] if len(returned) == 1 else returned


def _plain(written: Sequence[Aliased], call: Call) -> dict[int, Tensor]:
    """Plain tensors for the written arguments, by their ids. Several views of one storage are views of one copy."""
    storages = [t._alias_storage for t in written]
    plain: dict[int, Tensor] = {}
    for tensor in written:
        storage, view = tensor._alias_storage, tensor._alias_geometry
        if id(tensor) in plain:
            continue
        if call.overwrites:  # also several views of one storage: what lands last stays, as in torch
            plain[id(tensor)] = _own(view, torch.empty_like)
            continue
        if storages.count(storage) == 1:
            values = values_of(tensor)
            plain[id(tensor)] = _own(values, torch.clone) if values is view else values
            continue
        values = read_view(storage, storage.geometry)
        whole = values.clone() if values is storage.geometry else values
        for other in written:
            seen = other._alias_geometry
            if other._alias_storage is storage:
                plain[id(other)] = whole.view(seen.dtype).as_strided(seen.shape, seen.stride(), seen.storage_offset())
    return plain


def _own(view: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` makes of ``view``, expanded where that is: torch allows or refuses the operator as of a plain tensor."""
    return make(once(view)).expand(view.shape)


def _land(pairs: Sequence[tuple[Any, Tensor]], non_blocking: bool = False) -> None:
    """Write each value through its aliased tensor, in one transaction."""
    with torch.no_grad(), all_locked(t._alias_storage.lock_number for t, _ in pairs):
        found: dict[int, tuple[AliasedStorage, list[tuple[Tensor, Tensor]]]] = {}
        for target, value in pairs:
            storage, view = target._alias_storage, target._alias_geometry
            if isinstance(value, RefusingName):
                raise value.refusal()
            if value.shape != view.shape:
                raise _reshaped(target, value)
            if shares_memory(value, storage.buffer):
                value = value.clone()
            found.setdefault(id(storage), (storage, []))[1].append((view, value))
        write_all([part for storage, written in found.values() for part in parts_of(storage, written)], non_blocking)


def _reshaped(target: Any, value: Tensor) -> PointerError:
    return PointerError(
        "the operator would give a fixed storage another shape",
        label=target._alias_storage.label,
        expected=f"a result of shape {list(target._alias_geometry.shape)}",
        found=list(value.shape),
        remedy="Pass an out= of the result's shape: a slice of the name, or a tensor of its own.",
    )


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = next(aliased_in((*args, *kwargs.values())))
    raise PointerError(
        f"{func} would move or re-shape a fixed storage",
        label=tensor._alias_storage.label,
        expected="an operation that keeps the address, shape and dtype",
        found=str(func),
        remedy="Write the new values with copy_(), or work on a clone().",
    )


# -- arguments ---------------------------------------------------------------------------------------------------------


def values_of(tensor: Any) -> Tensor:
    """Checkpoint values of an aliased tensor, as a plain one."""
    if is_traced_by_jit():
        raise traced_by_jit(label=tensor._alias_storage.label)
    return read_view(tensor._alias_storage, tensor._alias_geometry)


def traced_by_jit(**where: str) -> StateError:
    return StateError(
        "torch.jit saves raw memory, which is in kernel order",
        **where,
        expected="torch.export or torch.compile",
        found="torch.jit.trace",
        remedy="Export with torch.export, or trace a module that holds checkpoint_state_dict(model).",
    )
