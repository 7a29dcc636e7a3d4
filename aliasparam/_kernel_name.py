"""KernelName: the plain tensor that kernels read, and what stands in its place while it is stale.

[Note: foreign writes] Kernel names are written by this library alone, through a view of its own. The tensor which the module
shows has a version counter of its own too: whatever bumps it was other code (``copy_`` over all buffers, a broadcast by
DistributedDataParallel, an averaged model). Looking costs one attribute, and only verbs and checkpoint names look: kernels read
a plain tensor. Writes through ``.data`` and by raw pointer bump no counter and are not seen.

[Note: stale names] A forward pre-hook refuses the declaring module's forward, but compiled callers do not look at hooks of inner
modules, and a parent may read the name without calling the module. So while a module is stale each of its kernel names is
a :class:`StaleName`: a tensor at the same address, with the same shape, dtype and strides, which refuses every operator.
The other type fails the guards of compiled code; when the name is current the very same plain tensor is back.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ._compiled import never_traced, refused_when_traced
from ._transform import TensorSpec
from .errors import StaleKernelError

if TYPE_CHECKING:
    from ._bytes import StorageBytes

_REMEDY = "Call aliasparam.process(model) after loading."


class KernelName:
    """One kernel-format name: its tensor, and its memory as the library writes it.

    Args:
        label: ``module.name`` for messages.
        memory: the library's view of the bytes.
        owner: the storage whose buffer ``memory`` is a view of, or None where it has memory of its own.
    """

    def __init__(self, label: str, memory: Tensor, owner: StorageBytes | None = None, tensor: Tensor | None = None) -> None:
        self.label = label
        self.memory = memory
        self.owner = owner
        if tensor is None:
            with torch.inference_mode(False):
                tensor = memory.data  # see [Note: foreign writes]
        self.tensor = tensor
        self._stand_in: StaleName | None = None
        # torch.utils.swap_tensors() exchanges what two objects are, unseen by anybody; it refuses tensors with weak references.
        self._pin = weakref.ref(tensor)
        #: The counter's value if only the library wrote.
        self.version = tensor._version

    @property
    def stand_in(self) -> Tensor:
        """What is shown while the name is stale."""
        if self._stand_in is None:
            self._stand_in = Tensor._make_subclass(StaleName, self.memory, False)
            self._stand_in._alias_name = self
        return self._stand_in

    @property
    def was_written(self) -> bool:
        """Whether other code wrote through the tensor since :meth:`accept`."""
        return self.tensor._version != self.version

    @property
    def was_moved(self) -> bool:
        """Whether other code gave the tensor other memory (``name.data = ...``)."""
        tensor, memory = self.tensor, self.memory
        same_place = tensor.data_ptr() == memory.data_ptr() and tensor.stride() == memory.stride()
        return not same_place or TensorSpec.of(tensor) != TensorSpec.of(memory)

    def shows(self, tensor: Any) -> bool:
        """Whether ``tensor`` is this name, current or stale."""
        return tensor is self.tensor or (tensor is not None and tensor is self._stand_in)

    def accept(self) -> None:
        """What was written is known now: it does not count again."""
        self.version = self.tensor._version

    def put_back(self) -> None:
        """Undo what :attr:`was_moved` found: the same object has its own memory again."""
        self.tensor.data = self.memory.data

    def refusal(self) -> StaleKernelError:
        return StaleKernelError(
            "this kernel-format name is stale",
            label=self.label,
            expected="a name processed since the last write to its sources",
            found="one that is older than its sources",
            remedy=_REMEDY,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelName:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if self.owner is not None:
            copy.deepcopy(self.owner, memo)  # which makes its name too
            return memo[id(self)]  # type: ignore[no-any-return]
        return self.copied(copy.deepcopy(self.memory, memo), None, memo)

    def copied(self, memory: Tensor, owner: StorageBytes | None, memo: dict[int, Any]) -> KernelName:
        """This name over ``memory``, the copy of its memory; whoever copies the tensor by itself gets the same one."""
        new = KernelName(self.label, memory, owner, memo.get(id(self.tensor)))
        new.version -= self.was_written
        memo[id(self)], memo[id(self.tensor)] = new, new.tensor
        return new

    def __reduce__(self) -> Any:
        return _rebuilt, (self.label, self.tensor, self.was_written)


def _rebuilt(label: str, tensor: Tensor, was_written: bool) -> KernelName:
    name = KernelName(label, tensor.data, None, tensor)
    name.version -= was_written
    return name


class Hidden:
    """A class attribute of Tensor that is not there for a subclass."""

    def __get__(self, instance: Any, owner: Any) -> NoReturn:
        raise AttributeError("hidden: it would hand out memory whose format changes")


class StaleName(Tensor):
    """A kernel name that is older than its source: at its address, and of no use. See [Note: stale names]."""

    _alias_name: KernelName
    __dlpack_c_exchange_api__ = Hidden()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        stale = next(_stale((*args, *(kwargs or {}).values())))
        if func is torch.ops.aten._to_copy.default:  # Module.to(): the library follows at the next verb
            memory = torch.empty_like(stale._alias_name.memory, **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})
            return KernelName(stale._alias_name.label, memory).stand_in
        if func is torch.ops.aten.empty_like.default:  # Module.to_empty()
            return func(stale._alias_name.memory, *args[1:], **(kwargs or {}))
        raise stale.refusal()

    def refusal(self) -> StaleKernelError:
        return self._alias_name.refusal()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self.refusal()

    # What goes past the dispatcher.
    numpy = tolist = __array__ = share_memory_ = __dlpack__ = __tvm_ffi_object__ = _refuse
    __cuda_array_interface__ = property(_refuse)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Same size, no memory: for code that compares storages."""
        return torch.empty(self._alias_name.memory.nbytes, dtype=torch.uint8, device="meta").untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StaleName({self._alias_name.label!r}, {TensorSpec.of(self._alias_name.memory)}, stale)"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._alias_name, memo).stand_in

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _stand_in_of, (self._alias_name,)


never_traced(StaleName)
refused_when_traced(StaleName.__torch_function__, "a kernel-format name is stale: call aliasparam.process(model) after loading")


def _stand_in_of(name: KernelName) -> Tensor:
    return name.stand_in


def _stale(values: Any) -> Any:
    for value in values:
        if isinstance(value, StaleName):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _stale(value)
