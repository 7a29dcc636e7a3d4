"""Codes and scales, against ModelOpt's and torchao's own functions."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam_nvfp4.errors import ShapeError
from aliasparam_nvfp4.quantize.codec import (
    dequantize,
    pack_codes,
    quantize,
    quantize_activation,
    round_to_codes,
    scaled_codes,
    unpack_codes,
)
from aliasparam_nvfp4.quantize.format import E2M1_VALUES

SEEDS = st.integers(0, 1 << 20)


def weights(seed: int, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 1, rows).unsqueeze(1)
    return (torch.randn(rows, cols, generator=generator) * spread).to(dtype)


@given(st.integers(1, 7), st.integers(1, 20), SEEDS)
def test_law_unpack_inverts_pack(rows: int, half: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * half), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_the_low_nibble_is_the_even_column() -> None:
    assert pack_codes(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 0x21


def test_rounding_is_to_nearest_even() -> None:
    grid = torch.tensor(E2M1_VALUES)
    middles = (grid[1:] + grid[:-1]) / 2
    even = torch.tensor([0, 2, 2, 4, 4, 6, 6], dtype=torch.uint8)

    assert torch.equal(round_to_codes(middles), even)
    assert torch.equal(round_to_codes(-middles), even + 8)
    assert torch.equal(round_to_codes(grid), torch.arange(8, dtype=torch.uint8))
    assert round_to_codes(torch.tensor([100.0, -0.0, -0.1])).tolist() == [7, 8, 8]


@given(SEEDS, st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
def test_quantize_gives_modelopts_bytes(seed: int, dtype: torch.dtype) -> None:
    qtensor = modelopt()
    weight = weights(seed, 24, 96, dtype)

    packed, scale, total = quantize(weight)
    theirs, their_scale, their_total = qtensor.quantize(weight.clone(), 16)

    assert torch.equal(total, their_total)
    assert torch.equal(scale.view(torch.uint8), their_scale.view(torch.uint8))
    assert torch.equal(packed, theirs._quantized_data)


def test_zeros_and_small_values_of_either_sign_have_modelopts_codes() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-6, -1e-6, 6.0, -6.0, 1e-30, -1e-30] * 2, [-0.0] * 16])

    packed, _, _ = quantize(weight)

    assert unpack_codes(packed)[0, :6].tolist() == [0, 0, 0, 8, 7, 15]
    assert torch.equal(packed, modelopt().quantize(weight.clone(), 16)[0]._quantized_data)


@given(SEEDS)
def test_dequantize_is_modelopts_bit_for_bit(seed: int) -> None:
    qtensor = modelopt()
    quantized, scale, total = qtensor.quantize(weights(seed, 24, 96), 16)

    theirs = quantized.dequantize(dtype=torch.float32, scale=scale, double_scale=total, block_sizes={-1: 16})

    assert torch.equal(dequantize(quantized._quantized_data, scale, total), theirs)


def test_dequantize_is_torchaos_bit_for_bit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    weight = weights(3, 32, 64, torch.float32)
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(weight, 16, nvfp4.per_tensor_amax_to_scale(weight.abs().max()))

    ours = dequantize(theirs.qdata, theirs.scale.view(torch.float8_e4m3fn).view(32, 4), theirs.per_tensor_scale)

    assert torch.equal(ours, theirs.dequantize(torch.float32))


def test_edge_blocks() -> None:
    weight = torch.ones(1, 48)
    weight[0, 16:32] = 0
    weight[0, 32:] = 1e-7

    _, scale, _ = quantize(weight)

    assert scale.view(torch.uint8).tolist() == [[0x7E, 0x38, 0x01]]  # 448, 1.0 for zeros, the smallest scale


@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_scaled_codes_are_exact(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0, 0x7F, (3, 2), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)

    expected = values[unpack_codes(packed).long()].view(3, 2, 16) * scale.double().unsqueeze(-1)

    assert torch.equal(scaled_codes(packed, scale, dtype).double(), expected.flatten(-2))


@given(SEEDS)
def test_activations_lose_at_most_half_a_step(seed: int) -> None:
    x = weights(seed, 5, 64, torch.float32)
    inverse = 2688.0 / x.abs().amax().reshape(1)

    packed, scale = quantize_activation(x, inverse)
    back = dequantize(packed, scale, 1 / inverse)

    step = x.view(5, 4, 16).abs().amax(-1, keepdim=True) / 6
    # The widest step of e2m1 is 2 (from 4 to 6); the block scale itself is rounded by up to 1/16.
    assert ((back.view(5, 4, 16) - x.view(5, 4, 16)).abs() <= step * 1.4 + 1e-6).all()


def test_zero_activations_stay_zero() -> None:
    packed, scale = quantize_activation(torch.zeros(2, 32), torch.ones(1))

    assert not scaled_codes(packed, scale).any()


def test_whole_blocks_are_needed() -> None:
    with pytest.raises(ShapeError, match="whole blocks"):
        quantize(torch.ones(2, 24))
    with pytest.raises(ShapeError, match="even last dim"):
        pack_codes(torch.ones(2, 3, dtype=torch.uint8))


def modelopt() -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    return module.NVFP4QTensor
