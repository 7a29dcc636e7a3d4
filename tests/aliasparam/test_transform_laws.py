"""Laws of transforms: the inverse inverts, the spec is kept, regions are independent."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aliasparam import Chain, Identity, PadLast2, SwapHalves, TensorSpec, Transform, ViewDtype, check_inverse
from aliasparam.errors import TransformError
from aliasparam.testing import transforms
from aliasparam_nvfp4.layouts import Swizzle128x4

ONE_BYTE = st.sampled_from([torch.uint8, torch.int8, torch.float8_e4m3fn])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 200).map(lambda n: 2 * n), st.integers(1, 40))


@given(transforms(), SHAPES, ONE_BYTE)
def test_law_inverse_inverts_every_byte(transform: Transform, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_inverse(transform, TensorSpec(shape, dtype))


@given(SHAPES, ONE_BYTE)
def test_law_inverse_inverts_swizzle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_inverse(Swizzle128x4(), TensorSpec(shape, dtype))


@given(st.one_of(transforms(), st.just(Swizzle128x4())), SHAPES)
def test_law_regions_are_independent(transform: Transform, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)

    whole = transform.forward(x)

    assert all(torch.equal(whole[e], transform.forward(x[e].clone())) for e in range(shape[0]))


@given(transforms(), SHAPES)
def test_law_forward_does_not_write_its_input(transform: Transform, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = x.clone()

    transform.inverse(transform.forward(x), TensorSpec.of(x))

    assert torch.equal(x, before)


def test_identity_for_a_spec_is_seen_through_a_chain() -> None:
    aligned, ragged = TensorSpec((32, 16), torch.uint8), TensorSpec((33, 16), torch.uint8)
    chain = Identity().then(PadLast2(32, 16))

    assert chain.is_identity_for(aligned)
    assert not chain.is_identity_for(ragged)


@dataclass(frozen=True)
class Forgetful(Transform):
    """Loses the last column: no inverse can exist."""

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out[..., -1] = 0
        return out

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor


def test_a_transform_that_forgets_is_found() -> None:
    with pytest.raises(TransformError, match="does not invert"):
        check_inverse(Forgetful(), TensorSpec((4, 4), torch.uint8))


def test_errors_name_what_would_fit() -> None:
    with pytest.raises(TransformError, match="even row count"):
        SwapHalves().output_spec(TensorSpec((3, 4), torch.uint8))
    with pytest.raises(TransformError, match="element width"):
        ViewDtype(torch.int16).output_spec(TensorSpec((3, 4), torch.uint8))
    with pytest.raises(TransformError, match="one byte"):
        Swizzle128x4().output_spec(TensorSpec((3, 4), torch.float32))


def test_chain_flattens() -> None:
    chain = SwapHalves().then(PadLast2(8, 8)).then(ViewDtype(torch.int8))

    assert isinstance(chain, Chain)
    assert len(chain.steps) == 3
