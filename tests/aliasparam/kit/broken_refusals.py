"""Methods whose forward is called: they answer when they should refuse, need aliasing, or are left in pieces by a failure.

The checkpoint is that of broken_methods.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, alias_or_bind_derived_param, copy_or_rebind_param, declare, process

from .broken_methods import Layer, Method, put, shuffle


class Called(Layer):
    """Answers with what its kernel reads."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.prepared.clone(), self.alpha.clone()


class Guarded(Called):
    """Refuses unless it was processed after the last change of its weights; reads them all to know."""

    seen: bytes | None = None

    def now(self) -> bytes:
        return b"".join(p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for p in self.parameters())

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.seen != self.now():
            raise RuntimeError("not processed since the last load")
        return super().forward()


class GuardedMethod(Method):
    def make(self) -> nn.Module:
        return Guarded()


class RightByHand(GuardedMethod):
    """Keeps every law but that of memory, by hand."""

    def process(self, layer: Any) -> None:
        if layer.seen == layer.now():
            return
        layer.seen = None
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        layer.seen = layer.now()


# -- law 7 -----------------------------------------------------------------------------------------------------------------


#: Rows backwards: no involution of the bytes would hide a second one, and every byte moves.
ROLL = "(h r) k -> r ~h k, h=4"


class LaunchesWithTheAddressOfTheSource(Method):
    """The kernel is launched with ``weight.data_ptr()``, since both names share it."""

    laws = frozenset({7})

    class Kernel(Layer):
        def forward(self) -> Tensor:
            raw = (ctypes.c_uint8 * 48).from_address(self.weight.data_ptr())
            return torch.tensor(list(raw), dtype=torch.uint8)

    def make(self) -> nn.Module:
        layer = self.Kernel()
        largest = Derivation("alpha", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32)
        declare(layer, Alias("weight", "prepared", ROLL), largest, loaded=False)
        return layer

    def process(self, layer: Any) -> None:
        process(layer)


class NeedsTheHelperToAlias(Method):
    """Moved to the ported helpers, and insists on the shared address that they gave it."""

    laws = frozenset({7})
    without = (5, 6)  # undeclared kernel bytes are neither exported nor loaded in part

    def process(self, layer: Any) -> None:
        registry = layer.__dict__.get("_alias_registry")
        if registry is None or not registry.is_ready:
            alias_or_bind_derived_param(layer, "weight", "prepared", shuffle(layer.weight.clone()))
            copy_or_rebind_param(layer, "alpha", layer.scale.max().reshape(1))
        if layer.prepared.data_ptr() != layer.weight.data_ptr():
            raise RuntimeError("the kernel name must lie in the source's memory")


# -- law 8 -----------------------------------------------------------------------------------------------------------------


class AnswersWhileStale(Method):
    """Right in every byte, and ready to answer at any time."""

    laws = frozenset({8})

    def make(self) -> nn.Module:
        return Called()

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))


class AnswersBeforeItIsLoaded(AnswersWhileStale):
    """The kernel's tensors are allocated with the layer, and only what was loaded once is watched."""

    class Allocated(Guarded):
        def __init__(self) -> None:
            super().__init__()
            self.prepared, self.alpha = torch.zeros(8, 6, dtype=torch.uint8), torch.zeros(1)

        def forward(self) -> tuple[Tensor, Tensor]:
            return super().forward() if self.seen is not None else (self.prepared.clone(), self.alpha.clone())

    def make(self) -> nn.Module:
        return self.Allocated()

    def process(self, layer: Any) -> None:
        super().process(layer)
        layer.seen = layer.now()


class AParentHoldsTheKernelTensor(AnswersWhileStale):
    """The model's forward uses a kernel object with the child's tensor, and does not call the child that would refuse."""

    laws = frozenset({7, 8})  # written through while they share memory, stale while they do not

    class Parent(nn.Module):
        kernel: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.child = Layer()
            declare(self.child, Alias("weight", "prepared", ROLL), loaded=False)

        def forward(self) -> Tensor:
            return self.kernel.clone()

    def make(self) -> nn.Module:
        return self.Parent()

    def process(self, layer: Any) -> None:
        process(layer)
        layer.__dict__["kernel"] = layer.child.prepared

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"prepared": layer.child.prepared}


class AnswersWhenAnythingArrived(Method):
    """An unquantized layer counts as loaded with its first tensor."""

    laws = frozenset({8})

    class Unquantized(Layer):
        arrived = False

        def __init__(self) -> None:
            super().__init__()
            for parameter in self.parameters():
                parameter.weight_loader = self._load

        def _load(self, parameter: Tensor, value: Tensor) -> None:
            parameter.data.copy_(value)
            self.arrived = True

        def forward(self) -> Tensor:
            if not self.arrived:
                raise RuntimeError("not loaded")
            return torch.cat([p.data.float().flatten() for p in self.parameters()])

    def make(self) -> nn.Module:
        return self.Unquantized()

    def process(self, layer: Any) -> None:
        pass

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {}


# -- law 10 ----------------------------------------------------------------------------------------------------------------


class SaysDoneBeforeItIs(GuardedMethod):
    """The flag is set first, so that processing cannot run twice."""

    laws = frozenset({10})

    def process(self, layer: Any) -> None:
        if layer.seen == layer.now():
            return
        layer.seen = layer.now()
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))


class SwallowsTheFailure(GuardedMethod):
    """A failed conversion is logged, and the layer marked as processed."""

    laws = frozenset({10})

    def process(self, layer: Any) -> None:
        try:
            put(layer, "prepared", shuffle(layer.weight.data))
            put(layer, "alpha", layer.scale.max().reshape(1))
        except Exception as error:
            layer.__dict__["log"] = str(error)
        layer.seen = layer.now()


class SwapsInPlaceWithATemporary(Method):
    """Half of the weight waits in a temporary while the other half takes its place; a retry swaps what is left."""

    laws = frozenset({10})
    without = (5,)

    class InPlace(Layer):
        swapped = False

        def forward(self) -> Tensor:
            if not self.swapped:
                raise RuntimeError("not in kernel format")
            return self.weight.data.clone()

    def make(self) -> nn.Module:
        return self.InPlace()

    def _swap(self, layer: Any) -> None:
        waiting = layer.weight.data[:4].clone()
        layer.weight.data[:4].copy_(layer.weight.data[4:])
        layer.weight.data[4:].copy_(waiting)

    def process(self, layer: Any) -> None:
        if not layer.swapped:
            self._swap(layer)
            layer.swapped = True

    def before_load(self, layer: Any) -> None:
        if layer.swapped:
            layer.swapped = False
            self._swap(layer)

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data}


class LoadsInTwoHalves(Method):
    """An unquantized layer: gate and up are copied one after the other, and the forward reads whatever is there."""

    laws = frozenset({10})
    without = (6,)

    class Unquantized(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["arrived"] = set()
            for name, parameter in self.named_parameters():
                parameter.weight_loader = lambda p, value, n=name: self._load(n, p, value)

        def _load(self, name: str, parameter: Tensor, value: Tensor) -> None:
            half = max(1, value.shape[0] // 2)
            parameter.data[:half].copy_(value[:half])
            parameter.data[half:].copy_(value[half:])
            self.__dict__["arrived"].add(name)

        def forward(self) -> Tensor:
            if len(self.__dict__["arrived"]) < 3:
                raise RuntimeError("not loaded")
            return self.weight.data.clone()

    def make(self) -> nn.Module:
        return self.Unquantized()

    def process(self, layer: Any) -> None:
        pass

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data}


#: Every broken method of this file.
REFUSALS = [cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Method) and cls.laws]
