"""Kernel orders as lines (see :class:`aliasparam.Layout`), each with the peer's function that it is equal to.

Weights are packed bytes ``[N, K/2]``, block scales one byte each ``[N, K/16]``. Rows of w13 are ``[gate; up]`` in the checkpoint.
"""

from __future__ import annotations

from aliasparam import Layout

#: The checkpoint's own order, matrix by matrix.
SAME = Layout.identity(2)

#: Block scales in tiles of 128 rows by 4 columns (TensorRT-LLM ``computeSFIndex``; FlashInfer
#: ``csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp``): byte (r, c) at ``(r//128)*128*P + (c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4``
#: with P the padded columns.
SWIZZLE_128X4 = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4")

#: Block scales in tiles of 8 rows by 4 columns, for activations of few rows in TRT-LLM's GEMM (the same file).
SWIZZLE_8X4 = Layout("(rt r8) (ct c4) -> rt ct r8 c4, r8=8 c4=4")

#: Rows in the order in which the transposed MMA's epilogue writes them (FlashInfer ``shuffle_matrix_a``, epilogue tile of 128
#: rows; ``flashinfer/utils.py``, ``get_shuffle_matrix_a_row_indices``).
SHUFFLE_ROWS_128 = Layout("(g b a) k -> g a b k, b=8 a=4")

#: The same for an epilogue tile of 64 rows.
SHUFFLE_ROWS_64 = Layout("(g b a) k -> g a b k, b=8 a=2")

#: MMA fragments of compute capability 12.x, ``[K/16, 8N]`` (FlashInfer ``gemm_bf16_fp4_cute_dsl.py``, ``_cute_dsl_pack_fp4_weight``).
FRAGMENTS = Layout("(n w b1 q l) (k b0 p) -> k (n q l p w b1 b0), w=2 b1=2 q=2 l=8 b0=2 p=4")


def padded(rows: int, columns: int) -> Layout:
    """Whole multiples of ``rows`` and ``columns``."""
    return Layout("(n r) (k c) -> n r k c", r=rows, c=columns)


def shuffled(columns: int) -> Layout:
    """Rows in whole 128s, shuffled for an epilogue tile of 128; whole multiples of ``columns``."""
    return Layout("(t g b a) (k c) -> t g a b k c, g=4 b=8 a=4", c=columns)


def gate_up(rows: int, columns: int) -> Layout:
    """``[gate; up]``, each padded for itself to whole multiples of ``rows``."""
    return Layout("(h (g r)) (k c) -> h g r k c, h=2", r=rows, c=columns)


def up_gate(rows: int, columns: int) -> Layout:
    """``[up; gate]``, each padded for itself (CUTLASS and b12x MoE)."""
    return Layout("(h (g r)) (k c) -> ~h g r k c, h=2", r=rows, c=columns)


def up_gate_blocks(columns: int) -> Layout:
    """64 rows of up, 64 of gate in turn (FlashInfer ``_interleave_linear_and_gate`` of ``[up; gate]``, 64 rows: CuteDSL)."""
    return Layout("(h (g r)) (k c) -> g ~h r k c, h=2 r=64", c=columns)


def up_gate_shuffled(columns: int) -> Layout:
    """Pairs (up, gate), shuffled for an epilogue tile of 128 (FlashInfer ``_maybe_get_cached_w3_w1_permute_indices`` of
    ``[up; gate]``: TRT-LLM); halves in whole 64s."""
    return Layout("(h (t g b a)) (k c) -> t g a ~h b k c, h=2 g=4 b=8 a=2", c=columns)
