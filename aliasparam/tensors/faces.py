"""What parameters and views of them have in common: every way into a tensor, right or refused.

[Note: is-a] The parameter *is* a tensor over the real memory (right ``data_ptr``, sizes and strides), not a wrapper around
one. Every operator on it still comes to `dispatch.py`, because the class defines ``__torch_dispatch__``. What goes past the
dispatcher (Python attributes of Tensor, raw-pointer readers) is overridden here: right, or refused.
"""

from __future__ import annotations

import copy
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..errors import AdoptionError
from ..storage.kernel_name import Hidden
from ..storage.states import State
from ..storage.storage import AliasedStorage, ReadOnlyStorage
from ..torch_private import never_traced, stand_ins, writes_counted
from .call import Aliased
from .dispatch import PLAIN, dispatch, values_of, write_one
from .geometry import is_same_view, same_view

_TENSOR_COPY = Tensor.copy_


def reduce_for_process(tensor: Any) -> Any:
    # torch would move the memory to a shared segment; a name that is sent arrives as its values, in a plain tensor.
    return reduce_tensor(tensor._snapshot().detach())  # type: ignore[no-untyped-call]


class _Aliased(Aliased):
    """Behaviour common to parameters and to views of them."""

    _alias_pin: weakref.ref[Any]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __dlpack_c_exchange_api__ = Hidden()  # by which tvm_ffi would take the memory past __dlpack__

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        ForkingPickler.register(cls, reduce_for_process)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def _alias_view(self, geometry: Tensor) -> Tensor:
        return make_view(self._alias_storage, geometry)

    # -- what loaders do for every shard: the same as by the dispatcher, without the way through it ---------------------

    def narrow(self, dim: int, start: Any, length: Any) -> Tensor:
        if stand_ins() is None:
            return make_view(self._alias_storage, self._alias_geometry.narrow(dim, start, length))
        return super().narrow(dim, start, length)

    def __getitem__(self, index: Any) -> Any:
        if (type(index) is int or type(index) is slice) and stand_ins() is None:
            return make_view(self._alias_storage, self._alias_geometry[index])
        return super().__getitem__(index)

    def copy_(self, other: Any = None, non_blocking: bool = False, *, src: Any = None) -> Any:
        other = src if other is None else other  # its documentation says ``src``, its parser ``other``
        if Tensor.copy_ is not _TENSOR_COPY or type(other) not in PLAIN:
            if isinstance(other, _Aliased) and is_same_view(other, self):
                return self  # onto itself: nothing changes, nothing opens
            return super().copy_(other, non_blocking)  # engines patch Tensor.copy_ to count or to mask
        write_one(self, other.detach() if other.requires_grad else other, non_blocking)  # of a trained Parameter its values
        return self

    # -- faces of Tensor that do not come through the dispatcher -------------------------------------------------------

    @property
    def data(self) -> Tensor:
        """A writable alias of this name."""
        data = self.__dict__.get("_alias_data")
        if data is None:
            data = self.__dict__["_alias_data"] = make_view(self._alias_storage, self._alias_geometry)
            pin(data)
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        _assign(self, value)

    def _values(self) -> Tensor:
        return values_of(self)

    def _snapshot(self) -> Tensor:
        """Values in memory of their own."""
        with self._alias_storage.lock:
            values = self._values()
            return values.clone() if self._alias_storage.bound.is_identity else values

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """False where the memory is in another order than the checkpoint's: raw-pointer readers such as safetensors refuse."""
        return self._alias_storage.bound.is_identity and self._alias_geometry.is_contiguous(memory_format=memory_format)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """This name, or a copy: which refuses to be written where a plain tensor would have given itself."""
        if self.is_contiguous(memory_format):
            return self
        copied = self._values().contiguous(memory_format=memory_format)
        return read_only(copied, self) if self._alias_geometry.is_contiguous(memory_format=memory_format) else copied

    def as_subclass(self, cls: Any) -> Any:  # torch asks it of what an operator that wrote has returned
        return self

    def fill_(self, value: Any) -> Any:
        if self.is_conj() or self.is_neg():  # torch would clone it first, and so read what is overwritten
            return self.copy_(torch.empty(self.shape, dtype=self.dtype, device=self.device).fill_(value))
        return super().fill_(value)

    def zero_(self) -> Any:
        return self.fill_(0)

    def apply_(self, function: Any) -> Any:
        return self.copy_(self._snapshot().apply_(function))

    def map_(self, other: Tensor, function: Any) -> Any:
        return self.copy_(self._snapshot().map_(_plain(other), function))

    def map2_(self, first: Tensor, second: Tensor, function: Any) -> Any:
        return self.copy_(self._snapshot().map2_(_plain(first), _plain(second), function))

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only copy of the checkpoint values: writes through it could not be seen."""
        array = self._snapshot().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy(force=False)
        return array if dtype is None else array.astype(dtype)

    def __tvm_ffi_object__(self) -> NoReturn:
        self.__dlpack__()  # tvm_ffi (FlashInfer's kernels) asks for this before it takes a tensor's memory by itself

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BufferError(
            f"{self._alias_storage.label}: DLPack would hand out memory in kernel order; "
            "export clone() for the values, or the kernel name for the memory"
        )

    @property
    def __cuda_array_interface__(self) -> NoReturn:
        raise AttributeError(f"{self._alias_storage.label}: no raw array interface, the memory is in kernel order; use clone()")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The raw bytes where they are in checkpoint order; else a stand-in without memory, which cannot be read.

        Code that only compares storages (``torch.export``, safetensors) goes on working; code that reads them fails.
        ``aliasparam.expose_for_writing`` hands out memory to write.
        """
        storage = self._alias_storage
        if storage.bound.is_identity and storage.state is State.LOADED and storage.exposed is None:
            return super().untyped_storage()
        return storage.blank_storage

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        return torch.ops.aten.set_.default(self)  # is refused, of another dtype too: torch would look at that first

    def tolist(self) -> Any:
        return self._values().tolist()

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise AdoptionError(
                "a declared name holds inference weights; it takes no gradient",
                label=self._alias_storage.label,
                expected="requires_grad=False",
                found="requires_grad=True",
                remedy="Train a clone() and copy_ the result in.",
            )
        return self

    def share_memory_(self) -> NoReturn:
        raise AdoptionError(
            "share_memory_() would move the storage",
            label=self._alias_storage.label,
            expected="memory that stays where it is",
            found="a move to a shared segment",
            remedy="Share a clone(), or create the module in shared memory before declaring.",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = self._alias_storage.state
        shape, dtype = list(self._alias_geometry.shape), str(self._alias_geometry.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self._alias_storage.label!r}, {dtype}{shape}, {state.value if state else 'mixed'})"

    def __format__(self, spec: str) -> str:
        return self._values().item().__format__(spec) if self._alias_geometry.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Saved by itself (state_dict, a dict of named_parameters) a name is its values, which load as plain tensors anywhere.
        # A module saves its names as names: see Names in module/containers.py.
        return self._snapshot().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        storage = copy.deepcopy(self._alias_storage, memo)
        new = make(type(self), storage, same_view(storage, self._alias_geometry))
        memo[id(self)] = new
        for key, value in loader_attributes(self).items():
            new.__dict__[key] = copy.deepcopy(value, memo)
        return new


