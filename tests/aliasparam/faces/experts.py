"""Layers of several regions: the first expert is in another state than the others, and elements reach over two of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .titled import each_refuses, flat, kernel, on, other, titled, unary, weight


def windows(w: Tensor) -> None:
    flattened = w.flatten()
    flattened[:9].unfold(0, 2, 1).fill_(7)
    flattened[9:].fill_(3)


def add_kernel(layer: nn.Module) -> None:
    rows, columns = weight(layer).shape[-2:]
    weight(layer)[1].add_(kernel(layer)[1, :rows, :columns])


def load_state_dict(layer: nn.Module) -> None:
    layer.load_state_dict({"weight": other(weight(layer))})


_BOTH = {
    "the whole": on(lambda w: w + 0),
    "each expert": on(lambda w: flat(*(w[e] + 0 for e in range(len(w))))),
    "a row of every expert": on(lambda w: w[:, 1] + 0),
    "a column of every expert": on(lambda w: w[..., -1] + 0),
    "the last two experts": on(lambda w: w[-2:] + 0),
    "experts by `index_select`": on(lambda w: w.index_select(0, torch.tensor([2, 0], device=w.device))),
    "`permute` of the experts": on(lambda w: w.permute(2, 0, 1) + 0),
    "`view(dtype)` of the same width": on(lambda w: w.view(torch.int8 if w.element_size() == 1 else torch.int16) + 0),
    "a name and its kernel name in one sum": lambda layer: weight(layer).float().sum() + kernel(layer).float().sum(),
    "`copy_`": unary(lambda w: w.copy_(other(w))),
    "`copy_` of one expert": unary(lambda w: w[2].copy_(other(w)[2])),
    "`narrow().narrow().copy_` of a shard": unary(lambda w: w.narrow(0, 1, 1).narrow(1, 0, 1).copy_(other(w)[1:2, :1])),
    "`copy_` of a row of every expert": unary(lambda w: w[:, 1].copy_(other(w)[:, 1])),
    "`copy_` of one expert from another": unary(lambda w: w[0].copy_(w[2])),
    "`add_` of one expert": unary(lambda w: w[1].add_(3)),
    "`index_copy_`": unary(lambda w: w.index_copy_(0, torch.tensor([2, 0], device=w.device), other(w)[:2])),
    "`torch._foreach_copy_` of experts": unary(lambda w: torch._foreach_copy_([w[0], w[2]], [other(w)[0], other(w)[2]])),
    "`add_` of the kernel name of one expert": add_kernel,
    "`load_state_dict`": load_state_dict,
    "the forward": lambda layer: layer(torch.ones(1, device=weight(layer).device)),
}
titled(
    "four experts of six bytes",
    {
        **_BOTH,
        "`view(int32)`, then a read": on(lambda w: w.view(24).view(torch.int32) + 0),
        "`view(int32)`, then a read of each": on(lambda w: flat(*(w.view(24).view(torch.int32)[i] + 0 for i in range(6)))),
        "`view(int32)[1:4]`, then a read": on(lambda w: w.view(24).view(torch.int32)[1:4] + 0),
        "`view(int64)[1:]`, then a read": on(lambda w: w.view(24).view(torch.int64)[1:] + 0),
        "`view(int32)[1] =`, over two experts": unary(lambda w: w.view(24).view(torch.int32).__setitem__(1, -1)),
        "`view(int32).copy_`": unary(lambda w: w.view(24).view(torch.int32).copy_(torch.arange(6, device=w.device))),
        "overlapping windows (`unfold`) filled, then the rest": unary(windows),
    },
    layer="experts",
)
titled(
    "three experts whose kernel format is padded",
    {
        **_BOTH,
        "`flatten` (a copy)": on(lambda w: w.flatten() + 0),
        "`view(-1)`": on(lambda w: w.view(-1) + 0),
        "`view(float32)` (odd columns: torch refuses)": each_refuses(lambda w: w.view(torch.float32)),
        "`t()` of an expert, written": unary(lambda w: w[1].t()[0].fill_(5)),
        "`contiguous`": on(lambda w: w.contiguous() + 0),
        "`Module.half`": lambda layer: layer.half() and None,
        "`Module.float`": lambda layer: layer.float() and None,
        "`Module.to(dtype)`": lambda layer: layer.to(torch.float64) and None,
        "`float32.copy_(name)`": on(lambda w: torch.zeros(3, 4, 5, device=w.device).copy_(w)),
    },
    layer="padded",
)
