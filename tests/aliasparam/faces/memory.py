"""Memory that would move, raw memory, and kernel names written past the library."""

from __future__ import annotations

import pickle
import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from aliasparam import process, registry_of

from .titled import INVALIDATES, UNSEEN, W, each_refuses, flat, on, other, titled, unary, weight


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x // 2


titled(
    "memory that would move",
    {
        "`resize_`, `resize_as_`": each_refuses(
            lambda w: w.resize_(3), lambda w: w.resize_as_(torch.zeros(3, dtype=torch.uint8))
        ),
        "`set_`": unary(lambda w: w.set_(torch.zeros(6, 8, dtype=torch.uint8, device=w.device))),
        "`t_`, `as_strided_`, `unsqueeze_`, `transpose_`": each_refuses(
            lambda w: w.t_(), lambda w: w.as_strided_((2, 2), (1, 1)), lambda w: w.unsqueeze_(0), lambda w: w.transpose_(0, 1)
        ),
        "`out=` of another shape": unary(lambda w: torch.add(torch.ones(20, 8, dtype=torch.uint8, device=w.device), 1, out=w)),
        "`.data =` of another shape": unary(lambda w: setattr(w, "data", torch.zeros(5, dtype=torch.uint8))),
        "`share_memory_`": unary(lambda w: w.share_memory_()),
        "`torch.utils.swap_tensors`": lambda layer: torch.utils.swap_tensors(
            weight(layer), nn.Parameter(other(weight(layer)), False)
        ),
        "`nn.utils.parametrize`": lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, W, _Double()),
    },
)


# -- raw memory ------------------------------------------------------------------------------------------------------------


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
    return pickle.loads(bytes(ForkingPickler.dumps(weight(layer)))) + 0


def through_tvm_ffi(layer: nn.Module) -> Tensor:
    """How FlashInfer's kernels get their arguments."""
    import tvm_ffi

    return torch.from_dlpack(tvm_ffi.get_global_func("testing.echo")(weight(layer))) + 0


def shared_data(layer: nn.Module, name: Any) -> Tensor:
    shared = nn.Parameter(torch.zeros(6, 8, dtype=torch.uint8, device=weight(layer).device), requires_grad=False)
    shared.data = name
    return shared + 0


def freed(layer: nn.Module) -> Tensor:
    weight(layer).untyped_storage().resize_(0)
    return weight(layer) + 0


titled(
    "raw memory",
    {
        "`data_ptr` stays": on(lambda w: torch.tensor(w.data_ptr() != 0)),
        "`untyped_storage`": raw_bytes,
        "`.numpy()` (a read-only copy)": on(lambda w: torch.tensor(w.numpy().tolist())),
        "`numpy.asarray`": on(lambda w: torch.tensor(numpy.asarray(w).tolist())),
        "DLPack: `torch.from_dlpack(name)`": on(lambda w: torch.from_dlpack(w) + 0),
        "DLPack: `torch.utils.dlpack.to_dlpack(name)`": on(
            lambda w: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(w)) + 0
        ),
        "DLPack: the name as an argument of a tvm-ffi function": through_tvm_ffi,
        "DLPack: a tensor from elsewhere copied in": unary(lambda w: w.copy_(torch.from_dlpack(numpy.asarray(other(w).cpu())))),
        "`other.data = name`": lambda layer: shared_data(layer, weight(layer)),
        "`other.data = name.data`": lambda layer: shared_data(layer, weight(layer).data),
        "`__cuda_array_interface__`": on(lambda w: w.__cuda_array_interface__),
        "safetensors `save_file` of the name": to_safetensors,
        "safetensors `load_model`": from_safetensors,
        "the name sent to another process": reduced,
    },
)
UNSEEN |= {"DLPack: `torch.utils.dlpack.to_dlpack(name)`", "`other.data = name`", "`other.data = name.data`"}


# -- kernel names as targets -----------------------------------------------------------------------------------------------


def writing(layer: nn.Module, how: Any) -> Tensor:
    """Write the kernel name past the library, then go on as if nothing had happened: what was written there may not be served."""
    if registry_of(layer) is not None:
        how(layer.get_buffer("prepared"))
        process(layer)
    return flat(layer(torch.ones(1, device=weight(layer).device)))


_WRITERS = {
    "`buffer.copy_` (averaging, DDP's broadcast of buffers), then the verbs": lambda k: k.copy_(other(k, 77)),
    "`buffer.data.fill_`, then the verbs": lambda k: k.data.fill_(7),
    "`buffer[...] =`, then the verbs": lambda k: k.__setitem__(0, 7),
    "`torch.utils.swap_tensors(buffer, other)`, then the verbs": lambda k: torch.utils.swap_tensors(k, other(k, 77)),
    "`buffer.data = other`, then the verbs": lambda k: setattr(k, "data", other(k, 77)),
}
titled(
    "a kernel name written past the library",
    {title: (lambda layer, how=how: writing(layer, how)) for title, how in _WRITERS.items()},
)
INVALIDATES |= set(_WRITERS)
UNSEEN.add("`buffer.data.fill_`, then the verbs")
