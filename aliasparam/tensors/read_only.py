"""Copies where a plain tensor would have given itself: they can be read, and refuse to be written.

``parameter.contiguous().fill_(0)`` writes a plain Parameter. Where the memory is in kernel order ``contiguous()`` must be
a gathered copy, and a write into it would be lost without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import StateError


class ReadOnlyCopy(Tensor):
    """Checkpoint values of a name in memory of their own. Views of it are the same; all else gives plain tensors."""

    _alias_plain: Tensor
    _alias_label: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _check_written(func, args, kwargs)
        result = func(*_plain(args), **{k: _plain((v,))[0] for k, v in kwargs.items()})
        owner = args[0] if args and isinstance(args[0], ReadOnlyCopy) else None
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return _wrap(result, owner._alias_label) if is_view and owner is not None else result

    def numpy(self, *, force: bool = False) -> Any:
        array = self._alias_plain.numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        return self._alias_plain.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._alias_plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._alias_plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._alias_plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def read_only(copied: Tensor, name: Any) -> Tensor:
    """``copied``, the values of ``name``, as a copy that refuses to be written."""
    return _wrap(copied, name._alias_storage.label)  # type: ignore[no-any-return]


def _wrap(result: Any, label: str) -> Any:
    if not isinstance(result, Tensor):
        return type(result)(_wrap(part, label) for part in result)
    copy = Tensor._make_subclass(ReadOnlyCopy, result, False)
    copy._alias_plain, copy._alias_label = result, label
    return copy


def _plain(values: Any) -> list[Any]:
    return [type(v)(_plain(v)) if isinstance(v, (list, tuple)) else getattr(v, "_alias_plain", v) for v in values]


def _check_written(func: Any, args: Any, kwargs: Any) -> None:
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, ReadOnlyCopy):
                raise StateError(
                    "contiguous() of a name in kernel format is a gathered copy: a write into it would be lost",
                    label=tensor._alias_label,
                    expected="a write through the name itself",
                    found=f"{func} into the copy",
                    remedy="Write the parameter, its .data or a slice of them: they are contiguous in shape and strides.",
                )
