"""What NvFp4LinearMethod promises of dtypes, of columns with scales of their own, and of scales at the edge of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam import reload
from aliasparam.errors import StateError
from aliasparam_nvfp4 import COMPRESSED_TENSORS, NvFp4LinearMethod
from aliasparam_nvfp4.errors import ScaleError, ShapeError
from aliasparam_nvfp4.linear.backends import KernelNames, LinearBackend, LinearShape, linear_backends

from .test_linear import Layer, tensors


def loaded(source: dict[str, Tensor], partitions: tuple[int, ...] = (32,), k: int = 48, **options: Any) -> Any:
    layer = Layer(NvFp4LinearMethod("reference", **options), partitions, k)
    with reload(layer) as session:
        session.load(source)
    return layer


def with_scales(*scales: float, seed: int = 0) -> dict[str, Tensor]:
    """A layer of two partitions, 32 rows each."""
    return {**tensors((32, 32), 48, seed), "weight_scale_2": torch.tensor(scales)}


# -- dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_has_the_dtype_of_the_activations_with_awq_and_bias(dtype: torch.dtype) -> None:
    source = {**tensors((32,), 48), "pre_quant_scale": torch.rand(48).to(torch.bfloat16) + 0.5}
    layer = loaded(source, pre_quant_scale=True)
    x = torch.randn(3, 48).to(dtype)

    assert layer(x).dtype is dtype
    assert layer.method.apply(layer, x, torch.randn(32)).dtype is dtype
    assert torch.equal(layer(x), loaded(tensors((32,), 48))(x * source["pre_quant_scale"].to(dtype)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64])
def test_activations_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="dtype"):
        loaded(tensors((32,), 48))(torch.ones(3, 48, dtype=dtype))


@pytest.mark.parametrize("backend", list(linear_backends().values()), ids=lambda b: b.name)
def test_every_backend_refuses_what_it_does_not_take(backend: LinearBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aliasparam_nvfp4.linear.method.need_running", lambda backend, device: None)
    layer = Layer(NvFp4LinearMethod(backend.name), (64,), 64)
    with reload(layer) as session:
        session.load(tensors((64,), 64))

    for dtype in {torch.int32, torch.float64, torch.float32, torch.float16} - set(backend.dtypes):
        with pytest.raises(ShapeError, match="dtype"):
            layer(torch.ones(1, 64, dtype=dtype))


def test_a_scalar_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="does not fit"):
        loaded(tensors((32,), 48))(torch.tensor(1.0))


def test_backends_are_given_contiguous_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's quantizer refuses others, and takes rows whose stride is 1 for column-major ones."""
    layer = loaded(tensors((32,), 48))
    given = []

    def record(layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        given.append(x)
        return x.new_zeros(x.shape[0], shape.n)

    monkeypatch.setattr(layer.nvfp4_backend, "apply", record)
    layer(torch.randn(5, 96)[:, :48])
    layer(torch.randn(48, 5).T)
    layer(torch.randn(2, 3, 96)[..., 48:])

    assert len(given) == 3 and all(x.is_contiguous() for x in given)


# -- columns with scales of their own -----------------------------------------------------------------------------------


def test_float16_never_overflows_in_silence_where_columns_are_scaled() -> None:
    """The kernel's result is rounded before the columns are scaled: larger by the inverse ratio, here 1024."""
    source = with_scales(1.0, 2.0**-10)
    source["input_scale"] = torch.tensor([0.01, 0.01])
    layer = loaded(source, (32, 32), column_scales=True)
    x = torch.full((1, 48), 20.0)

    assert torch.isfinite(layer(x)).all() and torch.isfinite(layer(x.bfloat16())).all()
    assert layer(x)[:, 32:].abs().max() < 65504
    with pytest.raises(ShapeError, match="wide range"):
        layer(x.half())


def test_column_scales_that_are_asked_for_serve_any_later_weights() -> None:
    """For a graph that is captured with dummy weights: it multiplies by ones, and then by what comes."""
    layer = loaded(with_scales(0.002, 0.002), (32, 32), column_scales=True)
    x = torch.randn(2, 48)
    assert torch.equal(layer(x), loaded(with_scales(0.002, 0.002), (32, 32))(x))
    with reload(layer) as session:
        session.load(with_scales(0.002, 0.001))
    assert torch.equal(layer(x), loaded(with_scales(0.002, 0.001), (32, 32), column_scales=True)(x))

    with pytest.raises(ScaleError, match="different weight global scales"):
        loaded(with_scales(0.002, 0.001), (32, 32))


# -- scales at the edge of float32 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "activation", "what"),
    [
        (1e-30, 1e-20, "alpha has no value in float32"),
        (1e30, 1e20, "alpha has no value in float32"),
        (1.0, 1e-39, "an input global scale is not a scale\n.*and so its reciprocal"),
    ],
)
def test_scales_whose_product_or_reciprocal_float32_lacks_are_refused(weight: float, activation: float, what: str) -> None:
    source = tensors((32,), 48) | {"weight_scale_2": torch.tensor([weight]), "input_scale": torch.tensor([activation])}

    with pytest.raises(ScaleError, match=what):
        loaded(source)


def test_reciprocal_scales_whose_product_float32_lacks_are_refused() -> None:
    source = tensors((32,), 48)
    renamed = {"weight_packed": source["weight"], "weight_scale": source["weight_scale"]}
    renamed |= {"weight_global_scale": torch.tensor([1e30]), "input_global_scale": torch.tensor([1e20])}

    with pytest.raises(ScaleError, match="alpha has no value in float32"):
        loaded(renamed, checkpoint=COMPRESSED_TENSORS)


def test_negative_block_scales_are_refused_where_the_format_has_no_sign() -> None:
    source = tensors((64,), 48)
    source["weight_scale"].view(torch.uint8)[3, 1] |= 0x80
    layer = Layer(NvFp4LinearMethod("flashinfer_cutedsl_w4a16_sm12x"), (64,), 48)
    with pytest.raises(ScaleError, match="negative"), reload(layer) as session:
        session.load(source)

    source["weight_scale"].view(torch.uint8)[3, 1] = 0x80  # -0 is 0
    with reload(layer) as session:
        session.load(source)
    assert layer.weight_scale_interleaved[1, 3] == 0
    assert torch.equal(loaded(source, (64,))(torch.zeros(1, 48)), torch.zeros(1, 64))


def test_law_10_weights_that_are_created_a_second_time_leave_the_layer_as_it_was() -> None:
    """The names were replaced by empty ones before it was refused."""
    layer, x = loaded(tensors((32,), 48)), torch.randn(2, 48)
    before, held = layer(x), dict(layer.named_parameters())

    with pytest.raises(StateError, match=r"Layer\.weight: this layer has its weights already"):
        layer.method.create_weights(layer, 64, [32, 16], 64, 48, torch.bfloat16)
    assert all(held[name] is parameter for name, parameter in layer.named_parameters())
    assert torch.equal(layer(x), before)
