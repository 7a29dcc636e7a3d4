"""The laws on every example, and their bytes against another project's own functions."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import TensorSpec, memory_report, process
from aliasparam.errors import TransformError
from aliasparam.testing import check_method, machine_for, random_values
from examples import bf16_w13, fp8_ue8m0, marlin_int4, mxfp4_gpt_oss

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bf16 w13": bf16_w13.make_layer,
    "awq": marlin_int4.make_layer,
    "gptq": lambda: marlin_int4.make_layer(awq=False),
    "mxfp4": mxfp4_gpt_oss.make_layer,
    "fp8, UE8M0 bytes": fp8_ue8m0.make_layer,
    "fp8, f32 block scales": lambda: fp8_ue8m0.make_layer(scale_bytes=False),
}


def values(name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
    """f32 block scales must be powers of two; everything else may be anything."""
    if spec.dtype is torch.float32:
        return torch.randint(1, 250, spec.shape, generator=random).to(torch.int32).bitwise_left_shift(23).view(torch.float32)
    return random_values(spec, random)


def loaded(make: Callable[[], nn.Module], seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    layer, random = make(), torch.Generator().manual_seed(seed)
    checkpoint = {n: values(n, TensorSpec.of(p), random) for n, p in layer.named_parameters()}
    layer.load_state_dict({n: v.clone() for n, v in checkpoint.items()})
    process(layer)
    return layer, checkpoint


@pytest.mark.parametrize("name", LAYERS)
def test_laws_1_to_9_hold(name: str) -> None:
    report = check_method(LAYERS[name], values=values, name=name, examples=15)

    assert report.broken is None


class TestMarlinMachine_laws_1_to_9(
    machine_for(make=lambda device, aliasing: marlin_int4.make_layer(16, 64, 16).to(device), arithmetic=False)
):
    pass


def test_law_4_only_lossy_f32_scales_keep_a_copy() -> None:
    fallbacks = {name: [row.reason.code for row in memory_report(make()).fallbacks] for name, make in LAYERS.items()}

    assert {name: codes for name, codes in fallbacks.items() if codes} == {"fp8, f32 block scales": ["lossy"]}


def test_a_scale_that_is_no_power_of_two_is_refused() -> None:
    layer = fp8_ue8m0.make_layer(scale_bytes=False)
    layer.weight.copy_(torch.zeros(200, 256))
    layer.weight_scale_inv.fill_(0.3)

    with pytest.raises(TransformError, match="no power of two"):
        process(layer)


def test_dims_that_marlin_cannot_tile_are_refused_at_declaration() -> None:
    with pytest.raises(TransformError, match="N % 64"):
        marlin_int4.make_layer(64, 96)


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


# -- peers: SGLang -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128, 32), (128, 256, 64), (32, 64, 16)])
def test_marlin_bytes_are_sglangs(shape: tuple[int, int, int]) -> None:
    peer = pytest.importorskip("sglang.test.test_marlin_utils")
    utils = importlib.import_module("sglang.srt.layers.quantization.marlin_utils")
    k, n, group = shape
    awq, checkpoint = loaded(lambda: marlin_int4.make_layer(k, n, group))
    gptq, raw = loaded(lambda: marlin_int4.make_layer(k, n, group, awq=False))

    awq_order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    plain = marlin_int4.unpack(checkpoint["qweight"], -1).view(k, -1, 8)[..., awq_order.argsort()].reshape(k, n)
    assert torch.equal(peer.awq_pack(plain.int(), 4, k, n), checkpoint["qweight"])
    assert torch.equal(awq.qweight_marlin, peer.marlin_weights(plain.int(), k, n, 4, peer.get_weight_perm(4)))
    assert torch.equal(awq.scales_marlin, utils.marlin_permute_scales(checkpoint["scales"], k, n, group))
    assert torch.equal(awq.qzeros_marlin, utils.awq_to_marlin_zero_points(checkpoint["qzeros"], k // group, n, 4))

    rows = marlin_int4.unpack(raw["qweight"], -2).int()
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
