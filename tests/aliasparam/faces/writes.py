"""Writes: of the whole, of a part, in place, from a kernel name, by many threads."""

from __future__ import annotations

import threading

import torch
from torch import nn

from .titled import kernel, other, titled, unary, weight

titled(
    "writes of the whole",
    {
        "`copy_`": unary(lambda w: w.copy_(other(w))),
        "`copy_` with a cast": unary(lambda w: w.copy_(other(w).float())),
        "`copy_` of a broadcast": unary(lambda w: w.copy_(torch.arange(8, device=w.device))),
        "`copy_` from non-contiguous": unary(lambda w: w.copy_(other(w).view(8, 6).t())),
        "`.data.copy_`": unary(lambda w: w.data.copy_(other(w))),
        "`.data[:] =`": unary(lambda w: w.data.__setitem__(slice(None), other(w))),
        "`.data =`": unary(lambda w: setattr(w, "data", other(w))),
        "`fill_`, `zero_`": unary(lambda w: (w.fill_(5), w.zero_(), w[0].fill_(3))),
        "`view(dtype).copy_`": unary(lambda w: w.view(torch.int8).copy_(other(w).view(torch.int8))),
        "`t().copy_`": unary(lambda w: w.t().copy_(other(w).t())),
        "`out=`": unary(lambda w: torch.add(other(w), 1, out=w.data)),
        "`torch._foreach_copy_`": unary(lambda w: torch._foreach_copy_([w], [other(w)])),
        "`nn.init`": unary(lambda w: nn.init.constant_(w, 4)),
        "overlapping windows (`unfold`) filled, then the rest": unary(lambda w: _windows(w)),
    },
)
titled(
    "writes of a part",
    {
        "`w[1:3] =`": unary(lambda w: w.__setitem__(slice(1, 3), 9)),
        "`narrow().copy_()`": unary(lambda w: w.narrow(0, 1, 4).copy_(other(w)[:4])),
        "`narrow().narrow().copy_()` with a cast": unary(lambda w: w.narrow(0, 1, 4).narrow(1, 2, 2).copy_(torch.ones(4, 2))),
        "`.data[2:].fill_()`": unary(lambda w: w.data[2:].fill_(1)),
        "`.detach()[0].fill_()`": unary(lambda w: w.detach()[0].fill_(5)),
        "`view(int8)[0].fill_()`": unary(lambda w: w.view(torch.int8)[0].fill_(-1)),
        "`t()[0].fill_()`": unary(lambda w: w.t()[0].fill_(8)),
        "`torch._foreach_copy_` of slices": unary(lambda w: torch._foreach_copy_([w[:1], w[1:2]], [other(w)[:1], other(w)[1:2]])),
    },
)
titled(
    "in-place reads and writes",
    {
        "`add_`, `mul_`": unary(lambda w: w.add_(1).mul_(2)),
        "`mul_` of a slice": unary(lambda w: w[4:5].mul_(2)),
        "`clamp_`": unary(lambda w: w.clamp_(max=7)),
        "`index_put_`": unary(lambda w: w.__setitem__((torch.tensor([0, 5]), torch.tensor([1, 1])), 7)),
        "`index_copy_`": unary(lambda w: w.index_copy_(0, torch.tensor([3], device=w.device), other(w)[:1])),
        "`scatter_`": unary(lambda w: w.scatter_(0, torch.zeros(1, 8, dtype=torch.int64, device=w.device), other(w)[:1])),
        "`masked_fill_`": unary(lambda w: w.masked_fill_(torch.eye(6, 8, device=w.device).bool(), 0)),
        "`torch._foreach_add_`": unary(lambda w: torch._foreach_add_([w], 1)),
        "`copy_` from itself": unary(lambda w: w.copy_(w.flip(0))),
        "rows copied within": unary(lambda w: w[0:2].copy_(w[2:4])),
    },
)
titled(
    "a kernel name as the source of a write",
    {
        "`w.add_(kernel name)`": lambda layer: weight(layer).add_(kernel(layer)),
        "`w.copy_(kernel name)`": lambda layer: weight(layer).copy_(kernel(layer)),
        "rows of the kernel name": lambda layer: weight(layer)[:2].copy_(kernel(layer)[2:4]),
        "`torch._foreach_copy_` from the kernel name": lambda layer: torch._foreach_copy_([weight(layer)], [kernel(layer)]),
        "`torch.add(name, kernel name, out=name)`": lambda layer: torch.add(weight(layer), kernel(layer), out=weight(layer).data),
    },
)
titled("writes from many threads", {"eight threads, a row each": lambda layer: threads(layer)})


def _windows(w: torch.Tensor) -> None:
    w.flatten()[:25].unfold(0, 2, 1).fill_(7)
    w.flatten()[25:].fill_(3)


def threads(layer: nn.Module) -> None:
    def write(row: int) -> None:
        for _ in range(20):
            weight(layer)[row].copy_(torch.full((8,), row + 50, dtype=torch.uint8))

    workers = [threading.Thread(target=write, args=(i % 6,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