never_traced(_Aliased)


class AliasedView(_Aliased):
    """A slice or view of an :class:`AliasedParameter`: reads and writes checkpoint values of the same storage."""


def make(cls: type[Any], storage: AliasedStorage, geometry: Tensor) -> Any:
    tensor = Tensor._make_subclass(cls, geometry, False)
    tensor._alias_storage = storage
    tensor._alias_geometry = geometry
    return tensor


def pin(tensor: Any) -> None:
    # torch.utils.swap_tensors() exchanges what two objects are, unseen by anybody; it refuses tensors with weak references.
    tensor._alias_pin = weakref.ref(tensor)


def make_view(storage: AliasedStorage, geometry: Tensor) -> Tensor:
    view: Any = Tensor._make_subclass(AliasedView, geometry, False)  # as make(), without its call: one for every shard
    view._alias_storage = storage
    view._alias_geometry = geometry
    return view  # type: ignore[no-any-return]


def read_only(copied: Tensor, name: _Aliased) -> Tensor:
    """``copied``, the values of ``name``, as a copy that refuses to be written."""
    if copied.storage_offset() or copied.is_conj() or copied.is_neg():
        copied = copied.clone()  # which has no such bits
    storage = ReadOnlyStorage(name._alias_storage.label, copied)
    return make_view(storage, storage.geometry.as_strided(copied.shape, copied.stride()))


def loader_attributes(tensor: Tensor) -> dict[str, Any]:
    """What engines hang on parameters (weight_loader, output_dim, ...), and nothing of ours."""
    held = tensor.__dict__.copy()  # other threads may add to it
    return {k: v for k, v in held.items() if k != "_is_param" and not k.startswith("_alias_")}


def _plain(other: Any) -> Any:
    return other._values() if isinstance(other, _Aliased) else other


def _assign(target: _Aliased, value: Tensor) -> None:
    """``target.data = value``: the values are copied in, and another device moves the memory first. Module.to() assigns copies of
    what is there: they are no news."""
    geometry, storage = target._alias_geometry, target._alias_storage
    if isinstance(value, _Aliased) and is_same_view(value, target):
        return
    if value.shape != geometry.shape or value.dtype != geometry.dtype or value.device.type == "meta":
        raise AdoptionError(
            "assigning .data would change the geometry of a fixed storage",
            label=storage.label,
            expected=f"{geometry.dtype} {list(geometry.shape)} on a real device",
            found=f"{value.dtype} {list(value.shape)} on {value.device}",
            remedy="Convert the value first; Module.half() and the like cannot apply to declared weights.",
        )
    is_copy = _is_copy(value, target)
    if value.device != geometry.device:
        follow(target, value.device)
    if getattr(value, "_alias_uninitialized", None) == writes_counted(value):  # Module.to_empty(): nothing is loaded any more
        storage.invalidate()
    elif not is_copy:
        target.copy_(value)


def _is_copy(value: Tensor, target: _Aliased) -> bool:
    """Whether this is ``target`` on another device, and neither has changed since it was made."""
    name, *versions = getattr(value, "_alias_copied", (None,))
    return name is not None and name() is target and versions == [target._alias_storage.version, value._version]


def follow(target: _Aliased, device: torch.device) -> None:
    """Move the storage of ``target`` to another device, and ``target`` with it: the same object."""
    storage = target._alias_storage
    if device != storage.buffer.device:
        storage.relocate(device)
    target._alias_geometry = same_view(storage, target._alias_geometry)
    target.__dict__.pop("_alias_data", None)
    torch._C.TensorBase.data.__set__(target, target._alias_geometry)  # type: ignore[attr-defined]
