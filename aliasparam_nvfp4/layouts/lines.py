"""Every kernel layout of NVFP4 as a line.

Sources of the formulas: 128x4 and 8x4 tiles: TensorRT-LLM ``computeSFIndex`` (FlashInfer ``csrc/nv_internal/tensorrt_llm/thop/
fp4Op.cpp``). Row shuffle: FlashInfer ``utils.py``, ``get_shuffle_matrix_a_row_indices``. Pairs of up and gate:
``fused_moe/core.py``, ``_maybe_get_cached_w3_w1_permute_indices``. Blocks of 64: ``fused_moe/prepare.py``,
``_interleave_linear_and_gate``. Fragments: ``gemm_bf16_fp4_cute_dsl.py``, ``_cute_dsl_pack_fp4_weight``.

``rows`` and ``columns`` are the multiples that a kernel wants its matrices padded to, in elements of the tensor. Rows of gate and
up are two halves, each padded for itself: padding them as a whole would put up rows where a kernel looks for gate rows.
"""

from __future__ import annotations

from aliasparam.layout import Layout

#: Rows and columns of a tile of block scales.
_TILE = {"r4": 4, "r32": 32, "c4": 4}


def pad(rows: int, columns: int) -> Layout:
    """``[R, C]`` in order, zeros to multiples: CUTLASS, cuDNN and b12x weights."""
    return Layout("(i a) (k c) -> i a k c", a=rows, c=columns)


def swizzle(columns: int = 4, rows: int = 128) -> Layout:
    """Block scales in tiles of 128 rows by 4 columns."""
    return Layout("(i t r4 r32) (k m c4) -> i t k m r32 r4 c4", t=rows // 128, m=columns // 4, **_TILE)


def swizzle_8x4() -> Layout:
    """Block scales in tiles of 8 rows by 4 columns, for activations of few rows (TRT-LLM)."""
    return Layout("(rt r) (ct c) -> rt ct r c", r=8, c=4)


def shuffle(columns: int = 1, epilogue_tile: int = 128, rows: int = 1) -> Layout:
    """TRT-LLM: rows as the epilogue of the transposed MMA writes them, in blocks of 32 (epilogue tile 128) or 16 (64)."""
    a = 4 if epilogue_tile % 128 == 0 else 2
    return Layout("(i g b a) (k c) -> i g a b k c", g=max(rows // (8 * a), 1), b=8, a=a, c=columns)


def shuffle_swizzled(columns: int = 4) -> Layout:
    """The block scales of shuffled rows: shuffled alike, then in 128x4 tiles."""
    return Layout("(i r4 b a) (k m c4) -> i k m a b r4 c4", r4=4, b=8, a=4, m=columns // 4, c4=4)


def gate_up(rows: int, columns: int) -> Layout:
    """``[gate; up]`` in order."""
    return Layout("(h (i a)) (k c) -> h i a k c", h=2, a=rows, c=columns)


def up_gate(rows: int, columns: int) -> Layout:
    """``[up; gate]``: CUTLASS and b12x."""
    return Layout("(h (i a)) (k c) -> ~h i a k c", h=2, a=rows, c=columns)


def up_gate_blocks(columns: int) -> Layout:
    """Blocks of 64 rows from up and gate in turn: CuteDSL v2."""
    return Layout("(h (i r)) (k c) -> i ~h r k c", h=2, r=64, c=columns)


def up_gate_blocks_swizzled(columns: int) -> Layout:
    """Their block scales."""
    return Layout("(h (i r2 r32)) (k m c4) -> i k m r32 ~h r2 c4", h=2, r2=2, r32=32, m=columns // 4, c4=4)


def up_gate_shuffled(columns: int, rows: int = 64) -> Layout:
    """Pairs (up, gate), shuffled for an epilogue tile of 128: TRT-LLM. ``rows`` is a multiple of 16."""
    return Layout("(h (i g b a)) (k c) -> i g a ~h b k c", h=2, g=rows // 16, b=8, a=2, c=columns)


def up_gate_shuffled_swizzled(columns: int) -> Layout:
    """Their block scales: pairs, shuffle and tiles at once."""
    return Layout("(h (i r4 b a)) (k m c4) -> i k m a ~h b r4 c4", h=2, r4=4, b=8, a=2, m=columns // 4, c4=4)


def fragments() -> Layout:
    """Packed weights u8 ``[N, K/2]`` to ``[K/16, 8N]``, MMA fragments of tiles of 16 K by 64 N: CuteDSL W4A16 on SM12x."""
    return Layout("(n w b1 q l) (k b0 p) -> k (n q l p w b1 b0)", w=2, b1=2, q=2, l=8, b0=2, p=4)


def pad_rows(rows: int) -> Layout:
    """A bias ``[R]`` in order, zeros to a multiple: CUTLASS."""
    return Layout("(i a) -> i a", a=rows)


def shuffle_rows(rows: int) -> Layout:
    """A bias in the order of :func:`shuffle`, epilogue tile 128. ``rows`` is a multiple of 32."""
    return Layout("(i g b a) -> i g a b", g=rows // 32, b=8, a=4)


def up_gate_rows(rows: int) -> Layout:
    """A bias in the order of :func:`up_gate`."""
    return Layout("(h (i a)) -> ~h i a", h=2, a=rows)


def up_gate_shuffled_rows(rows: int = 64) -> Layout:
    """A bias in the order of :func:`up_gate_shuffled`."""
    return Layout("(h (i g b a)) -> i g a ~h b", h=2, g=rows // 16, b=8, a=2)
