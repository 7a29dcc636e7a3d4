"""The kernel-format bytes of the examples beside SGLang's own functions for them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from examples import bf16_w13, fp8_ue8m0, marlin_int4
from tests.examples.test_examples import loaded


def unpacked(words: torch.Tensor, along: int) -> torch.Tensor:
    """int32 words to nibbles u8, eight for each word along dim ``along``."""
    nibbles = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return (nibbles.transpose(-1, -2).flatten(-3, -2) if along == -2 else nibbles.flatten(-2)).to(torch.uint8)


@pytest.mark.parametrize("shape", [(64, 128, 32), (128, 256, 64), (32, 64, 16)])
def test_marlin_bytes_are_sglangs(shape: tuple[int, int, int]) -> None:
    peer = pytest.importorskip("sglang.test.test_marlin_utils")
    utils = importlib.import_module("sglang.srt.layers.quantization.marlin_utils")
    k, n, group = shape
    awq, checkpoint = loaded(lambda: marlin_int4.make_layer(k, n, group))
    gptq, raw = loaded(lambda: marlin_int4.make_layer(k, n, group, awq=False))

    awq_order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    plain = unpacked(checkpoint["qweight"], -1).view(k, -1, 8)[..., awq_order.argsort()].reshape(k, n)
    assert torch.equal(peer.awq_pack(plain.int(), 4, k, n), checkpoint["qweight"])
    assert torch.equal(awq.qweight_marlin, peer.marlin_weights(plain.int(), k, n, 4, peer.get_weight_perm(4)))
    assert torch.equal(awq.scales_marlin, utils.marlin_permute_scales(checkpoint["scales"], k, n, group))
    assert torch.equal(awq.qzeros_marlin, utils.awq_to_marlin_zero_points(checkpoint["qzeros"], k // group, n, 4))

    rows = unpacked(raw["qweight"], -2).int()
    assert torch.equal(gptq.qweight_marlin, peer.marlin_weights(rows, k, n, 4, peer.get_weight_perm(4)))


@pytest.fixture
def deep_gemm_helpers() -> Iterator[None]:
    """SGLang's torch form of DeepGEMM's packing needs two one-line helpers of that package, which needs a GPU to import."""
    utils = types.ModuleType("deep_gemm.utils")
    utils.align = lambda x, to: -(-x // to) * to  # type: ignore[attr-defined]
    utils.get_tma_aligned_size = lambda x, size: -(-x // (16 // size)) * (16 // size)  # type: ignore[attr-defined]
    modules = {"deep_gemm": types.ModuleType("deep_gemm"), "deep_gemm.utils": utils, "deep_gemm.utils.layout": utils}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    yield
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


@pytest.mark.parametrize(("n", "k"), [(200, 256), (256, 1024), (130, 640)])
def test_packed_scales_are_deep_gemms(n: int, k: int, deep_gemm_helpers: None) -> None:
    peer = pytest.importorskip("sglang.srt.layers.quantization.fp8_utils")
    layer, checkpoint = loaded(lambda: fp8_ue8m0.make_layer(n, k, scale_bytes=False))
    by_bytes, raw = loaded(lambda: fp8_ue8m0.make_layer(n, k))

    expected = peer.transform_scale_ue8m0(checkpoint["weight_scale_inv"], n, use_torch_impl=True)
    found = fp8_ue8m0.kernel_view(layer.scale_packed, n)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()

    exponents = (raw["weight_scale_inv"].int() << 23).view(torch.float32)
    assert torch.equal(
        fp8_ue8m0.kernel_view(by_bytes.scale_packed, n), peer._get_mn_major_tma_aligned_packed_ue8m0_tensor_torch_impl(exponents)
    )


def test_w13_bytes_are_sglangs() -> None:
    peer = pytest.importorskip("sglang.srt.layers.quantization.utils")
    layer, checkpoint = loaded(bf16_w13.make_layer)
    scale = torch.zeros(3, 8, 1)

    expected, _ = peer.reorder_w1w3_to_w3w1(checkpoint["w13_weight"].clone(), scale)

    assert torch.equal(layer.w13_prepared, expected)
