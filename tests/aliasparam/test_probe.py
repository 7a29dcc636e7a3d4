"""What a declaration finds out about a transform, and what finding it out costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Band, PadLast2, PermuteRows, SwapHalves, TensorSpec, Transform, check_inverse, declare, process
from aliasparam._probe import PROBE_BYTES, check_declared
from aliasparam.errors import DeclarationError, TransformError

U = torch.uint8
Bytes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class By(Transform):
    """A transform of the same spec, by two functions."""

    there: Bytes
    back: Bytes = torch.clone
    core_dims: int = 2
    bands: Band | None = None

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return self.there(tensor)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return self.back(tensor)

    def band(self, spec: TensorSpec) -> Band | None:
        return self.bands


def zero_without_sign(x: Tensor) -> Tensor:
    raw = x.contiguous().view(U).clone()
    raw[raw == 128] = 0
    return raw.view(x.dtype)


def one_byte(value: int) -> Bytes:
    def change(x: Tensor) -> Tensor:
        raw = x.contiguous().view(U).clone()
        raw[raw == value] = 0
        return raw.view(x.dtype)

    return change


@pytest.mark.parametrize("shape", [(4, 4), (2, 2), (1, 1), (64, 64), (3, 5, 7)])
@pytest.mark.parametrize("value", [1, 128, 250, 251, 255])
def test_a_transform_that_loses_one_byte_value_is_refused(value: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(TransformError, match="does not invert"):
        check_inverse(By(one_byte(value)), TensorSpec(shape, U))


@pytest.mark.parametrize("value", [0x80, 0xFF, 0x00, 0x7F])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_every_byte_value_occurs_at_every_place_of_an_element(place: int, value: int) -> None:
    def change(x: Tensor) -> Tensor:
        raw = x.contiguous().view(U).clone().view(-1, 4)
        raw[:, place] = torch.where(raw[:, place] == value, 1, raw[:, place])
        return raw.view(-1).view(x.dtype).view(x.shape)

    with pytest.raises(TransformError, match="does not invert"):
        check_inverse(By(change), TensorSpec((6, 4), torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_that_changes_minus_zero_or_nan_alone_is_refused(dtype: torch.dtype) -> None:
    for there in (lambda x: x + 0.0, lambda x: torch.where(x.isnan(), torch.full_like(x, torch.nan), x)):
        with pytest.raises(TransformError, match="does not invert"):
            check_inverse(By(there), TensorSpec((4, 4), dtype))


def test_minus_zero_of_e4m3_is_refused_on_a_small_shape() -> None:
    layer = nn.Module()
    layer.w = nn.Parameter(torch.full((4, 4), -0.0).to(torch.float8_e4m3fn), requires_grad=False)

    with pytest.raises(DeclarationError, match="does not invert"):
        declare(layer, Alias("w", "k", By(zero_without_sign)))


@dataclass(frozen=True)
class Exchange(PermuteRows):
    """Two rows exchanged, and not back."""

    first: int
    second: int

    def source_rows(self, rows: int) -> Tensor:
        order = torch.arange(rows)
        order[[self.first, self.second]] = order[[self.second, self.first]]
        return order

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.clone()


def test_bytes_moved_by_any_distance_are_seen() -> None:
    for distance in (251, 256, 512, 1024):
        with pytest.raises(TransformError, match="does not invert"):
            check_inverse(Exchange(3, 3 + distance), TensorSpec((2048, 1), U))


def test_bool_weights_are_probed_with_booleans() -> None:
    layer = nn.Module()
    layer.w = nn.Parameter(torch.arange(32).view(4, 8) % 3 == 0, requires_grad=False)
    before = layer.w.clone()

    declare(layer, Alias("w", "k", SwapHalves()))
    process(layer)

    assert torch.equal(layer.k, torch.cat([before[2:], before[:2]]))
    with pytest.raises(TransformError, match="does not invert"):
        check_inverse(By(lambda x: x.logical_and(torch.ones(1, dtype=torch.bool)).flip(0)), TensorSpec((4, 8), torch.bool))


@pytest.mark.parametrize("method", ["there", "back"])
def test_a_transform_that_writes_its_argument_is_refused(method: str) -> None:
    def in_place(x: Tensor) -> Tensor:
        result = x.clone()
        x.add_(1)
        return result

    with pytest.raises(TransformError, match="writes its argument"):
        check_inverse(By(**{"there": torch.clone, method: in_place}), TensorSpec((4, 4), U))


# -- regions and bands -----------------------------------------------------------------------------------------------------


def mix(dim: int, dims: int = 4) -> Bytes:
    return lambda x: x.flip(dim).contiguous() if x.dim() == dims else x.clone()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_transform_that_mixes_any_leading_dim_is_refused_at_declaration(dim: int) -> None:
    layer = nn.Module()
    layer.w = nn.Parameter(torch.arange(3 * 3 * 4 * 4, dtype=U).view(3, 3, 4, 4), requires_grad=False)

    with pytest.raises(DeclarationError, match="mixes its regions"):
        declare(layer, Alias("w", "k", By(mix(dim), mix(dim))))


def test_a_transform_that_treats_a_stack_of_regions_otherwise_is_refused() -> None:
    with pytest.raises(TransformError, match="mixes its regions"):
        check_inverse(By(mix(0, 3), mix(0, 3)), TensorSpec((2, 2, 4, 4), U))


def test_an_inverse_that_needs_its_neighbours_is_refused() -> None:
    def back(x: Tensor) -> Tensor:
        return x.clone() if x.dim() == 3 else x + 1

    with pytest.raises(TransformError, match="mixes its regions"):
        check_inverse(By(torch.clone, back), TensorSpec((2, 4, 4), U))


def test_a_band_that_is_none_is_refused() -> None:
    flip = By(lambda x: x.flip(-2).contiguous(), lambda x: x.flip(-2).contiguous(), bands=Band(-2, 4))

    with pytest.raises(TransformError, match="does not convert by itself"):
        check_inverse(flip, TensorSpec((16, 8), U))


# -- cost ------------------------------------------------------------------------------------------------------------------

LARGE = TensorSpec((8192, 8192), U)
WRONG = TensorSpec((3000, 3000), U)  # a refusal probes the whole region too


class Counting(SwapHalves):
    """The largest tensor it was given, and the sum of them."""

    largest = total = 0

    def forward(self, tensor: Tensor) -> Tensor:
        Counting.largest, Counting.total = max(Counting.largest, tensor.nbytes), Counting.total + tensor.nbytes
        return super().forward(tensor)


def test_law_4_a_declaration_probes_a_bounded_part_of_a_large_weight() -> None:
    Counting.largest = Counting.total = 0
    with torch.device("meta"):
        layer = nn.Module()
        layer.w = nn.Parameter(torch.empty(LARGE.shape, dtype=U), requires_grad=False)

    declare(layer, Alias("w", "k", Counting()))

    assert Counting.largest <= PROBE_BYTES
    assert Counting.total <= 32 * PROBE_BYTES


def rows_beyond(limit: int) -> Bytes:
    return lambda x: torch.cat([x[..., :limit, :], x[..., limit:, :].flip(-2)], -2)


def columns_beyond(limit: int) -> Bytes:
    return lambda x: torch.cat([x[..., :limit], x[..., limit:].flip(-1)], -1)


@pytest.mark.parametrize("bands", [None, Band(-1, 1), Band(-2, 1)])
def test_a_wrong_inverse_is_found_wherever_in_a_large_weight_it_is_wrong(bands: Band | None) -> None:
    if bands is None or bands.dim == -1:
        with pytest.raises(TransformError, match="does not invert"):
            check_declared(By(rows_beyond(2500), bands=bands), WRONG)
    if bands is None or bands.dim == -2:
        with pytest.raises(TransformError, match="does not invert"):
            check_declared(By(columns_beyond(2500), bands=bands), WRONG)
    with pytest.raises(TransformError, match="does not invert"):
        check_declared(By(one_byte(255), bands=bands), WRONG)


@dataclass(frozen=True)
class OfOneShape(Transform):
    """An order of all elements, which is known for one shape."""

    count: int

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[torch.arange(self.count).flip(0)].reshape(tensor.shape)

    inverse = lambda self, tensor, spec: self.forward(tensor)  # noqa: E731


def test_a_transform_that_takes_no_smaller_shape_is_probed_whole_and_not_refused() -> None:
    check_declared(OfOneShape(1024 * 512), TensorSpec((1024, 512), U))


def test_padding_at_the_end_is_part_of_the_probe() -> None:
    class Dirty(PadLast2):
        def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
            whole = tensor[..., : spec.shape[-2], : spec.shape[-1]].clone()
            if spec.shape[-2] % self.rows:
                whole[..., -1, :] = 0
            return whole

    with pytest.raises(TransformError, match="does not invert"):
        check_declared(Dirty(64), TensorSpec((64 * 1000 + 3, 128), U))


def test_chained_padding_whose_last_band_is_short_has_no_band() -> None:
    chain = PadLast2(4).then(PadLast2(6))

    assert chain.band(TensorSpec((14, 1), U)) is None
    assert chain.band(TensorSpec((24, 1), U)) == Band(-2, 12)
    check_inverse(chain, TensorSpec((14, 1), U))
