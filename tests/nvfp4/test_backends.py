"""Every linear backend without its hardware: bytes against FlashInfer's own preparation, and an emulator that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam import checkpoint_state_dict, reload
from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.layouts import mma_view, swizzle
from aliasparam_nvfp4.linear import emulate
from aliasparam_nvfp4.linear.backends import LinearBackend, linear_backends
from aliasparam_nvfp4.quantize.codec import dequantize

from .backend_cases import BACKENDS, CASES, RAGGED, SHAPES, flashinfer, made, takes
from .ordered import ordered
from .proofs import proves
from .test_linear import Layer, tensors

# -- (b) an emulator reads the bytes by the kernel's index formula ---------------------------------------------------------


@proves("emulator", "backend, partitions, k", CASES)
def test_an_emulator_of_the_kernel_reads_the_reference_result(
    backend: LinearBackend, partitions: tuple[int, ...], k: int
) -> None:
    layer, source, n = made(backend, partitions, k), tensors(partitions, k), sum(partitions)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    quantized = None if backend.weight_only else layer.input_scale_inv
    alpha = layer.weight_alpha if backend.weight_only else layer.alpha

    found = emulate.linear(backend.layout.name, x, layer.weight_prepared, layer.weight_scale_interleaved, alpha, quantized, n=n)
    expected = emulate.linear("checkpoint", x, source["weight"], source["weight_scale"], alpha, quantized, n=n)

    assert torch.equal(found, expected)
    assert all(torch.equal(v.view(torch.uint8), source[m].view(torch.uint8)) for m, v in checkpoint_state_dict(layer).items())


def edge_bytes(partitions: tuple[int, ...], k: int, *, signed: bool) -> dict[str, Tensor]:
    """Every code with -0, rows of zeros, zero blocks, the smallest and the largest scales, -0 and negative scales."""
    random, n = torch.Generator().manual_seed(k), sum(partitions)
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=random)
    weight[0], weight[1] = 0x88, 0
    scale = torch.randint(0, 256 if signed else 0x80, (n, k // 16), dtype=torch.uint8, generator=random)
    scale[(scale & 0x7F) == 0x7F] = 0x01
    scale[2], scale[3], scale[4], scale[5] = 0, 1, 0x7E, 0x80
    p = len(partitions)
    scales = {"weight_scale_2": torch.full((p,), 1e-3), "input_scale": torch.full((p,), 2e-3)}
    return {"weight": weight, "weight_scale": scale.view(torch.float8_e4m3fn), **scales}


EDGES = [(b, p, k) for b in BACKENDS for p, k in [((40,), 48), ((17, 5), 16), ((64,), 176), ((128, 64), 64)] if takes(b, sum(p))]


@pytest.mark.parametrize("signed", [False, True])
@proves("emulator", "backend, partitions, k", EDGES)
def test_edge_bytes_are_read_right_and_exported_bit_for_bit(
    backend: LinearBackend, partitions: tuple[int, ...], k: int, signed: bool
) -> None:
    source = edge_bytes(partitions, k, signed=signed and backend.layout.signed_scales)
    layer, n = made(backend, partitions, k, source=source), sum(partitions)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    quantized = None if backend.weight_only else layer.input_scale_inv
    alpha = layer.weight_alpha if backend.weight_only else layer.alpha

    found = emulate.linear(backend.layout.name, x, layer.weight_prepared, layer.weight_scale_interleaved, alpha, quantized, n=n)
    expected = emulate.linear("checkpoint", x, source["weight"], source["weight_scale"], alpha, quantized, n=n)

    assert torch.equal(found, expected)
    values = dequantize(source["weight"], source["weight_scale"], torch.ones(())).double()
    read = emulate.READERS[backend.layout.name](layer.weight_prepared, layer.weight_scale_interleaved, n, k)
    assert torch.equal(read, values), "every single weight, by torch's own e4m3"
    assert expected.abs().max() > 0 and expected[:, 1:3].abs().max() == 0
    assert all(torch.equal(v.view(torch.uint8), source[m].view(torch.uint8)) for m, v in checkpoint_state_dict(layer).items())


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_nan_scales_are_refused_by_every_backend(backend: LinearBackend, nan: int) -> None:
    source = tensors((64,), 64)
    source["weight_scale"].view(torch.uint8)[3, 1] = nan
    layer = Layer(NvFp4LinearMethod(backend.name), (64,), 64)

    with pytest.raises(ScaleError, match="block scales are NaN"), reload(layer) as session:
        session.load(source)


# -- (a) bytes equal FlashInfer's own preparation ------------------------------------------------------------------------

#: Checkpoint tensors and the layer to (FlashInfer's weight, its scales), and ours as the kernel takes them.
Oracle = Callable[[dict[str, Tensor], Any], tuple[Tensor, Tensor, Tensor, Tensor]]


def padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    out = torch.zeros(-(-tensor.shape[0] // rows) * rows, -(-tensor.shape[1] // columns) * columns, dtype=torch.uint8)
    out[: tensor.shape[0], : tensor.shape[1]] = tensor.view(torch.uint8)
    return out


def unswizzled(scales: Tensor) -> Tensor:
    function = flashinfer("flashinfer.gemm.gemm_bf16_fp4")._unswizzle_sf_128x4
    return function(scales.view(torch.uint8).reshape(-1), *scales.shape).view(torch.uint8).view(scales.shape)  # type: ignore[no-any-return]


def plain(source: dict[str, Tensor], layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, scales = padded(source["weight"], 32, 16), padded(source["weight_scale"], 128, 4)
    return weight, scales, layer.weight_prepared, unswizzled(layer.weight_scale_interleaved)


def shuffled(source: dict[str, Tensor], layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shuffle = flashinfer("flashinfer").shuffle_matrix_a
    weight, scales = shuffle(padded(source["weight"], 128, 32), 128), shuffle(padded(source["weight_scale"], 128, 4), 128)
    return weight, scales, layer.weight_prepared, unswizzled(layer.weight_scale_interleaved)


def prepared(function: str, *more: Any) -> Oracle:
    """By a function of FlashInfer's which ``prepare_bf16_fp4_weights`` calls."""

    def oracle(source: dict[str, Tensor], layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        module, _, name = function.rpartition(".")
        swizzled = ordered(swizzle(), source["weight_scale"])
        prepare = getattr(flashinfer(f"flashinfer.gemm.{module}"), name)
        weight, scales, _ = prepare(source["weight"], swizzled, torch.ones(1), 16, *more)
        return weight, scales, *layer.nvfp4_backend.operands(layer, layer.nvfp4_shape)

    return oracle


def untouched(source: dict[str, Tensor], layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cute-dsl-native takes what ``nvfp4_quantize`` gives: here FlashInfer's un-swizzle is the judge."""
    return (
        source["weight"],
        padded(source["weight_scale"], 128, 4),
        layer.weight_prepared,
        unswizzled(layer.weight_scale_interleaved),
    )


BY_KERNEL: dict[str, Oracle] = {
    "flashinfer_cudnn_w4a16": prepared("gemm_bf16_fp4_cudnn._prepare_cudnn"),
    "flashinfer_cutedsl_w4a16": prepared("gemm_bf16_fp4_cute_dsl._prepare_cute_dsl_sm100"),
    "flashinfer_cutedsl_w4a16_sm12x": prepared("gemm_bf16_fp4_cute_dsl._prepare_cute_dsl_sm12x"),
    "flashinfer_cutedsl_native_w4a16": untouched,
    "flashinfer_blackwell_native_w4a16": prepared("gemm_bf16_fp4_blackwell._prepare_blackwell_bf16_fp4", "blackwell-native"),
    "flashinfer_blackwell_tiled_w4a16": prepared("gemm_bf16_fp4_blackwell._prepare_blackwell_bf16_fp4", "blackwell-tiled"),
}
BY_LAYOUT: dict[str, Oracle] = {"plain": plain, "shuffled": shuffled}


@proves("bytes", "backend, partitions, k", CASES)
def test_bytes_are_flashinfers(
    backend: LinearBackend, partitions: tuple[int, ...], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blackwell = flashinfer("flashinfer.gemm.gemm_bf16_fp4_blackwell")
    monkeypatch.setattr(blackwell, "_require_blackwell_source_arch", lambda device: None)
    oracle = BY_KERNEL.get(backend.name) or BY_LAYOUT[backend.layout.name]
    layer = made(backend, partitions, k)

    weight, scales, our_weight, our_scales = oracle(tensors(partitions, k), layer)

    for theirs, ours in ((weight, our_weight), (scales, our_scales)):
        assert (ours.shape, ours.stride(), ours.element_size()) == (theirs.shape, theirs.stride(), theirs.element_size())
        flat = ours.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(flat, theirs.contiguous().view(-1).view(torch.uint8))


def test_the_mma_view_of_cutedsl_moves_nothing() -> None:
    layer = made(linear_backends()["flashinfer_cutedsl_w4a16"], (300,), 176)
    view = mma_view(layer.weight_scale_interleaved, 300, 11)

    assert view.data_ptr() == layer.weight_scale_interleaved.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize(("partitions", "k"), SHAPES + RAGGED)
def test_bytes_are_those_of_flashinfers_cuda_kernels(partitions: tuple[int, ...], k: int) -> None:
    core = flashinfer("flashinfer")
    source, n = tensors(partitions, k), sum(partitions)
    scales = source["weight_scale"].view(torch.uint8).cuda()
    layer = made(linear_backends()["flashinfer_cutlass"], partitions, k, "cuda")

    expected = core.nvfp4_block_scale_interleave(scales)
    assert torch.equal(layer.weight_scale_interleaved.view(torch.uint8).reshape(-1), expected.reshape(-1))

    padded = torch.zeros(-(-n // 128) * 128, -(-k // 64) * 4, dtype=torch.uint8, device="cuda")
    padded[:n, : k // 16] = scales
    shuffled = made(linear_backends()["flashinfer_trtllm"], partitions, k, "cuda")
    assert torch.equal(
        shuffled.weight_scale_interleaved.view(torch.uint8).reshape(-1), core.shuffle_matrix_sf_a(padded, 128).reshape(-1)
    )
