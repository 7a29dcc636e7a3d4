"""Tensor parallelism by loaders: slicing while loading gives the bytes of slicing first, and the results add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4 import COMPRESSED_TENSORS, NvFp4LinearMethod, ShardedLoader
from aliasparam_nvfp4.errors import ShapeError

from .ordered import ordered
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
        assert torch.equal(layer.weight_prepared, ordered(layout.weight, whole["weight"][rows]))
        scale = ordered(layout.weight_scale, whole["weight_scale"].view(torch.uint8)[rows].view(torch.float8_e4m3fn))
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


# -- KV heads, AWQ, bad arguments ----------------------------------------------------------------------------------------


def create(partitions: tuple[int, ...], k: int, loader: ShardedLoader, **options: Any) -> Any:
    layer: Any = torch.nn.Module()
    dtype = options.pop("dtype", torch.bfloat16)
    layer.method = NvFp4LinearMethod("reference", **options)
    layer.method.create_weights(layer, k, partitions, k, sum(partitions), dtype, weight_loader=loader)
    return layer


@pytest.mark.parametrize("fused_in_the_file", [False, True])
def test_law_of_replicas_ranks_beyond_the_kv_heads_share_them(fused_in_the_file: bool) -> None:
    """Four ranks, two KV heads of 16: ranks 0 and 1 hold the first, 2 and 3 the second (QKVParallelLinear in the engines)."""
    partitions, k, size = (128, 32, 32), 48, 4
    whole = tensors(partitions, k)
    for rank in range(size):
        layer = create((32, 16, 16), k, ShardedLoader(rank, size, "column", replicas=(1, 2, 2)))
        if fused_in_the_file:
            for name, value in whole.items():
                layer.get_parameter(name).weight_loader(layer.get_parameter(name), value)
            layer.method.process_weights_after_loading(layer)
        else:
            load(layer, whole, partitions)
        head = rank // 2
        rows = [
            *range(32 * rank, 32 * rank + 32),
            *range(128 + 16 * head, 144 + 16 * head),
            *range(160 + 16 * head, 176 + 16 * head),
        ]
        for name in ("weight", "weight_scale"):
            held = layer.get_parameter(name).detach().clone().view(torch.uint8)
            assert torch.equal(held, whole[name].view(torch.uint8)[rows]), name


def test_awq_factors_are_divided_with_the_columns_and_shared_by_the_partitions() -> None:
    factor = torch.rand(96) + 0.5
    for rank in range(2):
        layer = create((32,), 48, ShardedLoader(rank, 2, "row"), pre_quant_scale=True)
        parameter = layer.get_parameter("pre_quant_scale")
        parameter.weight_loader(parameter, factor.bfloat16())
        assert torch.equal(parameter.detach(), factor.bfloat16()[48 * rank : 48 * rank + 48])

    layer = create((32, 16, 16), 48, ShardedLoader(1, 2, "column"), pre_quant_scale=True)
    parameter, first = layer.get_parameter("pre_quant_scale"), factor[:48].bfloat16()
    for shard in "qkv":
        parameter.weight_loader(parameter, first, shard)
    assert torch.equal(parameter.detach(), first)
    second = first * 2
    parameter.weight_loader(parameter, second, "k")  # the next load begins, in another order
    with pytest.raises(ShapeError, match="differ"):
        parameter.weight_loader(parameter, first, "q")
    parameter.weight_loader(parameter, second, "v")
    assert torch.equal(parameter.detach(), second)
    with pytest.raises(ShapeError, match="no such shard"):
        parameter.weight_loader(parameter, second, 3)


def test_awq_factors_are_cast_but_never_broadcast() -> None:
    layer = create((32,), 48, ShardedLoader(0, 1, "column"), pre_quant_scale=True, dtype=torch.float16)
    parameter = layer.get_parameter("pre_quant_scale")
    parameter.weight_loader(parameter, torch.ones(48, dtype=torch.bfloat16))
    for wrong in (torch.tensor(1.0), torch.ones(1), torch.ones(48, dtype=torch.uint8), torch.ones(48).to(torch.float8_e4m3fn)):
        with pytest.raises(ShapeError, match="does not fit"):
            parameter.weight_loader(parameter, wrong)


@pytest.mark.parametrize(
    ("rank", "size", "style", "replicas"),
    [
        (-1, 2, "column", ()),
        (5, 2, "row", ()),
        (0, 0, "row", ()),
        (0, 2, "colum", ()),
        (0, 4, "column", (1, 3)),
        (0, 4, "row", (1, 2)),
    ],
)
def test_a_loader_of_no_rank_or_style_is_refused(rank: int, size: int, style: Any, replicas: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"no such rank|unknown style|replicated"):
        ShardedLoader(rank, size, style, replicas)


def test_a_fused_tensor_that_does_not_fit_writes_nothing() -> None:
    layer = create((32, 16), 48, ShardedLoader(0, 2, "column"))
    whole = tensors((64, 32), 48)["weight"]
    layer.weight.weight_loader(layer.weight, whole)
    before = layer.weight.detach().clone()
    for wrong in (whole[:-2], torch.cat([whole, whole]), whole[:, :-8]):
        with pytest.raises(ShapeError):
            layer.weight.weight_loader(layer.weight, wrong)
    assert torch.equal(layer.weight.detach(), before)
