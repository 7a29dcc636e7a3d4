"""How every backend is chosen and called: auto and its reasons, FlashInfer's signatures and its own argument checks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import explain, reload
from aliasparam_nvfp4 import NvFp4LinearMethod, retarget
from aliasparam_nvfp4.errors import BackendError, ShapeError
from aliasparam_nvfp4.linear import emulate
from aliasparam_nvfp4.linear.backends import LinearBackend, LinearShape, linear_backends

from .backend_cases import BACKENDS, flashinfer, made
from .proofs import proves
from .test_linear import Layer, tensors

# -- (c) the call binds to the installed FlashInfer -------------------------------------------------------------------------

CALLED = [b for b in BACKENDS if b.call in ("mm_fp4", "mm_bf16_fp4")]


@pytest.mark.parametrize("tokens", [1, 3, 16])
@proves("call", "backend", CALLED)
def test_the_call_binds_to_flashinfers_signature_and_passes_its_checks(
    backend: LinearBackend, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fi, base = flashinfer("flashinfer"), flashinfer("flashinfer.gemm.gemm_base")
    weight_only = flashinfer("flashinfer.gemm.gemm_bf16_fp4")
    recipes = flashinfer("flashinfer.quantization.nvfp4_quantization_utils")
    resolve, unset = recipes.resolve_nvfp4_4over6, recipes._UNSET
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    n, k = (64, 48) if backend.layout.name == "fragments" else (40, 48)
    layer = made(backend, (n,), k)
    quantizer, calls = inspect.signature(fi.fp4_quantize), {}

    def fp4_quantize(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        bound = quantizer.bind(*args, **kwargs)
        x, scale = bound.args[:2]
        assert x.is_contiguous(), "fp4Quantize.cpp: CHECK_CONTIGUOUS; other strides are read as another layout"
        assert resolve(bound.arguments.get("nvfp4_4over6", unset)) is None, "the environment decides"
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
    monkeypatch.setattr("aliasparam_nvfp4.linear.method.need_running", lambda backend, device: None)

    out = layer(torch.randn(tokens, 2 * k, dtype=torch.bfloat16)[:, :k])

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
        assert call["a"].is_contiguous() and call["alpha"].shape == (1,)
        for major, minor in backend.capabilities:
            assert _supported(weight_only.mm_bf16_fp4, call["backend"], 10 * major + minor)
        _need_accepted(weight_only, call)


def test_the_environment_does_not_choose_the_quantizer_of_experts_either(monkeypatch: pytest.MonkeyPatch) -> None:
    from aliasparam_nvfp4.moe.runners._base import quantized_input

    fi, recipes = flashinfer("flashinfer"), flashinfer("flashinfer.quantization.nvfp4_quantization_utils")
    signature, given = inspect.signature(fi.fp4_quantize), {}

    def fp4_quantize(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given.update(signature.bind(*args, **kwargs).arguments)
        return torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8)

    monkeypatch.setattr(fi, "fp4_quantize", fp4_quantize)
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    layer: Any = nn.Module()
    layer.w13_input_scale_quant = torch.ones(1)

    quantized_input(torch.zeros(2, 64, dtype=torch.bfloat16), layer)

    assert recipes.resolve_nvfp4_4over6(given.get("nvfp4_4over6", recipes._UNSET)) is None


def _need_accepted(module: Any, call: dict[str, Any]) -> None:
    """The backend's own check of its operands, where it looks at tensors alone."""
    if call["backend"].startswith("blackwell"):
        assert getattr(module, f"_{call['backend'].replace('-', '_')}_bf16_fp4_requirement")(**call)
    elif call["backend"] == "cute-dsl-native":  # all but the last thing it looks at
        with pytest.raises(ValueError, match="operands on one CUDA device"):
            module.check_native_bf16_fp4(**call)


def _supported(function: Any, backend: str, capability: int) -> bool:
    return bool(function.is_backend_supported(backend, capability))


# -- auto and its reasons -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine look like one with a GPU of the given compute capability, and all packages."""
    import importlib.util

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("torch") if name in ("cudnn", "cutlass") else find(name))
    return pretend


@pytest.mark.parametrize(
    ("capability", "input_scale", "n", "dtype", "name"),
    [
        ((12, 0), True, 608, torch.bfloat16, "flashinfer_b12x"),
        ((12, 0), False, 640, torch.bfloat16, "flashinfer_cutedsl_w4a16_sm12x"),
        ((12, 0), False, 608, torch.bfloat16, "flashinfer_cudnn_w4a16"),
        ((12, 0), False, 640, torch.float16, "triton"),
        ((10, 0), True, 608, torch.float16, "flashinfer_cutlass"),
        ((10, 0), True, 608, torch.float32, "triton"),
        ((10, 0), False, 608, torch.bfloat16, "flashinfer_cutedsl_w4a16"),
        ((9, 0), True, 608, torch.bfloat16, "triton"),
        ((7, 5), True, 608, torch.bfloat16, "reference"),
    ],
)
def test_auto_takes_what_the_gpu_the_dims_and_the_dtype_allow(
    gpu: Any, capability: tuple[int, int], input_scale: bool, n: int, dtype: torch.dtype, name: str
) -> None:
    pytest.importorskip("triton")
    gpu(*capability)
    layer = nn.Module()
    method = NvFp4LinearMethod("auto", input_scale=input_scale)

    method.create_weights(layer, 64, [576, n - 576], 64, n, dtype)

    assert layer.nvfp4_backend.name == name  # type: ignore[union-attr]
    assert f"{name}: auto, the first that fits on compute capability {capability[0]}.{capability[1]}" in explain(layer)


def test_explain_says_what_auto_passed_over_and_why(gpu: Any) -> None:
    pytest.importorskip("triton")
    gpu(12, 0)
    layer = nn.Module()
    NvFp4LinearMethod("auto", input_scale=False).create_weights(layer, 64, [608], 64, 608, torch.bfloat16)

    text = explain(layer)

    assert "not flashinfer_b12x (this backend quantizes activations, and the checkpoint has no activation scales)" in text
    assert "not flashinfer_cutedsl_w4a16_sm12x (expects N % 64 == 0, found N=608, K=64)" in text


def test_a_backend_asked_for_by_name_refuses_dims_it_cannot_take() -> None:
    with pytest.raises(ShapeError, match="flashinfer_cutedsl_w4a16_sm12x: this backend does not take these dims"):
        NvFp4LinearMethod("flashinfer_cutedsl_w4a16_sm12x").create_weights(nn.Module(), 64, [608], 64, 608, torch.bfloat16)
    backend = linear_backends()["flashinfer_cutedsl_native_w4a16"]
    with pytest.raises(ShapeError, match="indices"):
        backend.check_shape(LinearShape(1 << 16, 1 << 15, (1 << 16,)))


def test_the_low_latency_kernel_is_for_few_tokens() -> None:
    backend: Any = linear_backends()["flashinfer_cutedsl_low_latency"]

    assert [backend.kernel_for(m, 128) for m in (1, 8, 9)] == ["cutedsl_low_latency", "cutedsl_low_latency", "cute-dsl"]
    assert backend.kernel_for(1, 96) == "cute-dsl"


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
