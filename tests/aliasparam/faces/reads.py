"""Reads, views, and reads of several names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .titled import flat, kernel, on, titled, weight


def index(w: Tensor, *rows: int) -> Tensor:
    return torch.tensor(rows, device=w.device)


titled(
    "aten reads",
    {
        "pointwise (`w + 1`)": on(lambda w: w + 1),
        "comparison": on(lambda w: w > 7),
        "reduction": on(lambda w: w.sum()),
        "reduction along a dim": on(lambda w: w.max(-1).values),
        "sort": on(lambda w: w.flatten().sort().values),
        "matmul": on(lambda w: w.float() @ w.float().t()),
        "`F.linear` with the name as weight": on(
            lambda w: nn.functional.linear(torch.ones(1, 8, device=w.device, dtype=w.dtype), w)
        ),
        "`torch.where`": on(lambda w: torch.where(w > 3, w, 0)),
        "`index_select`, `gather`, `take`": on(
            lambda w: flat(
                w.index_select(0, index(w, 4, 1)),
                w.gather(1, index(w, 3, 0)[:, None]),
                w.take(index(w, 40, 3)),
                w[index(w, 5, 0)],
            )
        ),
        "boolean mask": on(lambda w: w[w > 7]),
        "`embedding`": on(lambda w: nn.functional.embedding(index(w, 1, 5), w)),
        "`clone`": on(lambda w: w.clone()),
        "cast (`to`, `float`, `half`)": on(lambda w: flat(w.to(torch.int32), w.float(), w.half())),
        "`cpu`": on(lambda w: w.cpu() + 0),
        "`contiguous`": on(lambda w: w.contiguous() + 0),
        "`item`, `tolist`": on(lambda w: torch.tensor([w[5, 7].item(), *w[3].tolist()])),
        "`torch.equal`": on(lambda w: torch.tensor(torch.equal(w, w.clone()))),
        "`empty_like`, `zeros_like`, `new_zeros` (no values)": on(
            lambda w: torch.empty_like(w).zero_() + torch.zeros_like(w) + w.new_zeros(6, 8)
        ),
    },
)
titled(
    "views, then a read",
    {
        "slice": on(lambda w: w[3:5] + 0),
        "slice with a step": on(lambda w: w[::2] + 0),
        "`select`": on(lambda w: flat(w[5] + 0, w.select(1, 3) + 0)),
        "`narrow`": on(lambda w: w.narrow(1, 2, 3) + 0),
        "`t`, `permute`, `mT`": on(lambda w: flat(w.t() + 0, w.permute(1, 0) + 0, w.mT + 0)),
        "`view`": on(lambda w: w.view(3, 16) + 0),
        "`view(dtype)`": on(lambda w: w.view(torch.int16) + 0),
        "`chunk`, `split`, `unbind`": on(lambda w: torch.stack([*w.chunk(2)[1], *w.split(2)[0], *w.unbind(0)[:1]])),
        "`flatten` of a slice": on(lambda w: w[2:, 1:].flatten() + 0),
        "`expand`": on(lambda w: w[None].expand(2, 6, 8) + 0),
        "`as_strided`": on(lambda w: w.as_strided((3, 2), (8, 1)) + 0),
        "`unfold` (elements in several places)": on(lambda w: w.flatten().unfold(0, 4, 2) + 0),
        "a chain of five": on(lambda w: w[1:].t()[2:].view(torch.int8).select(0, 1) + 0),
        "`.data`": on(lambda w: w.data + 0),
        "`.detach()`": on(lambda w: w.detach() + 0),
    },
)
titled(
    "several names at once",
    {
        "`torch.cat` of names of one storage": on(lambda w: torch.cat([w, w.data, w[:1]])),
        "`torch.stack` of names of one storage": on(lambda w: torch.stack([w, w.data])),
        "`torch._foreach_add` over names of one storage": on(lambda w: torch._foreach_add([w, w[4:]], 1)[1]),
        "a name and its kernel name added": lambda layer: weight(layer) + kernel(layer),
        "`torch.cat` of a name and its kernel name": lambda layer: torch.cat([weight(layer), kernel(layer)]),
    },
)
