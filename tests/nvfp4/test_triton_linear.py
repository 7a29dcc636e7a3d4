"""The Triton GEMM against exact math: on a GPU as it is, on the CPU in Triton's interpreter (in a process of its own)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4.linear import emulate
from aliasparam_nvfp4.linear.backends import linear_backends
from aliasparam_nvfp4.quantize.codec import pack_codes

from .interpreter import interpreted
from .ordered import ordered

pytest.importorskip("triton")
SHAPES = [(1, 64, 64), (3, 200, 144), (17, 96, 256), (5, 576, 576), (1, 40, 48), (2, 300, 176)]
DTYPES = [torch.bfloat16, torch.float16]


def every_code_and_scale(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random bytes: all codes with -0, all positive finite scales with subnormals and zero."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=random)
    scale = torch.randint(0, 0x7F, (n, k // 16), dtype=torch.uint8, generator=random)
    return weight, scale.view(torch.float8_e4m3fn)


def check(m: int, n: int, k: int, dtype: torch.dtype, device: str, name: str) -> None:
    from aliasparam_nvfp4.kernels.triton_linear import linear

    backend: Any = linear_backends()[name]
    weight, scale = every_code_and_scale(n, k, m + n)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    alpha = torch.tensor([0.0009])
    expected = emulate.linear("checkpoint", x, weight, scale, alpha, None, n=n)
    prepared = ordered(backend.layout.weight, weight).to(device), ordered(backend.layout.weight_scale, scale).to(device)

    found = linear(x.to(device), *prepared, alpha.to(device), n=n, shuffled=backend.shuffled).cpu()

    assert found.dtype is dtype and found.shape == (m, n)
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-10
    if device == "cpu":
        rounding *= 2  # the interpreter does not round stores to nearest
    bound = expected.abs().max() * rounding
    assert (found.double() - expected).abs().max() <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", ["triton", "triton_shuffled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 512, 7168), (130, 320, 1536), (64, 1024, 2048)])
def test_the_kernel_is_exact_but_for_the_last_rounding(shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> None:
    check(*shape, dtype, "cuda", name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_weight_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    """One-hot activations read single weights: every code times every scale, to the bit."""
    from aliasparam_nvfp4.kernels.triton_linear import linear

    backend = linear_backends()["triton"]
    codes = torch.arange(16, dtype=torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8).view(127, 1).view(torch.float8_e4m3fn)
    prepared = ordered(backend.layout.weight, pack_codes(codes)), ordered(backend.layout.weight_scale, scale)
    x = torch.eye(16, dtype=dtype)

    found = linear(x.cuda(), *(t.cuda() for t in prepared), torch.ones(1).cuda(), n=127).cpu()

    expected = emulate.READERS["checkpoint"](pack_codes(codes), scale, 127, 16).T
    assert torch.equal(found.double(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_it_is_deterministic_and_runs_in_a_captured_graph() -> None:
    from aliasparam_nvfp4.kernels.triton_linear import linear

    backend = linear_backends()["triton"]
    weight, scale = every_code_and_scale(2048, 4096, 0)
    prepared = ordered(backend.layout.weight, weight).cuda(), ordered(backend.layout.weight_scale, scale).cuda()
    x, alpha = torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda"), torch.ones(1, device="cuda")
    first = linear(x, *prepared, alpha, n=2048)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, *prepared, alpha, n=2048)
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs here")
def test_the_kernel_in_the_interpreter() -> None:
    assert interpreted("tests.nvfp4.test_triton_linear").count("right") == 2 * 2 * len(SHAPES)


if __name__ == "__main__":
    for shape in SHAPES:
        for kind in DTYPES:
            for backend_name in ("triton", "triton_shuffled"):
                check(*shape, kind, "cpu", backend_name)
                print("right", shape, kind, backend_name)
