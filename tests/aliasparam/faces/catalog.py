"""The faces: one function each, done to a declared layer and to a plain one.

A function gets the layer and returns what can be compared (a tensor), or None. What it writes is compared afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import registry_of

from .layers import COMPILED

Face = Callable[[nn.Module], Any]
FACES: dict[str, dict[str, Face]] = {}
#: Faces whose refusal leaves nothing loaded, because that is what was asked for.
INVALIDATES = {"`Module.to_empty`, then the forward"}


def titled(name: str, faces: dict[str, Face]) -> None:
    FACES.setdefault(name, {}).update(faces)


W = "weight"


def weight(layer: nn.Module) -> Any:
    return getattr(layer, W)


def other(like: Tensor, value: int = 9) -> Tensor:
    return torch.full((6, 8), value, dtype=torch.uint8, device=like.device) + torch.arange(
        8, dtype=torch.uint8, device=like.device
    )


def on(do: Callable[[Any], Any]) -> Face:
    return lambda layer: do(weight(layer))


def unary(do: Callable[[Any], Any]) -> Face:
    """A write: does it, returns nothing."""

    def face(layer: nn.Module) -> None:
        do(weight(layer))

    return face


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
            lambda w: torch.nn.functional.linear(torch.ones(1, 8, device=w.device), w.float())
        ),
        "`torch.where`": on(lambda w: torch.where(w > 3, w, 0)),
        "`index_select`, `gather`": on(lambda w: w.index_select(0, torch.tensor([4, 1], device=w.device))),
        "boolean mask": on(lambda w: w[w > 7]),
        "`embedding`": on(lambda w: torch.nn.functional.embedding(torch.tensor([1, 5], device=w.device), w)),
        "`clone`": on(lambda w: w.clone()),
        "cast (`to`, `float`, `half`)": on(lambda w: torch.cat([w.to(torch.int32).flatten(), w.half().int().flatten()])),
        "`cpu`": on(lambda w: w.cpu() + 0),
        "`contiguous`": on(lambda w: w.contiguous() + 0),
        "`item`, `tolist`": on(lambda w: torch.tensor([w[5, 7].item(), *w[3].tolist()])),
        "`torch.equal`": on(lambda w: torch.tensor(torch.equal(w, w.clone()))),
        "`empty_like`, `new_zeros` (no values)": on(lambda w: torch.zeros_like(w) + w.new_zeros(6, 8)),
    },
)
titled(
    "views, then a read",
    {
        "slice": on(lambda w: w[3:5] + 0),
        "slice with a step": on(lambda w: w[::2] + 0),
        "`select`": on(lambda w: w[5] + 0),
        "`narrow`": on(lambda w: w.narrow(1, 2, 3) + 0),
        "`t`, `permute`": on(lambda w: w.t() + 0),
        "`view`": on(lambda w: w.view(3, 16) + 0),
        "`view(dtype)`": on(lambda w: w.view(torch.int16) + 0),
        "`chunk`, `split`, `unbind`": on(lambda w: torch.stack([*w.chunk(2)[1], *w.split(2)[0], *w.unbind(0)[:1]])),
        "`flatten` of a slice": on(lambda w: w[2:, 1:].flatten() + 0),
        "`expand`": on(lambda w: w[None].expand(2, 6, 8) + 0),
        "`as_strided`": on(lambda w: w.as_strided((3, 2), (8, 1)) + 0),
        "a chain of five": on(lambda w: w[1:].t()[2:].view(torch.int8).select(0, 1) + 0),
        "`.data`": on(lambda w: w.data + 0),
        "`.detach()`": on(lambda w: w.detach() + 0),
    },
)
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
        "`fill_`, `zero_`": unary(lambda w: w.zero_().fill_(5)),
        "`view(dtype).copy_`": unary(lambda w: w.view(torch.int8).copy_(other(w).view(torch.int8))),
        "`t().copy_`": unary(lambda w: w.t().copy_(other(w).t())),
        "`out=`": unary(lambda w: torch.add(other(w), 1, out=w.data)),
        "`torch._foreach_copy_`": unary(lambda w: torch._foreach_copy_([w], [other(w)])),
        "`nn.init`": unary(lambda w: nn.init.constant_(w, 4)),
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
    "several names at once",
    {
        "`torch.cat`, `torch.stack` of names of one storage": on(lambda w: torch.cat([w, w.data, w[:1]])),
        "`torch._foreach_add` over names of one storage": on(lambda w: torch._foreach_add([w, w[4:]], 1)[1]),
        "a name and its kernel name in one operator": lambda layer: weight(layer).int().sum() * 2,
        "writes from eight threads": lambda layer: threads(layer),
    },
)
titled(
    "memory that would move",
    {
        "`resize_`": unary(lambda w: w.resize_(3)),
        "`set_`": unary(lambda w: w.set_(torch.zeros(6, 8, dtype=torch.uint8, device=w.device))),
        "`t_`, `as_strided_`, `unsqueeze_`": unary(lambda w: w.t_()),
        "`.data =` of another shape": unary(lambda w: setattr(w, "data", torch.zeros(5, dtype=torch.uint8))),
        "`share_memory_`": unary(lambda w: w.share_memory_()),
        "`torch.utils.swap_tensors`": lambda layer: torch.utils.swap_tensors(
            weight(layer), nn.Parameter(other(weight(layer)), False)
        ),
        "`nn.utils.parametrize`": lambda layer: parametrize(layer),
    },
)


def threads(layer: nn.Module) -> None:
    def write(row: int) -> None:
        for _ in range(20):
            weight(layer)[row].copy_(torch.full((8,), row + 50, dtype=torch.uint8))

    workers = [threading.Thread(target=write, args=(i % 6,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def swap(layer: nn.Module) -> None:
    torch.utils.swap_tensors(weight(layer), nn.Parameter(other(weight(layer)), False))


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x // 2


def parametrize(layer: nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer, W, _Double())


# -- raw memory ----------------------------------------------------------------------------------------------------------


def raw_bytes(layer: nn.Module) -> Tensor:
    storage = weight(layer).untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=weight(layer).device).set_(storage, 0, (48,), (1,)) + 0


def to_safetensors(layer: nn.Module) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file({W: weight(layer)}, Path(folder) / "x.safetensors")
        return safetensors.torch.load_file(Path(folder) / "x.safetensors")[W]


def from_safetensors(layer: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file({W: other(weight(layer)).cpu()}, Path(folder) / "x.safetensors")
        safetensors.torch.load_model(layer, Path(folder) / "x.safetensors")


def reduced(layer: nn.Module) -> Tensor:
    from multiprocessing.reduction import ForkingPickler

    sent = bytes(ForkingPickler.dumps(weight(layer)))
    return pickle.loads(sent) + 0


titled(
    "raw memory",
    {
        "`data_ptr` stays": on(lambda w: torch.tensor(w.data_ptr() != 0)),
        "`untyped_storage`": raw_bytes,
        "`.numpy()` (a read-only copy)": on(lambda w: torch.tensor(w.numpy().tolist())),
        "`numpy.asarray`": on(lambda w: torch.tensor(__import__("numpy").asarray(w).tolist())),
        "DLPack": on(lambda w: torch.utils.dlpack.from_dlpack(w) + 0),
        "`__cuda_array_interface__`": on(lambda w: w.__cuda_array_interface__),
        "safetensors `save_file` of the name": to_safetensors,
        "safetensors `load_model`": from_safetensors,
    },
)


# -- modules -------------------------------------------------------------------------------------------------------------


def state_dict(layer: nn.Module) -> Tensor:
    return layer.state_dict()[W] + 0


def through_a_file(value: Any, **kwargs: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


def load(layer: nn.Module, value: Tensor, **kwargs: Any) -> None:
    layer.load_state_dict({W: value}, **kwargs)


def functional_call(layer: nn.Module) -> Tensor:
    return torch.func.functional_call(layer, {W: other(weight(layer))}, (torch.ones(1, device=weight(layer).device),))


def replace(layer: nn.Module) -> Tensor:
    """setattr of another Parameter, then the forward without any verb."""
    layer.weight = nn.Parameter(other(weight(layer)), requires_grad=False)
    return forward(layer)


titled(
    "modules",
    {
        "`state_dict` values": state_dict,
        "`named_parameters` counts it once": lambda layer: torch.tensor(
            [len(list(layer.named_parameters())), len(layer.state_dict())]
        ),
        "`load_state_dict`": lambda layer: load(layer, other(weight(layer))),
        "`load_state_dict(assign=True)`": lambda layer: load(layer, other(weight(layer)), assign=True),
        "`load_state_dict(strict=False)` without it": lambda layer: layer.load_state_dict({}, strict=False) and None,
        "`load_state_dict` from another dtype": lambda layer: load(layer, other(weight(layer)).float()),
        "`load_state_dict` of another shape": lambda layer: load(layer, other(weight(layer))[:3]),
        "`torch.save` of the state dict": lambda layer: through_a_file(layer.state_dict(), weights_only=True)[W],
        "`torch.save` of the module": lambda layer: through_a_file(layer, weights_only=False).weight + 0,
        "`copy.deepcopy` of the name": on(lambda w: copy.deepcopy(w) + 0),
        "`copy.deepcopy` of the module": lambda layer: copy.deepcopy(layer).weight + 0,
        "`pickle` of the name": on(lambda w: pickle.loads(pickle.dumps(w)) + 0),
        "the name sent to another process": reduced,
        "`Module.to(dtype)`, `half`": lambda layer: layer.scale_like_half(),
        "`Module.cpu`, `to(device)` where it is": lambda layer: layer.to(weight(layer).device) and None,
        '`Module.to("meta")`, then the forward': lambda layer: forward(layer.to("meta")),
        "`Module.to_empty`, then the forward": lambda layer: forward(layer.to_empty(device=weight(layer).device)),
        "`requires_grad_`": unary(lambda w: w.requires_grad_()),
        "`functional_call` with another weight": functional_call,
        "`setattr` of another Parameter, then the forward": replace,
    },
)


# -- forward -------------------------------------------------------------------------------------------------------------


def forward(layer: nn.Module) -> Tensor:
    return layer(torch.ones(1, device=weight(layer).device))


def compiled(layer: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, device=weight(layer).device))


def compiled_before(layer: nn.Module) -> Tensor:
    """Compiled while ready; the state came after."""
    return COMPILED[layer](torch.ones(1, device=weight(layer).device))


def exported(layer: nn.Module) -> Tensor:
    if registry_of(layer) is None:
        return forward(layer)
    program = torch.export.export(layer, (torch.ones(1, device=weight(layer).device),))
    return program.module()(torch.ones(1, device=weight(layer).device))


titled(
    "forward over the kernel name",
    {
        "eager": forward,
        "`torch.compile(fullgraph=True)`": compiled,
        "compiled before it became so": compiled_before,
        "`torch.export`": exported,
    },
)


# -- distributed ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def within_group(do: Callable[[Any], Any]) -> Face:
    def face(layer: nn.Module) -> Any:
        with one_rank(weight(layer).device):
            return do(layer)

    return face


def all_gather(layer: nn.Module) -> Tensor:
    out = [torch.empty(6, 8, dtype=torch.uint8, device=weight(layer).device)]
    dist.all_gather(out, weight(layer))
    return out[0]


def scatter(layer: nn.Module) -> None:
    dist.scatter(weight(layer).data, [other(weight(layer))], src=0)


def all_gather_into(layer: nn.Module) -> None:
    dist.all_gather_into_tensor(weight(layer).data, other(weight(layer)))


def mesh(layer: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(weight(layer).device.type, (1,))


def fully_shard(layer: nn.Module) -> Tensor:
    from torch.distributed.fsdp import fully_shard as shard

    shard(layer, mesh=mesh(layer))
    return forward(layer)


def fully_shard_ignoring(layer: nn.Module) -> Tensor:
    from torch.distributed.fsdp import fully_shard as shard

    layer.extra = nn.Linear(2, 2, device=weight(layer).device)
    shard(layer, mesh=mesh(layer), ignored_params={weight(layer)})
    return forward(layer)


def dtensor(layer: nn.Module) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(weight(layer), mesh(layer), [Replicate()]).full_tensor() + 0


def distribute_module(layer: nn.Module) -> Tensor:
    from torch.distributed.tensor import distribute_module as distribute

    distribute(layer, mesh(layer))
    return forward(layer)


titled(
    "torch.distributed (one rank, gloo or NCCL; more in `test_collectives.py`)",
    {
        "`broadcast`": within_group(lambda layer: dist.broadcast(weight(layer), src=0) and None),
        "`all_reduce`": within_group(lambda layer: dist.all_reduce(weight(layer)) and None),
        "`all_gather` of the name": within_group(all_gather),
        "`scatter` into the name": within_group(scatter),
        "`all_gather_into_tensor` the name": within_group(all_gather_into),
        "FSDP2 `fully_shard`": within_group(fully_shard),
        "FSDP2 `fully_shard(ignored_params=)`": within_group(fully_shard_ignoring),
        "`distribute_tensor` (DTensor)": within_group(dtensor),
        "`distribute_module`, then the forward": within_group(distribute_module),
    },
)
