"""Quantization methods that fail the way methods failed in the field. Each is right on its first load.

The checkpoint of all: ``weight`` u8 [8, 6], ``weight_scale`` u8 [8, 4], ``scale`` f32 [3] (a scale per fused partition). The
kernel wants the halves of the weight swapped, the block scales' halves swapped and padded, and one alpha.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aliasparam.testing import kernel_tensor


def shuffle(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = {"weight": ((8, 6), torch.uint8), "weight_scale": ((8, 4), torch.uint8), "scale": ((3,), torch.float32)}
        for name, (shape, dtype) in shapes.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            parameter.weight_loader = loader
            self.register_parameter(name, parameter)


def loader(parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ValueError(f"the loader expects {list(value.shape)}, the parameter is {list(parameter.shape)}")
    parameter.data.copy_(value)


class Method:
    """One broken method: how it makes, processes and shows its layer, and the laws that may be found broken."""

    laws: frozenset[int] = frozenset()
    #: Laws it does not claim.
    without: tuple[int, ...] = ()

    def make(self) -> nn.Module:
        return Layer()

    def process(self, layer: Any) -> None:
        raise NotImplementedError

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"prepared": layer.prepared, "alpha": layer.alpha}


class DeletesItsSources(Method):
    """SGLang PR 25107: the scales are freed after deriving; the second load has no slot for them."""

    laws = frozenset({2, 3})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        del layer.scale


class SkipsByAFlag(Method):
    """A flag left on the layer makes the second load skip the conversion."""

    laws = frozenset({6, 9})

    def process(self, layer: Any) -> None:
        if getattr(layer, "already_processed", False):
            return
        layer.already_processed = True
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))


class ShufflesTwice(Method):
    """In place and without state: processing after a partial load shuffles shuffled bytes."""

    laws = frozenset({2, 5, 6})

    def process(self, layer: Any) -> None:
        layer.weight.data.copy_(shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data, "alpha": layer.alpha}


class RebindsToThePaddedShape(Method):
    """``param.data = padded``: the next load does not fit."""

    laws = frozenset({2, 3, 5, 6, 9})

    def process(self, layer: Any) -> None:
        layer.weight.data = kernel_tensor("(g r) (q c) -> g r q c, r=16 c=8", layer.weight.data)

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data}


class MovesTheAddress(Method):
    """A derived tensor is created anew by each pass; a captured graph reads the abandoned one."""

    laws = frozenset({3})

    def process(self, layer: Any) -> None:
        layer.keeps = getattr(layer, "prepared", None)  # so that the allocator cannot hand out the same place again
        layer.prepared = shuffle(layer.weight.data)
        layer.alpha = layer.scale.max().reshape(1)


class RefreshesOneLevelOfTwo(Method):
    """C derives from B derives from A, and only B is refreshed."""

    laws = frozenset({6, 9})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        if not hasattr(layer, "alpha_inv"):
            layer.alpha_inv = 1.0 / layer.alpha

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {**super().outputs(layer), "alpha_inv": layer.alpha_inv}


class RescalesAgain(Method):
    """A lossy in-place step runs on its own result: scales shrink with every pass."""

    laws = frozenset({2, 5, 6})

    def process(self, layer: Any) -> None:
        layer.weight_scale.data.copy_(layer.weight_scale.data // 2)

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight_scale": layer.weight_scale.data}


class LeavesThePaddingDirty(Method):
    """One padded buffer is used as staging for raw bytes, and its padding is zeroed only once."""

    laws = frozenset({2, 6, 9})

    def process(self, layer: Any) -> None:
        if not hasattr(layer, "prepared"):
            layer.prepared = torch.zeros(8, 8, dtype=torch.uint8)
        else:
            layer.prepared.view(-1)[:48].copy_(layer.weight.data.view(-1))  # raw bytes pass through the buffer
        layer.prepared[:, :6] = shuffle(layer.weight.data)

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"prepared": layer.prepared}


class ExportsKernelBytes(Method):
    """The state dict shows kernel bytes under checkpoint names; loads are undone by a hook, so only the export is wrong."""

    laws = frozenset({5})

    def process(self, layer: Any) -> None:
        if not getattr(layer, "shuffled", False):
            layer.weight.data.copy_(shuffle(layer.weight.data))
            layer.shuffled = True

    def before_load(self, layer: Any) -> None:
        if getattr(layer, "shuffled", False):
            layer.weight.data.copy_(layer.weight.data.roll(-1, 0))
            layer.shuffled = False

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data}


class LosesTheLoader(Method):
    """The Parameter is re-created, without its weight_loader."""

    laws = frozenset({3})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


class TakesTheScaleOfTheFirstArrival(Method):
    """A scalar shared by partitions is kept from the shards that had arrived first: max(old, new)."""

    laws = frozenset({6, 9})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        new = layer.scale.max().reshape(1)
        put(layer, "alpha", torch.maximum(layer.alpha, new) if hasattr(layer, "alpha") else new)


class EmptiesTheSource(Method):
    """``weight.data = empty(0)`` after fusing."""

    laws = frozenset({2, 3, 6, 9})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        layer.weight.data = torch.empty(0, dtype=torch.uint8)


class KernelObjectHoldsTheOld(Method):
    """A kernel object is built once with the first generation's tensors."""

    laws = frozenset({6, 9})

    def process(self, layer: Any) -> None:
        layer.prepared = shuffle(layer.weight.data)
        if not hasattr(layer, "kernel"):
            layer.kernel = {"prepared": layer.prepared, "alpha": layer.scale.max().reshape(1)}

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return dict(layer.kernel)


class ProcessesWhatGotNothing(Method):
    """A flag per layer is reset by any load: the tensors that got nothing are converted again."""

    laws = frozenset({6})

    def process(self, layer: Any) -> None:
        if layer.__dict__.get("seen") == (state := [t.sum().item() for t in layer.parameters()]):
            return
        layer.weight.data.copy_(shuffle(layer.weight.data))
        layer.weight_scale.data.copy_(shuffle(layer.weight_scale.data))
        state = [t.sum().item() for t in layer.parameters()]
        layer.__dict__["seen"] = state

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data, "weight_scale": layer.weight_scale.data}


class KeepsTheIncomingTensor(Method):
    """The loader keeps the incoming tensor by reference, and the transport uses its buffer again."""

    laws = frozenset({1, 5, 9})

    def make(self) -> nn.Module:
        layer = Layer()
        layer.weight.weight_loader = keep
        return layer

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))


class BroadcastsAlphaIntoTheSource(Method):
    """The derived scalar takes the place of the per-partition scales it came from."""

    laws = frozenset({2, 5, 6})

    def process(self, layer: Any) -> None:
        layer.scale.data.copy_((2 * layer.scale.max()).expand(3))

    def outputs(self, layer: Any) -> dict[str, Tensor]:
        return {"scale": layer.scale.data}


class GrowsWithEveryReload(Method):
    """Old generations are kept alive by a list."""

    laws = frozenset({4})

    def process(self, layer: Any) -> None:
        put(layer, "prepared", shuffle(layer.weight.data))
        put(layer, "alpha", layer.scale.max().reshape(1))
        generation = sum(1 for name in layer.__dict__ if name.startswith("kept_"))
        layer.__dict__[f"kept_{generation}"] = layer.weight.data.clone()


def keep(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value


def put(layer: Any, name: str, value: Tensor) -> None:
    """Copy into the existing tensor, as careful methods do."""
    if hasattr(layer, name):
        getattr(layer, name).copy_(value)
    else:
        setattr(layer, name, value.clone())


#: Every broken method of this file.
METHODS = [cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Method) and cls is not Method]
