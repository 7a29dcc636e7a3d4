"""Every linear backend without its hardware: bytes against FlashInfer's own preparation, an emulator, and the call."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam import TensorSpec, check_inverse, checkpoint_state_dict, memory_report, reload
from aliasparam.errors import PointerError
from aliasparam_nvfp4 import NvFp4LinearMethod, emulate, retarget
from aliasparam_nvfp4.backends import LinearBackend, linear_backends
from aliasparam_nvfp4.errors import BackendError, ShapeError
from aliasparam_nvfp4.layouts import (
    PackFragments,
    ShuffleRows,
    Swizzle8x4,
    Swizzle128x4,
    mma_view,
    up_gate_blocks,
    up_gate_shuffled,
)

from .test_linear import Layer, tensors

BACKENDS = list(linear_backends().values())
#: SmolLM2's, Kimi-K2.5's and Qwen3's (narrowed), primes x 16, and tiny ones: (partitions, K).
SHAPES = [
    ((576, 192, 192), 576),
    ((1536, 1536), 576),
    ((576,), 1536),
    ((512,), 7168),
    ((256, 128), 2048),
    ((64,), 17 * 16),
    ((128,), 13 * 16),
]
RAGGED = [((40,), 48), ((17, 5), 16), ((300,), 11 * 16), ((7,), 64)]


def flashinfer(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, exc_type=ImportError)


def made(backend: LinearBackend, partitions: tuple[int, ...], k: int, device: Any = "cpu", **options: Any) -> Any:
    layer = Layer(NvFp4LinearMethod(backend.name, **options), partitions, k, device)
    with reload(layer) as session:
        session.load({n: t.to(device) for n, t in tensors(partitions, k).items()})
    return layer


def takes(backend: LinearBackend, n: int) -> bool:
    return backend.layout.name != "fragments" or n % 64 == 0


CASES = [(b, p, k) for b in BACKENDS for p, k in (*SHAPES, *RAGGED) if takes(b, sum(p))]


# -- (b) an emulator reads the bytes by the kernel's index formula ---------------------------------------------------------


@pytest.mark.parametrize(("backend", "partitions", "k"), CASES, ids=lambda v: getattr(v, "name", str(v)))
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


# -- (a) bytes equal FlashInfer's own preparation ------------------------------------------------------------------------


@pytest.mark.parametrize(("partitions", "k"), SHAPES)
def test_shuffled_bytes_are_flashinfers(partitions: tuple[int, ...], k: int) -> None:
    core = flashinfer("flashinfer")
    unswizzle = flashinfer("flashinfer.gemm.gemm_bf16_fp4")._unswizzle_sf_128x4
    layer, source = made(linear_backends()["flashinfer_trtllm"], partitions, k), tensors(partitions, k)
    n, padded = sum(partitions), -(-sum(partitions) // 128) * 128
    columns = -(-k // 64) * 64

    weight = torch.zeros(padded, columns // 2, dtype=torch.uint8)
    weight[:n, : k // 2] = source["weight"]
    assert torch.equal(layer.weight_prepared, core.shuffle_matrix_a(weight, 128))
    scales = torch.zeros(padded, columns // 16, dtype=torch.uint8)
    scales[:n, : k // 16] = source["weight_scale"].view(torch.uint8)
    rows = core.shuffle_matrix_a(scales, 128)
    found = unswizzle(layer.weight_scale_interleaved.view(torch.uint8).reshape(-1), padded, columns // 16)
    assert torch.equal(found.view(torch.uint8).view(rows.shape), rows)


@pytest.mark.parametrize(("partitions", "k"), SHAPES + RAGGED)
def test_w4a16_operands_are_flashinfers(partitions: tuple[int, ...], k: int) -> None:
    gemm, n = flashinfer("flashinfer.gemm.gemm_bf16_fp4"), sum(partitions)
    source = tensors(partitions, k)
    swizzled = Swizzle128x4().forward(source["weight_scale"])

    cudnn = made(linear_backends()["flashinfer_cudnn_w4a16"], partitions, k)
    weight, scales, _ = gemm.prepare_bf16_fp4_weights(source["weight"], swizzled, torch.ones(1), backend="cudnn")
    assert torch.equal(cudnn.weight_prepared, weight)
    assert torch.equal(cudnn.weight_scale_interleaved.view(torch.uint8), scales.view(torch.uint8))

    if n % 64 == 0:
        sm12x = flashinfer("flashinfer.gemm.gemm_bf16_fp4_cute_dsl")
        layer = made(linear_backends()["flashinfer_cutedsl_w4a16_sm12x"], partitions, k)
        weight, scales, _ = sm12x._prepare_cute_dsl_sm12x(source["weight"], swizzled, torch.ones(1), 16)
        assert torch.equal(layer.weight_prepared.view(torch.int32), weight)
        assert torch.equal(layer.weight_scale_interleaved, scales)


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_gate_up_orders_are_flashinfers(rows: int) -> None:
    core = flashinfer("flashinfer.fused_moe.core")
    prepare = flashinfer("flashinfer.fused_moe.prepare")
    gate_up = torch.randint(0, 256, (rows, 8), dtype=torch.uint8)
    up_gate = gate_up.roll(rows // 2, 0)

    indices = core._maybe_get_cached_w3_w1_permute_indices({}, up_gate, 128)
    assert torch.equal(up_gate_shuffled().forward(gate_up), up_gate[indices])
    assert torch.equal(up_gate_blocks(64).forward(gate_up), prepare._interleave_linear_and_gate(up_gate[None], 64, 1)[0])
    assert torch.equal(ShuffleRows(128).forward(gate_up), gate_up[core.get_w2_permute_indices_with_cache({}, gate_up, 128)])
    assert torch.equal(ShuffleRows(64).forward(gate_up), flashinfer("flashinfer").shuffle_matrix_a(gate_up, 64))


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


# -- (c) the call binds to the installed FlashInfer -------------------------------------------------------------------------

CALLED = [b for b in BACKENDS if b.call in ("mm_fp4", "mm_bf16_fp4")]


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("backend", CALLED, ids=lambda b: b.name)
def test_the_call_binds_to_flashinfers_signature_and_passes_its_checks(
    backend: LinearBackend, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fi, base = flashinfer("flashinfer"), flashinfer("flashinfer.gemm.gemm_base")
    weight_only = flashinfer("flashinfer.gemm.gemm_bf16_fp4")
    n, k = (64, 48) if backend.layout.name == "fragments" else (40, 48)
    layer = made(backend, (n,), k)
    quantizer, calls = inspect.signature(fi.fp4_quantize), {}

    def fp4_quantize(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x, scale = quantizer.bind(*args, **kwargs).args[:2]
        assert scale.dtype is torch.float32 and scale.numel() == 1 and x.dtype is torch.bfloat16
        blocks = torch.zeros(-(-x.shape[0] // 128) * 128, -(-x.shape[1] // 64) * 4, dtype=torch.uint8)
        return torch.zeros(x.shape[0], x.shape[1] // 2, dtype=torch.uint8), blocks

    def recorder(name: str) -> Any:
        signature = inspect.signature(getattr(fi, name))

        def record(*args: Any, **kwargs: Any) -> Tensor:
            bound = signature.bind(*args, **kwargs)
            calls[name] = bound.arguments
            rows = bound.arguments["a"].shape[0]
            columns = bound.arguments["b"].shape[1] if name == "mm_fp4" else n
            return torch.zeros(rows, columns, dtype=bound.arguments["out_dtype"])

        return record

    monkeypatch.setattr(fi, "fp4_quantize", fp4_quantize)
    for name in ("mm_fp4", "mm_bf16_fp4"):
        monkeypatch.setattr(fi, name, recorder(name))
    monkeypatch.setattr("aliasparam_nvfp4.linear._need_running", lambda backend, device: None)

    out = layer(torch.randn(tokens, k, dtype=torch.bfloat16))

    assert out.shape == (tokens, n) and out.dtype is torch.bfloat16
    call = calls[backend.call]
    check = base._check_mm_fp4_problem_size if backend.call == "mm_fp4" else weight_only._check_mm_bf16_fp4_problem_size
    accepted = inspect.signature(check).parameters
    assert check(**{a: v for a, v in call.items() if a in accepted}) in (True, None)
    if backend.call == "mm_fp4":
        padded_n, padded_k = (128, 64) if backend.layout.name == "shuffled" else (64, 64)
        assert (call["a"].shape, call["b"].shape) == ((tokens, padded_k // 2), (padded_k // 2, padded_n))
        assert call["b"].stride() == (1, padded_k // 2), "column-major"
        assert call["b_descale"].shape == (4, 128)
        assert call["alpha"].dtype is torch.float32 and call["alpha"].numel() == 1
        assert call["backend"] in inspect.getsource(base.mm_fp4) or call["backend"] in str(inspect.signature(fi.mm_fp4))
        for major, minor in backend.capabilities:
            assert _supported(base.mm_fp4, call["backend"], 10 * major + minor)
    else:
        assert call["b"].dtype is (torch.int32 if backend.layout.name == "fragments" else torch.uint8)
        for major, minor in backend.capabilities:
            assert _supported(weight_only.mm_bf16_fp4, call["backend"], 10 * major + minor)


def _supported(function: Any, backend: str, capability: int) -> bool:
    return bool(function.is_backend_supported(backend, capability))


def test_the_low_latency_kernel_is_for_few_tokens() -> None:
    backend: Any = linear_backends()["flashinfer_cutedsl_low_latency"]

    assert [backend.kernel_for(m, 128) for m in (1, 8, 9)] == ["cutedsl_low_latency", "cutedsl_low_latency", "cute-dsl"]
    assert backend.kernel_for(1, 96) == "cute-dsl"


def test_the_mma_view_moves_nothing_and_reads_by_its_formula() -> None:
    scales = torch.randint(0, 256, (300, 10), dtype=torch.uint8)
    swizzled = Swizzle128x4().forward(scales)

    view = mma_view(swizzled, 300, 10)

    assert view.shape == (32, 4, 3, 4, 3, 1) and view.data_ptr() == swizzled.data_ptr()
    r, c = torch.meshgrid(torch.arange(300), torch.arange(10), indexing="ij")
    assert torch.equal(view[r % 32, (r % 128) // 32, r // 128, c % 4, c // 4, 0], scales)


@pytest.mark.parametrize("shape", [(8, 4), (13, 5), (1, 1), (128, 12)])
def test_8x4_tiles_by_their_formula(shape: tuple[int, int]) -> None:
    scales = torch.randint(1, 256, shape, dtype=torch.uint8)
    flat, padded = Swizzle8x4().forward(scales).reshape(-1), -(-shape[1] // 4) * 4

    for r in range(shape[0]):
        for c in range(shape[1]):
            assert flat[(r // 8) * 8 * padded + (c // 4) * 32 + (r % 8) * 4 + c % 4] == scales[r, c]
    check_inverse(Swizzle8x4(), TensorSpec(shape, torch.uint8))


@pytest.mark.parametrize(
    "transform", [PackFragments(), ShuffleRows(128), ShuffleRows(64), up_gate_blocks(64), up_gate_shuffled()]
)
def test_layouts_invert(transform: Any) -> None:
    check_inverse(transform, TensorSpec((3, 256, 24), torch.uint8))


# -- retarget ------------------------------------------------------------------------------------------------------------

MOVABLE = [b for b in BACKENDS if b.layout.name != "fragments"]


@pytest.mark.parametrize(("partitions", "k"), [((128, 128), 128), ((576, 192, 192), 576), ((300,), 176)])
def test_retarget_moves_a_loaded_layer_between_all_formats_in_place(partitions: tuple[int, ...], k: int) -> None:
    names = tuple(b.name for b in MOVABLE)
    layer = made(linear_backends()["flashinfer_cutlass"], partitions, k, retarget_to=names)
    addresses = {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())}
    allocated = memory_report(layer).allocated_bytes

    for name in (*names, "flashinfer_trtllm", "flashinfer_cudnn_w4a16", "flashinfer_cutlass"):
        retarget(layer, name)
        cold = made(linear_backends()[name], partitions, k)
        assert layer.nvfp4_backend.name == name
        for kernel_name in ("weight_prepared", "weight_scale_interleaved"):
            warm = getattr(layer, kernel_name)
            assert torch.equal(warm.view(torch.uint8), getattr(cold, kernel_name).view(torch.uint8)), (name, kernel_name)
        assert {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())} == addresses
    assert memory_report(layer).allocated_bytes == allocated
    retarget(layer, "reference")
    x = torch.randn(2, k)
    assert torch.equal(layer(x), made(linear_backends()["reference"], partitions, k)(x))


def test_retarget_refuses_what_has_no_room_and_changes_nothing() -> None:
    layer = made(linear_backends()["flashinfer_cutlass"], (40,), 48)
    before = {n: t.clone() for n, t in layer.named_buffers()}

    with pytest.raises(PointerError, match="Plan room"):
        retarget(layer, "flashinfer_trtllm")

    assert layer.nvfp4_backend.name == "flashinfer_cutlass"
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in layer.named_buffers())


# -- W4A16, AWQ ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_activation_scales_needs_a_w4a16_backend() -> None:
    with pytest.raises(BackendError, match="no activation scales"):
        NvFp4LinearMethod("flashinfer_cutlass", input_scale=False)
    layer = Layer(NvFp4LinearMethod("reference", input_scale=False), (32,), 48)
    source = tensors((32,), 48)
    del source["input_scale"]
    with reload(layer) as session:
        session.load(source)
    x = torch.randn(3, 48)

    expected = emulate.linear("checkpoint", x, source["weight"], source["weight_scale"], source["weight_scale_2"], None, n=32)
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="no activation scales"):
        retarget(layer, "flashinfer_cutlass")


def test_awq_multiplies_the_input_features_first() -> None:
    plain = made(linear_backends()["reference"], (32,), 48)
    layer = Layer(NvFp4LinearMethod("reference", pre_quant_scale=True), (32,), 48)
    factor = torch.rand(48).to(torch.bfloat16) + 0.5
    with reload(layer) as session:
        session.load({**tensors((32,), 48), "pre_quant_scale": factor})
    x = torch.randn(3, 48, dtype=torch.bfloat16)

    assert torch.equal(layer(x), plain(x * factor))


def test_wrong_dtypes_are_refused_by_the_backends_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aliasparam_nvfp4.linear._need_running", lambda backend, device: None)
    flashinfer("flashinfer")
    for name in ("flashinfer_trtllm", "flashinfer_cudnn_w4a16"):
        with pytest.raises(ShapeError, match="bfloat16"):
            made(linear_backends()[name], (128,), 64)(torch.randn(1, 64, dtype=torch.float16))


def test_b12x_forgets_what_it_kept_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("moe_dispatch")
    module._WEIGHT_CACHE = {1: "old"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch", module)

    made(linear_backends()["flashinfer_b12x"], (32,), 64)

    assert module._WEIGHT_CACHE == {}
    names = importlib.import_module("aliasparam_nvfp4.backends.flashinfer_b12x")._CACHES
    assert any("moe_dispatch" in name for name in names)
