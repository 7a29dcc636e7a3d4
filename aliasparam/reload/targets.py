"""The live tensors of a model by their checkpoint names: what a reload writes, and what fits them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ReloadError, StaleKernelError
from ..layout.boxes import box_of, shown, sizes, whole, within
from ..module.allocate import extent, has_memory
from ..spec import TensorSpec, other_kind
from ..storage.coverage import Box, Coverage
from ..storage.kernel_name import KernelName, RefusingName
from ..storage.storage import AliasedStorage
from ..tensors.faces import _Aliased


class Target:
    """One live tensor.

    Attributes:
        tensor: a declared name, or a plain parameter or buffer.
        places: (module's dict of parameters or buffers, name) of every place that shows it.
        label: its first name.
        storage: where a declared name lies; None for a plain tensor.
        together: it and other plain tensors in the same memory (``b = nn.Parameter(a.data)``): who writes one writes them all.
    """

    __slots__ = ("_arrived", "_others", "label", "places", "storage", "tensor")

    def __init__(self, tensor: Tensor, holder: dict[str, Any], name: str, label: str) -> None:
        self.tensor, self.places, self.label = tensor, [(holder, name)], label
        self.storage: AliasedStorage | None = tensor._alias_storage if isinstance(tensor, _Aliased) else None
        self._others: Sequence[Target] = ()
        self._arrived: Coverage | None = None

    @property
    def arrived(self) -> Coverage:
        """What has come for it, in a session."""
        if self._arrived is None:
            self._arrived = Coverage(self.tensor.shape)
        return self._arrived

    @property
    def begun(self) -> bool:
        return self._arrived is not None

    @property
    def together(self) -> Sequence[Target]:
        return self._others or (self,)

    @property
    def shares_memory(self) -> bool:
        return len(self._others) > 1


def find_targets(model: nn.Module) -> dict[str, Target]:
    """Parameters and persistent buffers by the name that the state dict gives them; of tied ones the first. What hooks or extra
    state add to a state dict is made for saving: a write into it would be lost. So a hook may rename, and nothing more."""
    called = {id(t): name for name, t in reversed(model.state_dict(keep_vars=True).items())}
    found: dict[str, Target] = {}
    seen: dict[int, Target] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        buffers = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for holder, names in ((module._parameters, list(module._parameters)), (module._buffers, buffers)):
            for name in names:
                shown = holder[name]
                if shown is None:
                    continue
                live = live_of(shown)
                known = seen.get(id(live))
                if known is not None:
                    known.places.append((holder, name))
                else:
                    label = called.get(id(shown)) or prefix + name
                    found[label] = seen[id(live)] = Target(live, holder, name, label)
    _find_together(found.values())
    return found


def _find_together(targets: Iterable[Target]) -> None:
    by_memory: dict[int, list[Target]] = {}
    for target in targets:
        is_plain = type(target.tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(target.tensor)
        if is_plain and target.tensor.layout is torch.strided:  # a quick look: most lie alone
            by_memory.setdefault(target.tensor.untyped_storage().data_ptr(), []).append(target)
    for group in by_memory.values():
        end, together = 0, list[Target]()
        shared = [target for target in group if has_memory(target.tensor)] if len(group) > 1 else []
        for target in sorted(shared, key=lambda target: target.tensor.data_ptr()):
            if target.tensor.data_ptr() >= end:
                together = []
            together.append(target)
            target._others = together
            end = max(end, target.tensor.data_ptr() + extent(target.tensor))


def in_scope(targets: Mapping[str, Target], scope: str | Iterable[str]) -> list[Target]:
    """The targets that must arrive whole.

    Raises:
        ReloadError: a prefix of the scope that no target has.
    """
    if isinstance(scope, str):
        return [target for target in targets.values() if scope == "all" or target.begun]
    dotted = _dotted(scope)
    found = [target for target in targets.values() if f"{target.label}.".startswith(dotted)]
    for prefix, start in zip(scope, dotted, strict=True):
        if not any(f"{target.label}.".startswith(start) for target in found):
            remedy = "r.expected lists the names; a prefix ends at a dot."
            raise ReloadError("the model has no tensor under this prefix of the scope", name=prefix, remedy=remedy)
    return found


def need_whole(module: str, scope: str | Iterable[str], wanted: Collection[Target]) -> None:
    """
    Raises:
        ReloadError: a tensor did not arrive whole.
    """
    missing = [target for target in wanted if not target.arrived.whole]
    if missing:
        first = missing[0].arrived.missing()
        raise ReloadError(
            f"{len(missing)} of {len(wanted)} tensors did not arrive whole",
            module=module,
            name=", ".join(target.label for target in missing[:5]) + (", …" if len(missing) > 5 else ""),
            expected="every element of each tensor that was begun" if scope == "partial" else "every element once",
            found=f"{missing[0].label} without {', '.join(map(shown, first[:3]))}",
            remedy='Send the missing tensors, or open the reload with scope="partial" for a deliberate partial update.',
        )


def need_no_loader(module: str, stand_ins: Collection[object], doing: str) -> None:
    """
    Raises:
        ReloadError: a loader's stand-ins are in the places of the tensors.
    """
    if stand_ins:
        remedy = "Leave the block first. Nothing has changed, and it may go on."
        raise ReloadError(f"cannot {doing} inside a block of `loading`", module=module, remedy=remedy)


def _dotted(prefixes: Iterable[str]) -> tuple[str, ...]:
    """What a name with a dot behind it begins with if one of the prefixes is of it."""
    return tuple(f"{prefix}." for prefix in prefixes)


def target_of(targets: Mapping[str, Target], scope: str | tuple[str, ...], module: str, name: str) -> Target:
    """
    Raises:
        ReloadError: no target of this name, or one outside the scope, or of a kind that is not reloaded.
    """
    target = targets.get(name) if isinstance(name, str) else None
    if target is None:
        name = str(name)[:120]
        raise ReloadError(
            "the model has no tensor of this name",
            module=module,
            name=name,
            expected=f"one of its {len(targets)} names",
            found=name,
            remedy="r.expected lists them. Map the sender's names to those first.",
        )
    if not isinstance(scope, str) and not f"{name}.".startswith(_dotted(scope)):
        raise ReloadError(
            "this tensor is outside the scope of the reload",
            module=module,
            name=name,
            expected=f"names under {', '.join(scope)}",
            found=name,
            remedy="Open the reload with a scope that has it.",
        )
    need_dense(module, name, target.tensor, "the model's tensor")
    if target.tensor.is_meta:
        remedy = "Load the model first: a value written here would be lost."
        raise ReloadError("the model's tensor has no memory", module=module, name=name, found="one on meta", remedy=remedy)
    return target


def need_dense(module: str, name: str, value: Any, whose: str) -> None:
    """
    Raises:
        ReloadError: not a tensor whose values lie at strides.
    """
    if (found := other_kind(value)) is not None:
        expected = "a dense tensor"
        raise ReloadError(f"{whose} is of a kind that is not reloaded", module=module, name=name, expected=expected, found=found)


def fitted(target: Target, module: str, value: Tensor, first_row: int | None, box: Box | None) -> tuple[Tensor, Box]:
    """``value`` as it can be written, and the rectangle of the tensor that it is for.

    Raises:
        ReloadError: not dense, another shape or dtype, no values, what is no rectangle, or not within the tensor, rows and a
            rectangle at once, or elements that have arrived.
    """
    live, name = target.tensor, target.label
    need_dense(module, name, value, "the new value")
    if box is not None and first_row is not None:
        found = f"{first_row=}, {box=}"[:120]
        raise ReloadError("rows and a rectangle at once", module=module, name=name, expected="first_row or box", found=found)
    if value.numel() == live.numel() == 1 and value.dim() <= 1 and live.dim() <= 1:
        value = value.reshape(live.shape)  # 0-d and [1] are one thing
    try:
        if box is not None:
            box = box_of(box)
        elif first_row is None or not live.shape:
            box = whole(live.shape)
        else:
            box = ((index(first_row), first_row + (value.shape[0] if value.dim() else 1)), *whole(live.shape[1:]))
    except (TypeError, ValueError):
        expected, found = "a first row, or (start, stop) for each dim, of whole numbers", f"{first_row=}, {box=}"[:120]
        raise ReloadError("no place in a tensor", module=module, name=name, expected=expected, found=found) from None
    if within(box, live.shape) and tuple(value.shape) == sizes(box) and value.dtype == live.dtype and not value.is_meta:
        if target.arrived.overlap(box) is None:
            return value, box
        raise ReloadError(
            "these elements arrived twice in one reload",
            module=module,
            name=name,
            expected="every element once",
            found=f"{shown(box)} again",
            remedy="Drop the duplicate from the stream, or open another reload for it.",
        )
    raise ReloadError(
        "the new tensor does not fit",
        module=module,
        name=name,
        expected=f"{TensorSpec.of(live)}" + ("" if value.dim() and sizes(box) == tuple(live.shape) else f", {shown(box)} of it"),
        found=f"{TensorSpec.of(value)}{' on meta' if value.is_meta else ''}",
        remedy="Send it in the shape and dtype of the checkpoint that was loaded first.",
    )


# -- plain tensors that are being written --------------------------------------------------------------------------------


class PlainName(KernelName):
    """A plain parameter or buffer under reload: nobody may read a norm or an embedding that is being written.

    As for kernel names, a hook would not do: compiled callers do not look at hooks of inner modules. The refusing twin stands in
    the module's dict in the tensor's place; its other type fails the guards of compiled code, and after the commit the very same
    tensor is back.
    """

    def __init__(self, label: str, live: Tensor) -> None:
        super().__init__(label, live.data)
        self.live = live

    def refusal(self) -> StaleKernelError:
        return StaleKernelError(
            "this tensor is being reloaded, or its reload failed",
            label=self.label,
            expected="a committed reload",
            found="one that was not committed",
            remedy="Finish the reload, or reload the whole model; until then it does not run.",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainName:
        if id(self) not in memo:
            memo[id(self)] = PlainName(self.label, copy.deepcopy(self.live, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        return PlainName, (self.label, self.live)


def live_of(shown: Tensor) -> Tensor:
    """The tensor that a module's dict shows, also where its twin stands there."""
    name = shown._alias_name if isinstance(shown, RefusingName) else None
    return name.live if isinstance(name, PlainName) else shown
