"""The lines against version 0.1's bytes (frozen as checksums), FlashInfer's own functions and index formulas."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aliasparam.layout import Layout
from aliasparam_nvfp4.layouts import lines
from aliasparam_nvfp4.moe.layouts import MOE_LAYOUTS, MoELayout

from .backend_cases import flashinfer
from .golden_lines import GOLDEN


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Bytes that look random and are never zero, which is padding."""
    count = torch.arange(math.prod(shape), dtype=torch.int64)
    return ((count * 2654435761 >> 11) % 255 + 1).to(torch.uint8).view(dtype).view(shape)


def written(layout: Layout, value: Tensor) -> Tensor:
    """Kernel bytes, shaped; read back they are the value."""
    bound = layout.bind(tuple(value.shape), value.dtype)
    memory = torch.zeros(bound.regions * bound.region_capacity, dtype=value.dtype)
    bound.write(memory, bound.whole, value)
    assert torch.equal(bound.read(memory, bound.whole), value)
    return memory.view(bound.kernel_shape)


def fields(lines: MoELayout) -> list[tuple[str, Layout, tuple[int, ...]]]:
    """Every layout of a runner, with a shape that is ragged in all ways and one that is whole."""
    found = []
    for kind, half in ((lines, 2), (lines.ungated, 1)):
        for i, h in ((150, 96), (192, 128), (512, 256)) if kind else ():
            prefix = f"{lines.name} {half * i}x{h}"
            found += [
                (f"{prefix} w13", kind.w13, (2, half * i, h // 2)),
                (f"{prefix} w13_scale", kind.w13_scale, (2, half * i, h // 16)),
                (f"{prefix} w2", kind.w2, (2, h, i // 2)),
                (f"{prefix} w2_scale", kind.w2_scale, (2, h, -(-i // 16))),
            ]
    return found


LINEAR: list[tuple[str, Layout, tuple[int, ...]]] = [
    (f"{name} {shape[0]}x{shape[1]}", layout, shape)
    for name, layout in {
        "plain": lines.pad(32, 16),
        "swizzle": lines.swizzle(),
        "swizzle 8x4": lines.swizzle_8x4(),
        "shuffled": lines.shuffle(32, rows=128),
        "shuffled scales": lines.shuffle_swizzled(4),
    }.items()
    for shape in ((130, 6), (256, 64), (1, 1))
] + [
    ("shuffle 64", lines.shuffle(epilogue_tile=64), (96, 5)),
    ("fragments", lines.fragments(), (128, 24)),
]
CASES = [case for kind in MOE_LAYOUTS for case in fields(kind)] + LINEAR


@pytest.mark.parametrize(("name", "layout", "shape"), CASES, ids=[case[0] for case in CASES])
def test_bytes_are_those_of_version_01(name: str, layout: Layout, shape: tuple[int, ...]) -> None:
    assert zlib.crc32(written(layout, numbered(shape)).numpy().tobytes()) == GOLDEN[name]


@given(st.integers(1, 300), st.integers(1, 20))
def test_scales_are_where_the_index_formulas_say(rows: int, columns: int) -> None:
    scales, padded = numbered((rows, columns)), -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")

    tiles = (r // 128) * 128 * padded + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    assert torch.equal(written(lines.swizzle(), scales).view(-1)[tiles], scales)
    low = (r // 8) * 8 * padded + (c // 4) * 32 + (r % 8) * 4 + c % 4
    assert torch.equal(written(lines.swizzle_8x4(), scales).view(-1)[low], scales)


@given(st.integers(1, 4), st.integers(1, 5))
def test_fragments_are_where_the_index_formula_says(n: int, k: int) -> None:
    weight = numbered((64 * n, 8 * k))
    kernel = written(lines.fragments(), weight).view(k, n, 128, 4)
    kt, nt, word, byte = torch.meshgrid(*map(torch.arange, (k, n, 128, 4)), indexing="ij")
    lane = (word // 2) % 32
    row = nt * 64 + 8 * (word // 64) + lane // 4 + 32 * (word % 2) + 16 * (byte // 2)

    assert torch.equal(kernel, weight[row, kt * 8 + lane % 4 + 4 * (byte % 2)])


@pytest.mark.parametrize("half", [16, 64, 128, 256])
def test_row_orders_are_flashinfers(half: int) -> None:
    core, prepare = flashinfer("flashinfer.fused_moe.core"), flashinfer("flashinfer.fused_moe.prepare")
    shuffle_matrix_a = flashinfer("flashinfer").shuffle_matrix_a
    gate_up = numbered((2 * half, 8))
    up = gate_up.roll(half, 0)

    if half % 64 == 0:
        assert torch.equal(written(lines.up_gate_blocks(8), gate_up), prepare._interleave_linear_and_gate(up[None], 64, 1)[0])
    pairs = core._maybe_get_cached_w3_w1_permute_indices({}, up, 128)
    assert torch.equal(written(lines.up_gate_shuffled(8, rows=16), gate_up), up[pairs])
    shuffled = gate_up[core.get_w2_permute_indices_with_cache({}, gate_up, 128)]
    assert torch.equal(written(lines.shuffle(), gate_up), shuffled)
    assert torch.equal(written(lines.shuffle(epilogue_tile=64), gate_up), shuffle_matrix_a(gate_up, 64))


@pytest.mark.parametrize("shape", [(256, 8), (512, 24), (128, 4)])
def test_scales_are_flashinfers(shape: tuple[int, int]) -> None:
    core = flashinfer("flashinfer.fused_moe.core")
    unswizzle = flashinfer("flashinfer.gemm.gemm_bf16_fp4")._unswizzle_sf_128x4
    scale = numbered(shape)
    up = scale.roll(shape[0] // 2, 0)

    def rows(kernel: Tensor) -> Tensor:
        return unswizzle(kernel.reshape(-1), *shape).view(torch.uint8).view(shape)

    shuffled = core.get_w2_permute_indices_with_cache({}, scale, 128, num_elts_per_sf=16)
    assert torch.equal(rows(written(lines.shuffle_swizzled(), scale)), scale[shuffled])
    if shape[0] % 256 == 0:
        pairs = core._maybe_get_cached_w3_w1_permute_indices({}, up, 128, num_elts_per_sf=16)
        assert torch.equal(rows(written(lines.up_gate_shuffled_swizzled(4), scale)), up[pairs])
    assert torch.equal(rows(written(lines.swizzle(), scale)), scale)


def test_padded_lines_are_the_steps_one_after_the_other() -> None:
    """One line with padding, order and tiles in it equals padding, then order, then tiles."""
    steps: list[tuple[Layout, list[Layout]]] = [
        (lines.shuffle_swizzled(8), [lines.pad(128, 8), lines.shuffle(), lines.swizzle()]),
        (lines.up_gate_shuffled(32), [lines.gate_up(64, 32), lines.up_gate_shuffled(1, rows=16)]),
        (lines.up_gate_shuffled_swizzled(8), [lines.gate_up(64, 8), lines.up_gate_shuffled(1, rows=16), lines.swizzle()]),
        (lines.up_gate_blocks_swizzled(4), [lines.gate_up(64, 4), lines.up_gate_blocks(1), lines.swizzle()]),
    ]
    for line, (first, *rest) in steps:
        chain = first
        for step in rest:
            chain = chain.then(step)
        for shape in ((300, 6), (256, 16), (2, 1)):
            assert torch.equal(line.bind(shape, torch.uint8).offsets(), chain.bind(shape, torch.uint8).offsets())


def test_any_shard_of_a_padded_scale_is_a_handful_of_boxes() -> None:
    """Kimi-K2.5 of a rank, ragged on purpose: whole, one half, a slice of columns."""
    shape: Any = (2 * 500, 450)
    for layout in (lines.up_gate_shuffled_swizzled(8), lines.up_gate_blocks_swizzled(4), lines.swizzle()):
        for rows, columns in (((0, 1000), (0, 450)), ((0, 500), (0, 450)), ((500, 1000), (0, 450)), ((0, 1000), (64, 128))):
            assert len(layout.boxes(rows, columns, shape)) <= 10, (layout, rows, columns)


@pytest.mark.parametrize("limit", [1 << 12, 1 << 20])
@pytest.mark.parametrize("shape", [(2 * 192, 64), (2 * 150, 6)])
def test_any_layout_goes_to_any_other_in_place_by_blocks(shape: tuple[int, int], limit: int) -> None:
    """w13 scales of all runners, whole and ragged: memory for the larger of the two, blocks, then padding cleared."""
    value = numbered((2, *shape))
    layouts = [lines.w13_scale for lines in MOE_LAYOUTS]
    bounds = [layout.bind(value.shape, torch.uint8) for layout in layouts]
    for old, new in [(old, new) for old in bounds for new in bounds if old.region_capacity == new.region_capacity]:
        memory = torch.zeros(old.regions * old.region_capacity, dtype=torch.uint8)
        old.write(memory, old.whole, value)
        old.reorder(memory, new, limit)
        expected = torch.zeros_like(memory)
        new.write(expected, new.whole, value)
        assert torch.equal(memory, expected)


def test_lines_are_inferred_from_flashinfers_functions() -> None:
    core, prepare = flashinfer("flashinfer.fused_moe.core"), flashinfer("flashinfer.fused_moe.prepare")
    package = flashinfer("flashinfer")

    def pairs(rows: Tensor) -> Tensor:
        return rows[core._maybe_get_cached_w3_w1_permute_indices({}, rows, 128)]

    def blocks(experts: Tensor) -> Tensor:
        return prepare._interleave_linear_and_gate(experts, 64, 1)

    found: dict[str, tuple[Any, tuple[int, ...], str]] = {
        "shuffle 128": (lambda x: package.shuffle_matrix_a(x, 128), (128, 16), "(g b a) k -> g a b k, b=8 a=4"),
        "shuffle 64": (lambda x: package.shuffle_matrix_a(x, 64), (128, 16), "(g b a) k -> g a b k, b=8 a=2"),
        "pairs of [up; gate]": (pairs, (256, 16), "(h g b a) k -> g a h b k, h=2 b=8 a=2"),
        "blocks of [up; gate]": (blocks, (3, 256, 16), "(h i r) k -> i h r k, h=2 r=64"),
    }
    for name, (function, shape, line) in found.items():
        assert Layout.infer(function, shape, torch.uint8) == Layout(line), name
