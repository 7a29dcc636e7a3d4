"""What engines do without a storage abstraction, on the same model: three scripts over bare tensors.

Each is the processing step of a real serving engine, reduced to what matters: the block scales are swizzled into a second
attribute, in the source's memory where shapes allow.

- ``delete``: free the sources after processing (one copy, no second load);
- ``skip``: keep them, and let a flag skip processing on the second load;
- ``twice``: alias where shapes agree, keep no state, process on every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointFolder
from ..integrations.transformers.modules import FusedLinear
from ..layouts import swizzle
from ..linear.backends import LinearShape
from ..linear.scales import GlobalScales

_NAMES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


class NaiveLinear(nn.Module):
    """A fused layer over bare tensors, with the kernel of the layer it replaces."""

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor

    def __init__(self, fused: FusedLinear, members: list[str], way: str) -> None:
        super().__init__()
        self.method, self.way, self.members = fused.quant_method, way, members
        self.nvfp4_shape: LinearShape = fused.__dict__["nvfp4_shape"]
        self.nvfp4_backend = fused.__dict__["nvfp4_backend"]
        self.run_time_scales = None
        self.processed = False

    def load(self, folder: CheckpointFolder) -> None:
        """Refill the checkpoint names, as a weight loader does: in place where there is a tensor of that shape."""
        for name in _NAMES:
            value = torch.cat([folder.read(f"{m}.{name}").reshape(-1, *_tail(folder, m, name)) for m in self.members])
            if self.processed:
                getattr(self, name).copy_(value)  # AttributeError once the source was deleted
            else:
                setattr(self, name, value)

    def process(self) -> None:
        if self.way == "skip" and self.processed:
            return
        scales = GlobalScales()
        self.alpha = scales.alpha(self.input_scale, self.weight_scale_2)
        self.weight_alpha = self.weight_scale_2.max().reshape(1)
        self.input_scale_inv = scales.input_scale_inv(self.input_scale)
        self.weight_prepared = self.weight
        swizzled = swizzle().bind(self.weight_scale.shape, self.weight_scale.dtype).encode(self.weight_scale)
        if self.way == "twice" and swizzled.shape == self.weight_scale.shape:
            self.weight_scale.copy_(swizzled)
            swizzled = self.weight_scale
        self.weight_scale_interleaved = swizzled
        if self.way == "delete":
            del self.weight_scale, self.weight_scale_2, self.input_scale
        self.processed = True

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


class _NaiveMember(nn.Module):
    def __init__(self, fused: NaiveLinear, index: int) -> None:
        super().__init__()
        self._fused, self._index = (fused,), index

    def forward(self, x: Tensor) -> Tensor:
        fused = self._fused[0]
        out: Tensor = fused(x).split(fused.nvfp4_shape.partitions, -1)[self._index]
        return out


def make_naive(model: Any, way: str, folder: CheckpointFolder) -> list[NaiveLinear]:
    """Replace every fused layer of a freshly loaded ``model`` by a naive one, loaded from ``folder`` and processed once."""
    paths = {id(m): n for n, m in model.named_modules()}
    layers = []
    for path, fused in [(n, m) for n, m in model.named_modules() if isinstance(m, FusedLinear)]:
        members = [paths[id(m)] for m in fused.members()]
        naive = NaiveLinear(fused, members, way)
        model.set_submodule(path, naive)
        for index, member in enumerate(members):
            model.set_submodule(member, _NaiveMember(naive, index))
        naive.load(folder)
        naive.process()
        layers.append(naive)
    return layers


def reload_naive(model: Any, layers: list[NaiveLinear], folder: CheckpointFolder) -> None:
    """The second load: every tensor refilled, every layer processed again."""
    for layer in layers:
        layer.load(folder)
        layer.process()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(folder.read(name))


def process_naive(layers: list[NaiveLinear]) -> None:
    """Another processing pass over layers that got nothing new."""
    for layer in layers:
        layer.process()


def _tail(folder: CheckpointFolder, member: str, name: str) -> tuple[int, ...]:
    return folder.tensors[f"{member}.{name}"].shape[1:]
