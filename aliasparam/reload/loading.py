"""`loading`: run an engine's own loader inside a reload.

An engine maps checkpoint names to parameters in its models' ``load_weights``, and its weight loaders copy shards into slices of
``param.data``: code that knows of no session. While :func:`loading` is open, the model shows a stand-in for each of its tensors:
shape, dtype, device and the attributes which engines put on parameters, and no memory. Views of a stand-in are stand-ins; what
is written into one goes to ``session.update`` as the rectangle that it is; what is read comes from the live tensor. So whatever
a session checks, keeps and takes back, it does for loaders too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import ReloadError
from ..spec import is_wide
from ..storage.coverage import Box
from ..storage.place import Place, placed
from ..tensors.call import Call
from ..tensors.faces import _Aliased, loader_attributes
from ..torch_private import tree_leaves, tree_map
from .live import Live
from .session import ReloadSession
from .targets import Target, find_targets, need_no_loader

#: What becomes of a value (contiguous, of the tensor's dtype) that was written to a rectangle of the tensor of this name.
Write: TypeAlias = Callable[[str, Box, Tensor], None]


class Whole(NamedTuple):
    """The tensor that a stand-in is a view of."""

    name: str
    target: Target
    write: Write


class StandIn(Tensor):
    """A tensor of a model that is being loaded, or a view of one."""

    _whole: Whole
    _view: Tensor  # on meta

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return _write(func, Call.of(func, args, kwargs))
        if any(r.alias_info is not None for r in func._schema.returns):
            seen = func(*tree_map(_view_of, args), **tree_map(_view_of, kwargs))
            whole = next(one for one in tree_leaves(args) if isinstance(one, StandIn))._whole
            return tree_map(lambda view: _shown(whole, view) if isinstance(view, Tensor) else view, seen)
        return func(*tree_map(_values, args), **tree_map(_values, kwargs))

    @property
    def data(self) -> Tensor:
        return _shown(self._whole, self._view)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.copy_(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({self._whole.name!r}, {list(self.shape)})"


@contextmanager
def loading(session: ReloadSession) -> Iterator[None]:
    """While open, what is written to the tensors of ``session.model`` goes through ``session.update``. Threads may write.

    A float of two bytes or more is converted as ``copy_`` converts it; a packed or quantized tensor is not.

    Args:
        session: begun, and not prepared yet. It ends behind the block.

    Raises (in the loader that writes):
        ReloadError: as ``update``; or a value of another dtype, or a write into a view that is no rectangle.
    """
    need_no_loader(type(session.model).__name__, session.stand_ins, "load")
    targets = find_targets(session.model)
    with stand_ins(targets, lambda name, box, value: session.update(name, value, box=box)) as session.stand_ins:
        yield


@contextmanager
def stand_ins(targets: Mapping[str, Target], write: Write) -> Iterator[Collection[object]]:
    """While open, a stand-in shows in every place of ``targets``; what is written into one comes to ``write``, one at a time.

    Gives the places, of which there are none any more behind the block."""
    lock = threading.Lock()
    before: dict[tuple[int, str], tuple[dict[str, Any], Any, StandIn]] = {}

    def show(stand_in: StandIn) -> None:
        for holder, key in stand_in._whole.target.places:
            if holder.get(key) is not stand_in:
                before[id(holder), key] = holder, holder.get(key), stand_in
                dict.__setitem__(holder, key, stand_in)

    def written(name: str, box: Box, value: Tensor) -> None:
        with lock:
            write(name, box, value)
            for one in targets[name].together:  # the first write of plain tensors has put refusing twins in their places
                if (stand_in := made.get(one)) is not None:
                    show(stand_in)

    made = {target: _stand_in(Whole(name, target, written)) for name, target in targets.items()}

    def restore() -> None:
        for (_, key), (holder, stood, stand_in) in before.items():
            if holder.get(key) is stand_in:
                dict.__setitem__(holder, key, stood)
        before.clear()
        made.clear()  # a loader may still hold some: they show nothing any more

    try:
        try:
            for stand_in in made.values():
                show(stand_in)
            yield before
        finally:
            restore()
    finally:
        restore()  # also where an interrupt ended the first


def _stand_in(whole: Whole) -> StandIn:
    live = whole.target.tensor
    stand_in = _shown(whole, torch.empty(live.shape, dtype=live.dtype, device="meta"))
    stand_in.__dict__.update(loader_attributes(live), _is_param=isinstance(live, torch.nn.Parameter))
    return stand_in


def _shown(whole: Whole, view: Tensor) -> StandIn:
    size, strides, offset = view.shape, view.stride(), view.storage_offset()
    device = whole.target.tensor.device
    found: Any = Tensor._make_wrapper_subclass(
        StandIn, size, strides=strides, storage_offset=offset, dtype=view.dtype, device=device, requires_grad=False
    )
    found._whole, found._view = whole, view
    return found  # type: ignore[no-any-return]


def _write(func: Any, call: Call) -> Any:
    """In-place operators compute on plain values, which are written at the end."""
    [(key, target), *others] = call.written.items()
    if others or key != func._schema.arguments[0].name or not isinstance(target, StandIn):
        name = func._schema.name.rpartition("::")[2]
        raise ReloadError(f"{name} cannot write into a tensor that is being loaded", remedy="Use copy_ into a slice of it.")
    if func is torch.ops.aten.copy_.default:
        _land(target, call.read["src"])
        return target
    value = torch.empty(target.shape, dtype=target.dtype, device=target.device) if call.overwrites else _values(target)
    func(value, **tree_map(_values, call.read))
    _land(target, value)
    return target


def _land(target: StandIn, value: Tensor) -> None:
    whole, live = target._whole, target._whole.target.tensor
    if value.dtype is not target.dtype and not (is_wide(value.dtype) and is_wide(target.dtype)):
        raise ReloadError(
            "a value of another dtype", name=whole.name, expected=target.dtype, found=value.dtype, remedy=_SAME_AS_LOADED
        )
    value = _values(value).detach().expand(target.shape).to(target.dtype)
    if target.dtype is not live.dtype:
        value = value.contiguous().view(live.dtype)
    place = _place_of(target)
    whole.write(whole.name, place.box, place.to_box(value.contiguous()))


_SAME_AS_LOADED = "Send it in the shape and dtype of the checkpoint that was loaded first."


def _place_of(view: StandIn) -> Place:
    shown, live = view._view, view._whole.target.tensor
    same_width = shown.dtype.itemsize == live.dtype.itemsize and not (shown.is_conj() or shown.is_neg())
    place = placed(tuple(live.shape), shown.storage_offset(), tuple(shown.shape), shown.stride()) if same_width else None
    if place is None:
        raise ReloadError(
            "this view of a tensor that is being loaded is no rectangle of it",
            name=view._whole.name,
            expected=f"slices of {list(live.shape)}",
            found=f"shape {list(shown.shape)}, strides {list(shown.stride())}, {shown.dtype}",
        )
    return place


def _values(value: Any) -> Any:
    """What the live tensor holds there, in memory of its own."""
    if not isinstance(value, StandIn):
        return value
    place = _place_of(value)
    part = Live(value._whole.target.tensor).part(place.box)
    values = part._snapshot() if isinstance(part, _Aliased) else part.detach().clone()
    return place.to_view(values.contiguous()).view(value.dtype)


def _view_of(value: Any) -> Any:
    return value._view if isinstance(value, StandIn) else value
