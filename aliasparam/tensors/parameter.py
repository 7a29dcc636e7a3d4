"""AliasedParameter: a checkpoint-format name which is always right to read and to write, and how Parameters become one."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..storage.storage import AliasedStorage
from .faces import _Aliased, loader_attributes, make, pin
from .geometry import Placed, is_same_view, place_in, view_at


class AliasedParameter(_Aliased, nn.Parameter):
    """One checkpoint-format name of a module, over an :class:`AliasedStorage`.

    It has the shape, dtype and address of an ordinary ``nn.Parameter``. Reading it by any
    operator, slice or ``.data`` gathers checkpoint values out of kernel order; writing computes on plain values and scatters them
    at the end, after whoever shows or derives from them was told. Assigning ``.data`` copies the values in, and never moves the
    address.

    Made by :func:`aliasparam.declare`, not by hand: the Parameter object that was there becomes one, so whoever holds it (a
    tied module, a loader's dict of parameters) sees it too. Attributes which engines put on parameters (``weight_loader``, …)
    survive, and where an engine uses a Parameter class of its own, the result is of that class as well.

    Raises:
        StateError: on reading elements that were never loaded or are invalid.
        PointerError: on operators that would move the memory (``resize_``, ``set_``).
        AdoptionError: on ``.data = value`` with another shape, dtype or device.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain Parameter: code that makes another one of the class it found (accelerate, engines) gets the engine's own."""
        return plain_class(cls)(*args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self._snapshot(), requires_grad=False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class SavedName:
    """What stands for a name in the pickle of the module that has it: one for each parameter object, so that ties stay ties."""

    def __init__(self, parameter: AliasedParameter) -> None:
        self.parameter = parameter

    @classmethod
    def of(cls, parameter: AliasedParameter) -> SavedName:
        saved: SavedName | None = parameter.__dict__.get("_alias_saved")
        if saved is None:
            saved = parameter.__dict__["_alias_saved"] = cls(parameter)
        return saved

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.parameter, memo)

    def __reduce__(self) -> Any:
        parameter = self.parameter
        place = place_in(parameter._alias_geometry)
        return _rebuild, (parameter._alias_storage, place, loader_attributes(parameter), plain_class(type(parameter)))


def make_parameter(
    storage: AliasedStorage, geometry: Tensor, like: type[Any] = nn.Parameter, attributes: Mapping[str, Any] | None = None
) -> AliasedParameter:
    """An AliasedParameter over ``geometry``, a plain view of ``storage.geometry``; also of the class ``like``."""
    parameter: AliasedParameter = make(_aliased_class(plain_class(like)), storage, geometry)
    parameter.__dict__.update(attributes or {})
    pin(parameter)
    return parameter


def take_over(old: Tensor, storage: AliasedStorage, geometry: Tensor, like: Tensor | None = None) -> AliasedParameter | None:
    """Make the object ``old`` itself an AliasedParameter over ``geometry``, with the class and attributes of ``like`` (default:
    its own); None if it cannot be.

    It cannot where it is a name already, or torch holds on to it (a compiled function's guard, an autograd graph).
    """
    if isinstance(old, _Aliased):
        return None
    like = old if like is None else like
    new = make(_aliased_class(plain_class(type(like))), storage, geometry)
    new.__dict__.update(loader_attributes(like))
    # It gets its class before its attributes, and other threads look at it: what makes a name of it is there first.
    ours = {"_alias_storage": storage, "_alias_geometry": geometry}
    old.__dict__.update(ours)
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    except RuntimeError:
        for name in ours:
            del old.__dict__[name]
        return None
    pin(old)
    return cast(AliasedParameter, old)


def adopt_class(parameter: AliasedParameter, like: type[Any]) -> None:
    """Give ``parameter`` the engine's class ``like`` too, if it has another."""
    wanted = _aliased_class(plain_class(like))
    if type(parameter) is not wanted and wanted is not AliasedParameter:
        parameter.__class__ = wanted


def plain_class(cls: type[Any]) -> type[Any]:
    """The Parameter class an engine sees: its own, or nn.Parameter."""
    if issubclass(cls, _Aliased):
        return cast(type[Any], cls.__dict__.get("_alias_engine_class", nn.Parameter))
    return cls if issubclass(cls, nn.Parameter) else nn.Parameter


def _aliased_class(engine_class: type[Any]) -> type[Any]:
    """AliasedParameter which is also an ``engine_class``: its loader methods, its isinstance checks, our storage."""
    if engine_class is nn.Parameter:
        return AliasedParameter
    if engine_class in _classes:
        return _classes[engine_class]
    namespace = {"__module__": engine_class.__module__, "__doc__": engine_class.__doc__, "_alias_engine_class": engine_class}
    made: type[Any] = types.new_class(
        engine_class.__name__, (AliasedParameter, engine_class), exec_body=lambda body: body.update(namespace)
    )
    return _classes.setdefault(engine_class, made)


_classes: dict[type[Any], type[Any]] = {}


def _rebuild(storage: AliasedStorage, place: Placed, attributes: dict[str, Any], like: type[Any]) -> AliasedParameter:
    return make_parameter(storage, view_at(storage, place), like, attributes)


def is_same_name(tensor: Any, parameter: AliasedParameter) -> bool:
    """Whether ``tensor`` is ``parameter``, or another object that is the same name: engines keep and put back old ones."""
    return tensor is parameter or (isinstance(tensor, AliasedParameter) and is_same_view(tensor, parameter))
