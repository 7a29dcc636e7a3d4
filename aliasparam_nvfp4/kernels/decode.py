"""W4A16 for up to 16 tokens: one pass over the weights, from global memory to tensor cores without shared memory.

[Note: fragments by address] A tensor core's fragment belongs to one lane, but which columns of K a lane brings is free, as long
as weights and activations agree. So a lane loads 16 consecutive packed bytes of its row, as four 32-bit words, and they *are* its
fragments: no byte changes lane. Written in Gluon, where register layouts are explicit; `tiled.py` is the general kernel.

[Note: two at a time] In a 32-bit word of four packed bytes, ``word & 0x000F000F`` is two low nibbles 16 bits apart. Multiplied
with ``2**12 + 2**6`` each lands with its sign on bit 15 and its ``ee m`` on bits 8..6, which is the bfloat16 of the value times
2^-126 (see [Note: exact decoding] in tiled.py). Bytes 0 and 2 come out as one register, 1 and 3 as the next; the activations
are put into the same order.

[Note: scales of four rows] In the 128x4 swizzle the 16 bytes from ``(r % 32) * 16`` hold four scales each of rows r, r+32, r+64
and r+96. A block of 128 rows gives all four to one lane, so that it reads 16 bytes once and no byte of a tile twice.

[Note: two pieces in flight] The loop multiplies one piece while the next is on its way. What is carried from one turn to the
next are 32-bit words as they were loaded: carried as bytes they would take a register each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cut import PIECE_BYTES, Cut

MAX_TOKENS = 16
PIECE = gl.constexpr(PIECE_BYTES)


def _nibbles(out: int, word: str, mask: int, factor: int) -> str:
    return (
        f"and.b32 p, {word}, {mask:#010x};\nmul.lo.u32 p, p, {factor:#x};\nand.b32 p, p, 0x81C081C0;\n"
        f"fma.rn.bf16x2 p, p, c, z;\nmov.b32 {{${out}, ${out + 1}}}, p;\n"
    )


#: Four packed bytes and their block scale to low nibbles of bytes 0, 2, 1, 3 and high ones of 0, 2, 1, 3: [Note: two at a time].
#: Adding -0 changes nothing.
_DECODE = (
    "{\n.reg .b32 p, u, z, c;\nshr.u32 u, $8, 8;\nmov.b32 z, 0x80008000;\nmov.b32 c, {$9, $9};\n"
    + _nibbles(0, "$8", 0x000F000F, 2**12 + 2**6)
    + _nibbles(2, "u", 0x000F000F, 2**12 + 2**6)
    + _nibbles(4, "$8", 0x00F000F0, 2**8 + 2**2)
    + _nibbles(6, "u", 0x00F000F0, 2**8 + 2**2)
    + "}"
)
#: Four pairs (even, odd column) of activations to the even and the odd ones, in the order of the weights.
_UNZIP = """{
prmt.b32 $0, $4, $6, 0x5410;
prmt.b32 $1, $5, $7, 0x5410;
prmt.b32 $2, $4, $6, 0x7632;
prmt.b32 $3, $5, $7, 0x7632;
}"""
#: Two e4m3 scales in the low half of a word to bfloat16, times 2^118 (with the codes' 2^-126 that leaves 2^-8).
_SCALES = """{
.reg .b16 a, b, e;
.reg .b32 h, f, g;
cvt.u16.u32 e, $2;
cvt.rn.f16x2.e4m3x2 h, e;
mov.b32 {a, b}, h;
cvt.f32.f16 f, a;
cvt.f32.f16 g, b;
mul.f32 f, f, 0f7A800000;
mul.f32 g, g, 0f7A800000;
cvt.rn.bf16.f32 $0, f;
cvt.rn.bf16.f32 $1, g;
}"""
#: The same without the conversion, which compute capability 8.x below 8.9 does not have: e4m3 bits as bfloat16 bits are the
#: scale times 2^-120; two products bring it to 2^118.
_SCALES_BY_BITS = """{
.reg .b32 f, g, s;
and.b32 f, $2, 0x7F; shl.b32 f, f, 20; and.b32 s, $2, 0x80; shl.b32 s, s, 24; or.b32 f, f, s;
and.b32 g, $2, 0x7F00; shl.b32 g, g, 12; and.b32 s, $2, 0x8000; shl.b32 s, s, 16; or.b32 g, g, s;
mul.f32 f, f, 0f7B800000; mul.f32 f, f, 0f7A800000;
mul.f32 g, g, 0f7B800000; mul.f32 g, g, 0f7A800000;
cvt.rn.bf16.f32 $0, f;
cvt.rn.bf16.f32 $1, g;
}"""


@gluon.jit
def _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, words, tiles, pairs, token_ok, half_k,
          WHOLE: gl.constexpr):  # fmt: skip
    """One piece of packed words, raw block scales and activation pairs. WHOLE: no row and no column is outside."""
    if WHOLE:
        packed = gl.load(weight_ptr + at // 4 + w_off)
        raw = gl.load(scale_ptr + at * 4 + s_off)
        x = gl.load(x_ptr + at + x_off, mask=token_ok, other=0)
    else:
        packed = gl.load(weight_ptr + at // 4 + w_off, mask=row_ok & (at // 4 + words < half_k // 4), other=0)
        raw = gl.load(scale_ptr + at * 4 + s_off, mask=at // 32 + tiles < (half_k + 31) // 32, other=0)
        x = gl.load(x_ptr + at + x_off, mask=token_ok & (at + pairs < half_k), other=0)
    return packed, raw, x


@gluon.jit
def _operand(a, b, c, d, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Nibbles of bytes 0, 2, 1, 3 of each word as an operand ``[ROWS, PIECE]``: registers get other names, nothing moves."""
    four = gl.permute(gl.join(gl.join(a, b), gl.join(c, d)), (0, 1, 2, 4, 3))
    four = gl.permute(gl.reshape(four, (ROWS, 4, 2, 8)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(four, (ROWS, PIECE)), OPERAND)


@gluon.jit
def _add(packed, raw, x, total, odd_half, ROWS: gl.constexpr, DECODE: gl.constexpr, UNZIP: gl.constexpr, SCALES: gl.constexpr,
         OPERAND: gl.constexpr, WORDS: gl.constexpr):  # fmt: skip
    """Decode one piece and add its products."""
    s0, s1 = gl.inline_asm_elementwise(
        SCALES, "=h,=h,r", [raw >> odd_half], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )
    scale = gl.reshape(gl.permute(gl.join(s0, s1), (2, 0, 1, 3)), (ROWS, 4, 2))  # from (row of 32, lane, quarter, side)
    scale = gl.convert_layout(gl.reshape(gl.join(scale, scale), (ROWS, 4, 4)), WORDS)
    l0, l1, l2, l3, h0, h1, h2, h3 = gl.inline_asm_elementwise(
        DECODE,
        "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,h",
        [packed, scale],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    even, odd = gl.inline_asm_elementwise(
        UNZIP, "=&r,=&r,=&r,=&r,r,r,r,r", [x], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=4
    )
    total = mma_v2(_operand(l0, l1, l2, l3, ROWS, OPERAND), even, total)
    return mma_v2(_operand(h0, h1, h2, h3, ROWS, OPERAND), odd, total)


@gluon.jit
def decode_linear(
    x_ptr,
    weight_ptr,
    scale_ptr,
    alpha_ptr,
    out_ptr,
    plan_ptr,
    m_size,
    n_size,
    half_k,
    weight_stride,
    scale_columns,
    out_stride,
    split_stride,
    weight_expert_stride,
    scale_expert_stride,
    tiles_size,
    x_share,
    split_k,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPED: gl.constexpr,
    SHUFFLED: gl.constexpr,
    WHOLE: gl.constexpr,
    WORDS: gl.constexpr,
    QUARTERS: gl.constexpr,
    WARPS: gl.constexpr,
    DECODE: gl.constexpr,
    UNZIP: gl.constexpr,
    SCALES: gl.constexpr,
):
    """ROWS kernel rows by up to TOKENS (8 or 16) tokens, over one of ``split_k`` ranges of K.

    ``x_ptr``: pairs of bf16 as int32; ``weight_ptr`` and ``scale_ptr``: words of four bytes, strides in words too. GROUPED: a
    program works on one tile of plan.py, and row ``slot // x_share`` of x gives row ``slot`` of the result.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=8)
    activation: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=mma, k_width=8)
    start = gl.program_id(0) * ROWS
    part = gl.program_id(1)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, activation))
    out_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, mma))
    if GROUPED:
        tile = gl.program_id(2)
        expert = gl.load(plan_ptr + 3 * tile)
        if expert < 0:
            return
        first = gl.load(plan_ptr + 3 * tile + 1)
        m_size = gl.load(plan_ptr + 3 * tile + 2)
        slots = plan_ptr + 3 * tiles_size + first
        x_row = gl.load(slots + token, mask=token < m_size, other=0) // x_share
        out_at = gl.load(slots + out_token, mask=out_token < m_size, other=0)
        weight_ptr += expert.to(gl.int64) * weight_expert_stride
        scale_ptr += expert.to(gl.int64) * scale_expert_stride
    else:
        x_row = token
        out_at = out_token
    # Words of weights: row, lane of four, word of the lane's four.
    row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, WORDS)))
    rows = gl.expand_dims(gl.expand_dims(row, 1), 2)
    words = gl.expand_dims(gl.expand_dims(lane, 0), 2) * 4 + gl.expand_dims(gl.expand_dims(word, 0), 0)
    w_off = rows.to(gl.int64) * weight_stride + words
    row_ok = rows < n_size
    # Words of scales, four columns of one row each: row of 32, lane of four, 32 rows of the block.
    row32 = gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, QUARTERS)))
    s_lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, QUARTERS)))
    quarter = gl.arange(0, ROWS // 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, QUARTERS))) + start % 128 // 32
    tiles = gl.expand_dims(gl.expand_dims(s_lane // 2, 0), 2)
    odd_half = gl.expand_dims(gl.expand_dims(s_lane % 2 * 16, 0), 2)
    s_off = start // 128 * 128 * scale_columns + tiles * 128
    s_off = s_off + gl.expand_dims(gl.expand_dims(row32, 1), 2) * 4 + gl.expand_dims(gl.expand_dims(quarter, 0), 0)
    # Pairs of activations, in the order of the weights' bytes.
    pair = gl.arange(0, PIECE, layout=gl.SliceLayout(1, activation))
    pairs = gl.expand_dims(pair // 8 % 4 * 16 + pair // 32 * 8 + pair % 8, 1)
    x_off = gl.expand_dims(x_row, 0) * half_k + pairs
    token_ok = gl.expand_dims(token < m_size, 0)
    total = gl.zeros((ROWS, TOKENS), gl.float32, layout=mma)
    steps = gl.cdiv(gl.cdiv(half_k, 2 * PIECE), split_k)
    at = part * steps * 2 * PIECE
    w0, s0, x0 = _load(
        weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, words, tiles, pairs, token_ok, half_k, WHOLE
    )
    at += PIECE
    w1, s1, x1 = _load(
        weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, words, tiles, pairs, token_ok, half_k, WHOLE
    )
    at += PIECE
    for _ in range(steps - 1):  # [Note: two pieces in flight]
        total = _add(w0, s0, x0, total, odd_half, ROWS, DECODE, UNZIP, SCALES, operand, WORDS)
        w0, s0, x0 = _load(
            weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, words, tiles, pairs, token_ok, half_k, WHOLE
        )
        at += PIECE
        total = _add(w1, s1, x1, total, odd_half, ROWS, DECODE, UNZIP, SCALES, operand, WORDS)
        w1, s1, x1 = _load(
            weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, words, tiles, pairs, token_ok, half_k, WHOLE
        )
        at += PIECE
    total = _add(w0, s0, x0, total, odd_half, ROWS, DECODE, UNZIP, SCALES, operand, WORDS)
    total = _add(w1, s1, x1, total, odd_half, ROWS, DECODE, UNZIP, SCALES, operand, WORDS)
    if GROUPED:
        total = total * 256.0
    else:
        total = total * (gl.load(alpha_ptr) * 256.0)
    out_row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    if SHUFFLED:  # kernel row i is logical row P(i): see layouts/shuffle_rows.py
        out_row = 32 * (out_row // 32) + 4 * (out_row % 8) + (out_row % 32) // 8
    where = out_ptr + part.to(gl.int64) * split_stride + gl.expand_dims(out_at.to(gl.int64), 0) * out_stride
    ok = gl.expand_dims(out_row < out_stride, 1) & gl.expand_dims(out_token < m_size, 0)
    gl.store(where + gl.expand_dims(out_row, 1), total.to(out_ptr.dtype.element_ty), mask=ok)


@cache
def _layouts(rows: int, warps: int) -> tuple[Any, Any]:
    """Which register of which lane and warp holds (row, lane of four, word), and (row of 32, lane of four, 32 rows of the block).

    Rows follow the tensor cores: 1, 2, 4 by lane, 8 by register, then by warp, and what is left by register again.
    """
    more = [r for r in (16, 32, 64) if r < rows]
    by_warp, by_register = more[: warps.bit_length() - 1], more[warps.bit_length() - 1 :]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    words = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [8, 0, 0], *([r, 0, 0] for r in by_register)],
        lane_bases=lanes,
        warp_bases=[[r, 0, 0] for r in by_warp],
        block_bases=[],
        shape=[rows, 4, 4],
    )
    quarters = gl.DistributedLinearLayout(
        reg_bases=[*([0, 0, r // 32] for r in by_register), [8, 0, 0]],
        lane_bases=lanes,
        warp_bases=[[16, 0, 0], *([0, 0, r // 32] for r in by_warp[1:])],
        block_bases=[],
        shape=[32, 4, rows // 32],
    )
    return words, quarters


def constants(tokens: int, shape: Cut, *, native_e4m3: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments.

    Args:
        tokens: at most 16.
        shape: from cut.py.
        native_e4m3: the GPU converts e4m3 itself (compute capability 8.9 and later).
    """
    words, quarters = _layouts(shape.rows, shape.warps)
    return {
        "ROWS": shape.rows,
        "TOKENS": 8 if tokens <= 8 else 16,
        "WHOLE": shape.whole,
        "WORDS": words,
        "QUARTERS": quarters,
        "WARPS": shape.warps,
        "DECODE": _DECODE,
        "UNZIP": _UNZIP,
        "SCALES": _SCALES if native_e4m3 else _SCALES_BY_BITS,
        "num_warps": shape.warps,
    }
