"""SGLang's own ModelOpt NVFP4 linear class on the CPU: equal bytes on a first load, and ours right where its second is wrong."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam_nvfp4 import NvFp4LinearMethod
from tests.nvfp4.backend_cases import REAL_SHAPES, flashinfer
from tests.nvfp4.test_linear import Layer, tensors

from .peers import nvfp4_config

#: SmolLM2's, Kimi-K2.5's and Qwen3's (narrowed), primes x 16, aligned and ragged: (partitions, K).
SHAPES = [
    *REAL_SHAPES,
    ((208,), 13 * 16),
    ((128, 128), 64),
    ((40,), 48),
    ((96,), 48),
    ((17, 5), 16),
]
BACKENDS = ["flashinfer_cutlass", "flashinfer_trtllm"]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sglang")
        module = importlib.import_module("sglang.srt.layers.quantization.modelopt_quant")

    class Platform:
        is_blackwell = is_sm100 = is_sm120 = True
        is_cuda = True

        def __getattr__(self, name: str) -> Any:
            return False

    monkeypatch.setattr(module, "get_platform", lambda: Platform())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    # FlashInfer's shuffle_matrix_sf_a swizzles by a CUDA kernel at its end; SGLang's own swizzle does the same in torch.
    swizzle = importlib.import_module("sglang.srt.layers.quantization.utils").swizzle_blockscale
    quantization = flashinfer("flashinfer.quantization.fp4_quantization")
    plain = lambda scale: swizzle(scale.view(torch.float8_e4m3fn)).view(torch.uint8).reshape(-1)  # noqa: E731
    monkeypatch.setattr(quantization, "block_scale_interleave", plain)
    return module


def peer_layer(module: Any, partitions: tuple[int, ...], k: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    utils = importlib.import_module("sglang.srt.layers.quantization.fp4_utils")

    class Backend:
        def __getattr__(self, name: str) -> Any:
            return lambda: name == f"is_{backend}"

    for owner in (module, utils):
        if hasattr(owner, "get_fp4_gemm_runner_backend"):
            monkeypatch.setattr(owner, "get_fp4_gemm_runner_backend", lambda: Backend())
    config = nvfp4_config(module)
    method = module.ModelOptFp4LinearMethod(config)
    layer = nn.Module()
    layer.method = method
    method.create_weights(layer, k, list(partitions), k, sum(partitions), torch.bfloat16, weight_loader=lambda *a: None)
    return layer


def fill(layer: Any, source: dict[str, Tensor]) -> None:
    for name, value in source.items():
        getattr(layer, name).data.copy_(value)


def ours(partitions: tuple[int, ...], k: int, backend: str, source: dict[str, Tensor], **options: Any) -> Any:
    layer = Layer(NvFp4LinearMethod(backend, **options), partitions, k)
    fill(layer, source)
    layer.method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("partitions", "k"), SHAPES)
def test_bytes_are_sglangs(partitions: tuple[int, ...], k: int, backend: str, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tensors(partitions, k)
    theirs = peer_layer(peer, partitions, k, backend, monkeypatch)
    fill(theirs, source)
    theirs.method.process_weights_after_loading(theirs)
    layer = ours(partitions, k, backend, source)

    assert torch.equal(layer.weight_prepared, theirs.weight.data)
    assert torch.equal(
        layer.weight_scale_interleaved.view(torch.uint8).reshape(-1),
        theirs.weight_scale_interleaved.data.view(torch.uint8).reshape(-1),
    )
    assert torch.equal(layer.alpha.reshape(()), theirs.alpha.data.reshape(()))
    assert torch.equal(layer.input_scale_inv.reshape(()), theirs.input_scale_inv.data.reshape(()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_processing_twice_is_wrong_there_and_right_here(backend: str, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tensors((128,), 64)
    theirs = peer_layer(peer, (128,), 64, backend, monkeypatch)
    fill(theirs, source)
    theirs.method.process_weights_after_loading(theirs)
    weight, first = theirs.weight.data.clone(), theirs.weight_scale_interleaved.data.clone()
    theirs.method.process_weights_after_loading(theirs)
    assert not torch.equal(theirs.weight_scale_interleaved.data.view(torch.uint8), first.view(torch.uint8)), "swizzled twice"
    if backend == "flashinfer_trtllm":
        assert not torch.equal(theirs.weight.data, weight), "shuffled twice"

    layer = ours((128,), 64, backend, source)
    layer.method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight_prepared, weight)
    assert torch.equal(layer.weight_scale_interleaved.view(torch.uint8).reshape(-1), first.view(torch.uint8).reshape(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ragged_second_load_fails_there_and_is_right_here(backend: str, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    partitions, k = (96,), 48
    theirs = peer_layer(peer, partitions, k, backend, monkeypatch)
    fill(theirs, tensors(partitions, k))
    theirs.method.process_weights_after_loading(theirs)
    with pytest.raises(RuntimeError, match="must match"):
        fill(theirs, tensors(partitions, k, seed=1))

    layer = ours(partitions, k, backend, tensors(partitions, k))
    fill(layer, tensors(partitions, k, seed=1))
    layer.method.process_weights_after_loading(layer)
    again = peer_layer(peer, partitions, k, backend, monkeypatch)
    fill(again, tensors(partitions, k, seed=1))
    again.method.process_weights_after_loading(again)
    assert torch.equal(layer.weight_prepared, again.weight.data), "as SGLang's own first load of it"
    swizzled = again.weight_scale_interleaved.data.view(torch.uint8).reshape(-1)
    assert torch.equal(layer.weight_scale_interleaved.view(torch.uint8).reshape(-1), swizzled)


def test_fused_qkv_with_different_scales_is_silently_wrong_there(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alpha for all columns: SGLang takes the largest; here the other columns are scaled, exactly."""
    partitions, k = (32, 32), 64
    source = tensors(partitions, k)
    source["weight_scale_2"] = torch.tensor([0.002, 0.001])
    theirs = peer_layer(peer, partitions, k, "flashinfer_cutlass", monkeypatch)
    fill(theirs, source)
    theirs.method.process_weights_after_loading(theirs)

    layer = ours(partitions, k, "flashinfer_cutlass", source, column_scales=True)
    assert torch.equal(layer.alpha.reshape(()), theirs.alpha.data.reshape(()))
    assert layer.output_scale.tolist() == [1.0] * 32 + [0.5] * 32
