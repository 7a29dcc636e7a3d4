"""KernelName: the plain tensor that kernels read, and its refusing twin while the module is open.

[Note: foreign writes] Kernel names are written by this library alone, through a view of its own. The tensor which the module
shows has a version counter of its own too: whatever bumps it was other code (``copy_`` over all buffers, an averaged model,
and collectives: see tensors/call.py). Torch also counts what ``FakeTensorMode(allow_non_fake_inputs=True)`` writes to a plain
tensor, which lands nowhere: the two cannot be told apart, so both refuse. Looking costs one attribute. Writes through ``.data``
and by raw pointer bump no counter and are not seen.

[Note: open modules] A forward pre-hook refuses the declaring module's forward, but compiled callers do not look at hooks of inner
modules, and a parent may read the name without calling the module. So while a module is open each of its kernel names is a
:class:`RefusingName`: a tensor at the same address, with the same shape, dtype and strides, which refuses every operator. The
other type fails the guards of compiled code; after the commit the very same plain tensor is back.
"""

from __future__ import annotations

import copy
import weakref
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import StaleKernelError
from ..spec import TensorSpec, instances_in
from ..torch_private import never_traced, outside_inference, refused_when_traced
from .locks import COUNTERS, LOCKS

_REMEDY = "Call aliasparam.process(model) after loading."


class KernelName:
    """One kernel-format name: its tensor, and its memory as the library writes it.

    Args:
        label: ``module.name`` for messages.
        memory: the library's view of the bytes.
        owner: the storage whose buffer ``memory`` is a view of, or None where it has memory of its own.
    """

    def __init__(self, label: str, memory: Tensor, owner: object = None) -> None:
        self.label = label
        self.memory = memory
        self.owner = owner
        self.address = memory.data_ptr()
        with outside_inference():
            self.tensor = memory.data  # see [Note: foreign writes]
            self._ours = memory.data  # its counter counts what the library alone bumps
        self._twin: RefusingName | None = None
        # torch.utils.swap_tensors() exchanges what two objects are, unseen by anybody; it refuses tensors with weak references.
        self._pin = weakref.ref(self.tensor)
        self._others = 0  # what other code had bumped at the last :meth:`accept`

    @property
    def refusing(self) -> Tensor:
        """What is shown while the module is open."""
        if self._twin is None:
            self._twin = Tensor._make_subclass(RefusingName, self.memory, False)
            self._twin._alias_name = self
        return self._twin

    def other(self) -> Tensor:
        """What stands in the place of a tensor that other code put under this name (``setattr``, ``Module.to_empty()``): it would
        be used by whoever does not ask whether the module is open, and no verb takes it in."""
        return KernelName(self.label, self.memory).refusing

    @property
    def version(self) -> int:
        """The tensor's counter if only the library wrote."""
        return self._ours._version + self._others

    @property
    def was_written(self) -> bool:
        """Whether other code wrote through the tensor since :meth:`accept`.

        Without the lock: what the library bumps meanwhile is counted last, so it is taken for nobody's write.
        """
        return self.tensor._version > self._ours._version + self._others  # as ``version``, without its call

    @property
    def was_moved(self) -> bool:
        """Whether other code gave the tensor other memory (``name.data = ...``)."""
        tensor, memory = self.tensor, self.memory
        same_place = tensor.data_ptr() == memory.data_ptr() and tensor.stride() == memory.stride()
        return not same_place or tensor.shape != memory.shape or tensor.dtype is not memory.dtype

    def shows(self, tensor: Any) -> bool:
        """Whether ``tensor`` is this name, ready or refusing."""
        return tensor is self.tensor or (tensor is not None and tensor is self._twin)

    def accept(self) -> None:
        """What was written is known now: it does not count again."""
        with LOCKS[COUNTERS]:
            self._others = self.tensor._version - self._ours._version

    def changing(self) -> None:
        """The library is about to write: what autograd saved of the old bytes must not be used."""
        with LOCKS[COUNTERS]:
            # Both in one call: an interrupt between two would leave a write by nobody. What other code wrote before still counts.
            torch.autograd.graph.increment_version((self.tensor, self._ours))

    def put_back(self) -> None:
        """Undo what :attr:`was_moved` found: the same object has its own memory again."""
        self.tensor.data = self.memory.data

    def refusal(self) -> StaleKernelError:
        return StaleKernelError(
            "this kernel-format name is open: its module was declared or written, and not processed since",
            label=self.label,
            expected="a module processed since it was declared, and since the last write to its names",
            found="one that was not",
            remedy=_REMEDY,
        )

    def copied_as(self, new: KernelName, memo: dict[int, Any]) -> None:
        memo[id(self)], memo[id(self.tensor)] = new, new.tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelName:
        if id(self) not in memo:
            if self.owner is not None:
                copy.deepcopy(self.owner, memo)  # which copies its name too
            else:
                with outside_inference():
                    self.copied_as(_copy(self.label, self.memory.clone(), self.was_written), memo)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        if self.owner is not None:
            return attrgetter("kernel_name"), (self.owner,)
        # Of now: torch.save() writes the bytes of a tensor after all else.
        return _copy, (self.label, self.memory.clone(), self.was_written)


def _copy(label: str, memory: Tensor, was_written: bool) -> KernelName:
    """A name of its own, which does not forget that other code wrote what it copies."""
    name = KernelName(label, memory)
    name._others -= was_written
    return name


class Hidden:
    """A class attribute of Tensor that is not there for a subclass."""

    def __get__(self, instance: Any, owner: Any) -> NoReturn:
        raise AttributeError("hidden: it would hand out memory in kernel order")


class RefusingName(Tensor):
    """A kernel name of an open module: at its address, and of no use. See [Note: open modules]."""

    _alias_name: KernelName
    __dlpack_c_exchange_api__ = Hidden()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = next(instances_in((*args, *kwargs.values()), RefusingName))._alias_name
        if func is torch.ops.aten._to_copy.default:  # Module.to(): the library follows at the next verb
            device = torch.device(kwargs.get("device") or name.memory.device)
            memory = torch.empty_like(name.memory, dtype=kwargs.get("dtype"), device=device)
            return memory if device.type == "meta" else KernelName(name.label, memory).refusing
        if func is torch.ops.aten.empty_like.default:  # Module.to_empty()
            return func(name.memory, *args[1:], **kwargs)
        if func is torch.ops.aten.detach.default:  # `.data`, of which vLLM takes the shape by `.to("meta")`
            return name.refusing
        raise name.refusal()

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
        return f"RefusingName({self._alias_name.label!r}, {TensorSpec.of(self._alias_name.memory)}, open)"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._alias_name, memo).refusing

    def __reduce_ex__(self, protocol: Any) -> Any:
        return attrgetter("refusing"), (self._alias_name,)


never_traced(RefusingName)
refused_when_traced(RefusingName.__torch_function__, "a kernel-format name is open: call aliasparam.process(model) after loading")
