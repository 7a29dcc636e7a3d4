"""NvFp4LinearMethod: the engines' calling convention, on aligned and ragged dims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict, reload
from aliasparam.errors import StaleKernelError, StateError
from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.errors import BackendError, ScaleError, ShapeError
from aliasparam_nvfp4.linear.backends import linear_backends
from aliasparam_nvfp4.quantize.codec import dequantize, quantize, quantize_activation

SHAPES = [((576, 192, 192), 576), ((1536, 1536), 576), ((576,), 1536), ((128, 128), 64), ((40,), 48), ((17, 5), 16)]


class Layer(nn.Module):
    def __init__(self, method: NvFp4LinearMethod, partitions: tuple[int, ...], k: int, device: Any = "cpu") -> None:
        super().__init__()
        self.method = method
        with torch.device(device):
            method.create_weights(self, k, list(partitions), k, sum(partitions), torch.bfloat16, tag="kept")

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


def tensors(partitions: tuple[int, ...], k: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sum(partitions), k, generator=generator)
    packed, scale, total = quantize(weight)
    p = len(partitions)
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": total.repeat(p),
        "input_scale": torch.rand(p, generator=generator) * 0.002 + 0.001,
    }


def expected(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The same sum from checkpoint tensors, in float64."""
    scale = t["input_scale"].max()
    codes, blocks = quantize_activation(x, (1 / scale).reshape(1))
    a = dequantize(codes, blocks, torch.ones(())).double()
    w = dequantize(t["weight"], t["weight_scale"], torch.ones(())).double()
    return (a @ w.T) * (scale.double() * t["weight_scale_2"][0].double())


@pytest.mark.parametrize(("partitions", "k"), SHAPES)
def test_apply_reads_kernel_bytes_and_gives_the_reference_result(
    partitions: tuple[int, ...], k: int, device: torch.device
) -> None:
    layer, source = Layer(NvFp4LinearMethod("reference"), partitions, k, device), tensors(partitions, k)
    with reload(layer) as session:
        session.load({n: t.to(device) for n, t in source.items()})
    x = torch.randn(7, k)

    out = layer(x.to(device)).cpu()

    assert torch.allclose(out.double(), expected(x, source), rtol=1e-4, atol=1e-4)
    assert all(
        torch.equal(v.cpu().view(torch.uint8), source[n].view(torch.uint8)) for n, v in checkpoint_state_dict(layer).items()
    )


@pytest.mark.parametrize(("partitions", "k"), SHAPES)
def test_law_3_and_9_a_second_load_keeps_addresses_and_equals_a_cold_one(partitions: tuple[int, ...], k: int) -> None:
    method = NvFp4LinearMethod("flashinfer_cutlass")  # loads and processes without its GPU
    warm, cold = Layer(method, partitions, k), Layer(method, partitions, k)
    for seed in (1, 2):
        with reload(warm) as session:
            session.load(tensors(partitions, k, seed))
        if seed == 1:
            addresses = {n: b.data_ptr() for n, b in warm.named_buffers()}
    with reload(cold) as session:
        session.load(tensors(partitions, k, 2))

    assert {n: b.data_ptr() for n, b in warm.named_buffers()} == addresses
    assert warm.weight.data_ptr() == warm.weight_prepared.data_ptr()
    assert warm.weight_scale.data_ptr() == warm.weight_scale_interleaved.data_ptr()
    for (name, a), (_, b) in zip(warm.named_buffers(), cold.named_buffers(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_shards_load_by_the_engines_convention() -> None:
    partitions, k = (576, 192, 192), 576
    whole = tensors(partitions, k)
    layer = Layer(NvFp4LinearMethod("reference"), partitions, k)
    start = 0
    for index, (shard, size) in enumerate(zip("qkv", partitions, strict=True)):
        for name in ("weight", "weight_scale"):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, whole[name][start : start + size], shard)
        for name in ("weight_scale_2", "input_scale"):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, whole[name][index], shard)
        start += size
    layer.method.process_weights_after_loading(layer)

    assert layer.weight.tag == "kept"
    assert all(torch.equal(v.view(torch.uint8), whole[n].view(torch.uint8)) for n, v in checkpoint_state_dict(layer).items())
    with pytest.raises(ShapeError, match="does not fit"):
        layer.weight.weight_loader(layer.weight, whole["weight"][:10], "q")
    with pytest.raises(ShapeError, match="no such shard"):
        layer.weight.weight_loader(layer.weight, whole["weight"], "x")
    assert layer.method.process_weights_after_loading(layer) is None  # nothing was written by the refused shards


