"""Regions convert by themselves, in bands, within the stated scratch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import aliasparam._convert as convert
from aliasparam import (
    Band,
    InterleaveHalves,
    PadLast2,
    State,
    SwapHalves,
    TensorSpec,
    Transform,
    explain,
    process,
    reload,
)
from aliasparam.errors import DeclarationError
from aliasparam_nvfp4.layouts import ShuffleRows, Swizzle128x4

from .declared import bytes_of, layer_of, storage_of
from .peak import peak_bytes

# -- regions -------------------------------------------------------------------------------------------------------------


def test_law_6_writing_expert_7_of_384_converts_expert_7_alone(device: torch.device) -> None:
    values = bytes_of(384, 8, 6).to(device)
    layer = layer_of(values, SwapHalves().then(PadLast2(16, 8)))
    assert process(layer) == 384
    before = layer.prepared.clone()

    layer.weight[7].copy_(torch.full((8, 6), 3))

    states = storage_of(layer).states
    assert [i for i, s in enumerate(states) if s is not State.KERNEL] == [7]
    assert process(layer) == 1
    values[7] = 3
    cold = layer_of(values, SwapHalves().then(PadLast2(16, 8)))
    process(cold)
    assert torch.equal(layer.prepared, cold.prepared)
    assert torch.equal(layer.prepared[:7], before[:7]) and torch.equal(layer.prepared[8:], before[8:])


def test_law_6_a_selective_reload_gives_the_bytes_of_a_full_one() -> None:
    values = bytes_of(16, 8, 6)
    layer = layer_of(values, SwapHalves())
    process(layer)
    new = bytes_of(16, 8, 6, seed=1)

    with reload(layer, scope="partial") as session:
        session.update("weight", torch.cat([values[:3], new[3:5], values[5:]]))
    cold = layer_of(torch.cat([values[:3], new[3:5], values[5:]]), SwapHalves())
    process(cold)

    assert torch.equal(layer.prepared, cold.prepared)


# -- bands and scratch ---------------------------------------------------------------------------------------------------

LARGE: dict[str, tuple[Transform, tuple[int, int]]] = {
    "row panels": (Swizzle128x4(), (1280, 64)),
    "row panels, ragged": (Swizzle128x4(), (1219, 61)),
    "blocks of 32 rows": (ShuffleRows(128), (1024, 96)),
    "shuffled and swizzled": (ShuffleRows(128).then(Swizzle128x4()), (1024, 62)),
    "padded both ways": (PadLast2(32, 16), (1001, 75)),
    "padded and shuffled": (PadLast2(32, 1).then(ShuffleRows(128)), (1001, 75)),
    "columns": (SwapHalves(), (1024, 96)),
    "columns, interleaved": (InterleaveHalves(64), (1024, 95)),
    "whole": (SwapHalves().then(Swizzle128x4()), (1024, 96)),
}


@pytest.mark.parametrize("name", LARGE)
def test_law_1_a_region_converted_in_pieces_equals_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    transform, shape = LARGE[name]
    values = bytes_of(*shape).to(device)
    monkeypatch.setattr(convert, "_PIECE_BYTES", 20_000)
    layer = layer_of(values, transform)

    process(layer)
    assert torch.equal(layer.prepared, transform.forward(values))
    layer.weight[0, 0] = values[0, 0]  # back to checkpoint format
    assert storage_of(layer).state is State.CHECKPOINT
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, transform.forward(values)), "the padding was not zeroed again"


@pytest.mark.parametrize("name", [n for n in LARGE if n != "whole"])
def test_law_4_converting_takes_no_more_than_the_stated_scratch(name: str, device: torch.device) -> None:
    transform, (rows, columns) = LARGE[name]
    values = torch.zeros(rows * 8, columns * 96, dtype=torch.uint8, device=device)
    layer = layer_of(values, transform)
    del values
    assert storage_of(layer).plan.nbytes > 2 * convert.SCRATCH_BYTES

    forward = peak_bytes(lambda: process(layer), device)
    back = peak_bytes(lambda: layer.weight[0].zero_(), device)

    assert forward <= convert.SCRATCH_BYTES
    assert back <= convert.SCRATCH_BYTES


def test_law_4_scratch_of_an_uncuttable_region_is_told() -> None:
    layer = layer_of(torch.zeros(4096, 4096, dtype=torch.uint8), SwapHalves().then(Swizzle128x4()))

    assert "converts as a whole, scratch up to 64.00 MiB" in explain(layer)


@dataclass(frozen=True)
class WrongBand(SwapHalves):
    """Halves move across the whole, but it says that pairs of rows convert by themselves."""

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 2)


def test_a_band_that_does_not_convert_by_itself_is_refused_at_declaration() -> None:
    with pytest.raises(DeclarationError, match="does not convert by itself"):
        layer_of(bytes_of(8, 4), WrongBand())


@dataclass(frozen=True)
class MixesRegions(SwapHalves):
    """Says that leading dims are regions, and moves experts."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.roll(1, 0)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.roll(-1, 0)


def test_a_transform_that_mixes_its_regions_is_refused_at_declaration() -> None:
    with pytest.raises(DeclarationError, match="mixes its regions"):
        layer_of(bytes_of(4, 8, 4), MixesRegions())
