"""The kernel-format bytes of every example beside another project's own function for them.

One peer of each family is installed with the tests; SGLang's are in tests/engines/sglang/test_examples.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from examples import bf16_w13, fp8_ue8m0, marlin_int4, mxfp4_gpt_oss

from .test_examples import loaded

# -- peers: FlashInfer ---------------------------------------------------------------------------------------------------


def test_mxfp4_bytes_are_flashinfers() -> None:
    core = pytest.importorskip("flashinfer.fused_moe.core")
    unswizzle = importlib.import_module("flashinfer.gemm.gemm_bf16_fp4")._unswizzle_sf_128x4
    layer, checkpoint = loaded(mxfp4_gpt_oss.make_layer)

    for e in range(2):
        pairs = checkpoint["w13_weight"][e].view(-1, 2, 64).flip(1).reshape(128, 64)
        rows = core.get_w2_permute_indices_with_cache({}, pairs, 128)
        assert torch.equal(layer.w13_prepared[e], pairs[rows])
        assert torch.equal(
            layer.w2_prepared[e], checkpoint["w2_weight"][e][core.get_w2_permute_indices_with_cache({}, pairs, 128)]
        )

        scale = checkpoint["w13_weight_scale"][e].view(-1, 2, 4).flip(1).reshape(128, 4)
        rows = core.get_w2_permute_indices_with_cache({}, scale, 128, num_elts_per_sf=16)
        assert torch.equal(unswizzle(layer.w13_scale_prepared[e].reshape(-1), 128, 4), scale[rows])


# -- peers: FlashInfer's DeepGEMM and b12x ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(200, 256), (256, 1024), (130, 640)])
def test_packed_scales_are_those_of_flashinfers_deep_gemm(n: int, k: int) -> None:
    peer = pytest.importorskip("flashinfer.deep_gemm")
    layer, checkpoint = loaded(lambda: fp8_ue8m0.make_layer(n, k, scale_bytes=False))
    by_bytes, raw = loaded(lambda: fp8_ue8m0.make_layer(n, k))

    by_rows = checkpoint["weight_scale_inv"].repeat_interleave(128, 0)[:n]
    exponents = (raw["weight_scale_inv"].int() << 23).view(torch.float32)
    for scales, packed in ((by_rows, layer.scale_packed), (exponents, by_bytes.scale_packed)):
        expected, found = peer.get_col_major_tma_aligned_packed_tensor(scales), fp8_ue8m0.kernel_view(packed, n)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_w13_bytes_are_those_of_flashinfers_b12x() -> None:
    peer = pytest.importorskip("flashinfer.experimental.b12x.moe.fused_moe._impl")
    layer, checkpoint = loaded(lambda: bf16_w13.make_layer(3, 32, 64))
    weight, scale = checkpoint["w13_weight"].clone(), torch.zeros(3, 64, 2, dtype=torch.uint8)

    peer._ensure_w13_kernel_order_inplace(weight, scale, n=32, k=64, quant_mode="w4a8_mx")

    assert torch.equal(layer.w13_prepared, weight)


# -- peers: Quanto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128, 32), (128, 256, 64), (32, 64, 16)])
def test_marlin_bytes_are_quantos(shape: tuple[int, int, int]) -> None:
    pytest.importorskip("optimum.quanto")
    weights, awq = (importlib.import_module(f"optimum.quanto.tensor.weights.{name}.packed") for name in ("marlin.int4", "awq"))
    permute = importlib.import_module("optimum.quanto.tensor.weights.marlin.permutations").marlin_permute
    k, n, group = shape
    by_columns, checkpoint = loaded(lambda: marlin_int4.make_layer(k, n, group))
    by_rows, raw = loaded(lambda: marlin_int4.make_layer(k, n, group, awq=False))

    assert torch.equal(by_columns.qweight_marlin, weights.pack(awq.unpack(checkpoint["qweight"], reorder=True).t()))
    assert torch.equal(by_columns.scales_marlin, permute(checkpoint["scales"]))
    zeros = permute(awq.unpack(checkpoint["qzeros"], reorder=True))
    assert torch.equal(by_columns.qzeros_marlin, awq.pack(zeros, reorder=True))

    assert torch.equal(by_rows.qweight_marlin, weights.pack(awq.unpack(raw["qweight"].t().contiguous())))
    assert torch.equal(by_rows.scales_marlin, permute(raw["scales"]))