def test_inputs_of_any_rank_bias_and_empty_batches() -> None:
    layer = Layer(NvFp4LinearMethod("reference"), (32,), 48)
    with reload(layer) as session:
        session.load(tensors((32,), 48))
    x = torch.randn(2, 3, 48, dtype=torch.bfloat16)
    bias = torch.randn(32, dtype=torch.bfloat16)

    out = layer.method.apply(layer, x, bias)

    assert out.shape == (2, 3, 32)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, layer(x) + bias)
    assert torch.equal(layer(x)[1], layer(x[1]))
    assert layer(x[:0]).shape == (0, 3, 32)
    assert layer(x.half()).dtype is torch.float16
    with pytest.raises(ShapeError, match="does not fit"):
        layer(torch.randn(2, 47))


def test_a_layer_that_was_not_loaded_refuses() -> None:
    layer = Layer(NvFp4LinearMethod("reference"), (32,), 48)

    with pytest.raises(StateError, match="'empty'"):
        layer.method.process_weights_after_loading(layer)
    with pytest.raises(StaleKernelError):
        layer(torch.randn(1, 48))


@pytest.mark.parametrize("ratio", [0.25, 0.799, 1e-4])
def test_partition_scales_that_differ_are_right(ratio: float) -> None:
    """SGLang takes the largest for all (its PR 25190 keeps that); here every column gets its own scale."""
    layer = Layer(NvFp4LinearMethod("reference", column_scales=True), (32, 16), 48)
    source = tensors((32, 16), 48)
    source["weight_scale_2"] = torch.tensor([0.002, 0.002 * ratio])
    with reload(layer) as session:
        session.load(source)
    x = torch.randn(5, 48)

    by_partition = [
        expected(x, {**source, "weight": source["weight"][a:b], "weight_scale": source["weight_scale"][a:b], "weight_scale_2": s})
        for a, b, s in ((0, 32, source["weight_scale_2"][:1]), (32, 48, source["weight_scale_2"][1:]))
    ]
    for wanted, found in zip(by_partition, layer(x).double().split((32, 16), -1), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    with reload(layer) as session:  # and equal scales later are right too
        session.load(tensors((32, 16), 48))
    assert torch.allclose(layer(x).double(), expected(x, tensors((32, 16), 48)), rtol=1e-4, atol=1e-4)


def test_a_layer_made_for_equal_scales_refuses_different_ones() -> None:
    """A captured graph has no multiplication of the columns, so it cannot get one by a reload."""
    layer = Layer(NvFp4LinearMethod("reference"), (32, 32), 48)
    with reload(layer) as session:
        session.load(tensors((32, 32), 48))
    source = tensors((32, 32), 48, seed=1)
    source["weight_scale_2"][1] *= 2

    with pytest.raises(ScaleError, match="column_scales=True"), reload(layer) as session:
        session.load(source)


def test_nan_block_scales_of_a_zero_tensor_are_refused_by_name() -> None:
    layer, source = Layer(NvFp4LinearMethod("reference"), (32,), 48), tensors((32,), 48)
    source["weight_scale"].view(torch.uint8)[3, 1] = 0x7F

    with pytest.raises(ScaleError, match="block scales are NaN"), reload(layer) as session:
        session.load(source)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_input_scale_that_is_none_is_refused(value: float) -> None:
    layer = Layer(NvFp4LinearMethod("reference"), (32,), 48)
    source = tensors((32,), 48)
    source["input_scale"][0] = value

    with pytest.raises(ScaleError, match="not a scale"), reload(layer) as session:
        session.load(source)


def test_bad_dims_and_backends_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiple of 16"):
        Layer(NvFp4LinearMethod("reference"), (32,), 40)
    with pytest.raises(BackendError, match="unknown linear backend"):
        NvFp4LinearMethod("flashinfer")
    assert NvFp4LinearMethod("auto").backend.name in linear_backends()


def test_a_blackwell_backend_refuses_to_run_elsewhere() -> None:
    layer = Layer(NvFp4LinearMethod("flashinfer_cutlass"), (32,), 48)
    with reload(layer) as session:
        session.load(tensors((32,), 48))

    with pytest.raises(BackendError, match=r"needs a GPU of compute capability 10\.0"):
        layer(torch.randn(1, 48))
