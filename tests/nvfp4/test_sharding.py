"""Tensor parallelism by loaders: slicing while loading gives the bytes of slicing first, and the results add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4 import COMPRESSED_TENSORS, NvFp4LinearMethod, ShardedLoader
from aliasparam_nvfp4.errors import ShapeError

from .test_linear import Layer, tensors


def load(layer: Any, source: dict[str, Tensor], partitions: tuple[int, ...]) -> None:
    for name, value in source.items():
        parameter = layer.get_parameter(name)
        parts = value.split(list(partitions)) if value.dim() == 2 else list(value)
        for index, part in enumerate(parts):
            parameter.weight_loader(parameter, part, index)
    layer.method.process_weights_after_loading(layer)


def sharded(partitions: tuple[int, ...], k: int, size: int, style: Any, backend: str = "reference") -> list[Any]:
    layers = []
    for rank in range(size):
        method = NvFp4LinearMethod(backend)
        layer: Any = torch.nn.Module()
        layer.method = method
        own = tuple(p // size for p in partitions) if style == "column" else partitions
        own_k = k if style == "column" else k // size
        loader = ShardedLoader(rank, size, style)
        method.create_weights(layer, own_k, own, k, sum(partitions), torch.bfloat16, weight_loader=loader)
        load(layer, tensors(partitions, k), partitions)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["flashinfer_cutlass", "flashinfer_trtllm"])
def test_column_shards_are_the_bytes_of_slicing_first(size: int, backend: str) -> None:
    partitions, k = (256, 64, 64), 128
    whole = tensors(partitions, k)
    for rank, layer in enumerate(sharded(partitions, k, size, "column", backend)):
        rows = torch.cat([p.chunk(size)[rank] for p in torch.arange(sum(partitions)).split(list(partitions))])
        layout = layer.nvfp4_backend.layout
        assert torch.equal(layer.weight_prepared, layout.weight.forward(whole["weight"][rows]))
        scale = layout.weight_scale.forward(whole["weight_scale"].view(torch.uint8)[rows].view(torch.float8_e4m3fn))
        assert torch.equal(layer.weight_scale_interleaved.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_results_are_the_whole_ones(size: int) -> None:
    x = torch.randn(3, 128)
    (whole,) = sharded((256, 64, 64), 128, 1, "column")
    columns = [layer.method.apply(layer, x) for layer in sharded((256, 64, 64), 128, size, "column")]
    by_partition = [torch.cat([c.split([256 // size, 64 // size, 64 // size], -1)[i] for c in columns], -1) for i in range(3)]
    assert torch.equal(torch.cat(by_partition, -1), whole.method.apply(whole, x))

    (whole,) = sharded((96,), 256, 1, "row")
    y = torch.randn(3, 256)
    parts = [
        layer.method.apply(layer, part) for layer, part in zip(sharded((96,), 256, size, "row"), y.chunk(size, -1), strict=True)
    ]
    assert torch.allclose(torch.stack(parts).sum(0), whole.method.apply(whole, y), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_divided_is_refused() -> None:
    layer = Layer(NvFp4LinearMethod("reference"), (32,), 48)

    with pytest.raises(ShapeError, match="cannot be divided"):
        ShardedLoader(0, 5, "column")(layer.weight, tensors((32,), 48)["weight"])


def test_compressed_tensors_scales_are_reciprocals_and_combine_with_min() -> None:
    source = tensors((32, 16), 48)
    layer = Layer(NvFp4LinearMethod("reference", checkpoint=COMPRESSED_TENSORS), (32, 16), 48)
    plain = Layer(NvFp4LinearMethod("reference"), (32, 16), 48)
    source["input_scale"] = torch.tensor([0.001, 0.002])
    load(plain, source, (32, 16))
    renamed = {
        "weight_packed": source["weight"],
        "weight_scale": source["weight_scale"],
        "weight_global_scale": 1 / source["weight_scale_2"],
        "input_global_scale": 1 / source["input_scale"],
    }
    load(layer, renamed, (32, 16))
    x = torch.randn(4, 48)

    assert torch.allclose(layer.alpha, plain.alpha, rtol=1e-6)
    assert layer.input_scale_inv.item() == renamed["input_global_scale"].min().item()
    assert torch.allclose(layer(x), plain(x), rtol=1e-4, atol=1e-4)
