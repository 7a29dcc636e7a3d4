"""W4A16 for up to 16 tokens: one pass over the weights, from global memory to tensor cores without shared memory.

[Note: fragments by address] A tensor core's fragment belongs to one lane, but which columns of K a lane brings is free, as long
as weights and activations agree. So a lane loads 16 consecutive packed bytes of its row and they *are* its fragments: no byte
changes lane. Written in Gluon, where register layouts are explicit; `triton_linear.py` is the general kernel.

[Note: two at a time] In a 32-bit word of four packed bytes, ``word & 0x000F000F`` is two low nibbles 16 bits apart. Multiplied
with ``2**12 + 2**6`` each lands with its sign on bit 15 and its ``ee m`` on bits 8..6, which is the bfloat16 of the value times
2^-126 (see [Note: exact decoding] in triton_linear.py). Bytes 0 and 2 come out as one register, 1 and 3 as the next; the
activations are put into the same order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

MAX_TOKENS = 16
#: Bytes of a row that four lanes hold at once; four such pieces are in flight.
PIECE = gl.constexpr(64)


def _nibbles(out: int, word: str, mask: int, factor: int) -> str:
    return (
        f"and.b32 p, {word}, {mask:#010x};\nmul.lo.u32 p, p, {factor:#x};\nand.b32 p, p, 0x81C081C0;\n"
        f"fma.rn.bf16x2 ${out}, p, $5, z;\n"
    )


#: Four packed bytes and their block scale to four low and four high values: [Note: two at a time]. Adding -0 changes nothing.
_DECODE = (
    "{\n.reg .b32 p, u, z;\nshr.u32 u, $4, 8;\nmov.b32 z, 0x80008000;\n"
    + _nibbles(0, "$4", 0x000F000F, 2**12 + 2**6)
    + _nibbles(1, "u", 0x000F000F, 2**12 + 2**6)
    + _nibbles(2, "$4", 0x00F000F0, 2**8 + 2**2)
    + _nibbles(3, "u", 0x00F000F0, 2**8 + 2**2)
    + "}"
)
#: Four pairs (even, odd column) of activations to the even and the odd ones, in the order of the weights.
_UNZIP = """{
prmt.b32 $0, $4, $6, 0x5410;
prmt.b32 $1, $5, $7, 0x5410;
prmt.b32 $2, $4, $6, 0x7632;
prmt.b32 $3, $5, $7, 0x7632;
}"""


@gluon.jit
def _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, groups, pairs, token_ok, half_k):
    """One piece of packed weights, raw block scales and activation pairs."""
    g = at // 8 + groups
    ok = row_ok & (g < half_k // 8)
    packed = gl.load(weight_ptr + at + w_off, mask=gl.expand_dims(ok, 3), other=0)
    raw = gl.load(scale_ptr + s_off + (g // 4 * 512 + g % 4), mask=ok, other=0)
    x = gl.load(x_ptr + at + x_off, mask=token_ok & (at + pairs < half_k), other=0)
    return packed, raw, x


@gluon.jit
def _add(packed, raw, x, total, ROWS: gl.constexpr, DECODE: gl.constexpr, UNZIP: gl.constexpr, OPERAND: gl.constexpr):
    """Decode one piece and add its products."""
    bits = (((raw & 127).to(gl.int16) << 4) | ((raw & 128).to(gl.int16) << 8)).to(gl.bfloat16, bitcast=True)
    scale = ((bits.to(gl.float32) * 1.329227995784916e36) * 3.3230699894622896e35).to(gl.bfloat16)  # times 2^120, 2^118
    wide, packed = gl.broadcast(gl.expand_dims(scale, 3), packed)
    low, high = gl.inline_asm_elementwise(
        DECODE, "=&r,=&r,=&r,=&r,r,r,r", [packed, wide], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=4
    )
    even, odd = gl.inline_asm_elementwise(
        UNZIP, "=&r,=&r,=&r,=&r,r,r,r,r", [x], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=4
    )
    low = gl.convert_layout(gl.reshape(gl.permute(low, (0, 2, 1, 3)), (ROWS, PIECE)), OPERAND)  # renames, moves nothing
    high = gl.convert_layout(gl.reshape(gl.permute(high, (0, 2, 1, 3)), (ROWS, PIECE)), OPERAND)
    return mma_v2(high, odd, mma_v2(low, even, total))


@gluon.jit
def decode_linear(
    x_ptr,
    weight_ptr,
    scale_ptr,
    alpha_ptr,
    out_ptr,
    m_size,
    n_size,
    half_k,
    weight_stride,
    scale_columns,
    out_stride,
    split_stride,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    SHUFFLED: gl.constexpr,
    LAYOUT: gl.constexpr,
    WARPS: gl.constexpr,
    DECODE: gl.constexpr,
    UNZIP: gl.constexpr,
):
    """ROWS kernel rows by up to TOKENS (8 or 16) tokens, over one of SPLIT_K ranges of K. ``x_ptr``: pairs of bf16 as int32."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=8)
    activation: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=mma, k_width=8)
    groups_layout: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    start = gl.program_id(0) * ROWS
    part = gl.program_id(1)
    # Dims of a piece: row, lane of four, side of the lane's 16 bytes, byte of 8 (one block scale).
    row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, groups_layout)))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, groups_layout)))
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(0, groups_layout)))
    byte = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT))))
    rows = gl.expand_dims(gl.expand_dims(row, 1), 2)
    groups = gl.expand_dims(gl.expand_dims(lane, 0), 2) * 2 + gl.expand_dims(gl.expand_dims(side, 0), 0)
    bytes_ = gl.expand_dims(gl.expand_dims(gl.expand_dims(byte, 0), 0), 0)
    w_off = gl.expand_dims(rows.to(gl.int64) * weight_stride + groups * 8, 3) + bytes_
    s_off = rows // 128 * 128 * scale_columns + rows % 32 * 16 + rows % 128 // 32 * 4
    pair = gl.arange(0, PIECE, layout=gl.SliceLayout(1, activation))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, activation))
    pairs = gl.expand_dims(pair // 8 % 4 * 16 + pair // 32 * 8 + pair % 8, 1)
    x_off = gl.expand_dims(token, 0) * half_k + pairs
    row_ok = rows < n_size
    token_ok = gl.expand_dims(token < m_size, 0)
    total = gl.zeros((ROWS, TOKENS), gl.float32, layout=mma)
    steps = gl.cdiv(gl.cdiv(half_k, 4 * PIECE), SPLIT_K)
    for step in range(part * steps, (part + 1) * steps):
        at = step * 4 * PIECE
        w0, s0, x0 = _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, groups, pairs, token_ok, half_k)
        at += PIECE
        w1, s1, x1 = _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, groups, pairs, token_ok, half_k)
        at += PIECE
        w2, s2, x2 = _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, groups, pairs, token_ok, half_k)
        at += PIECE
        w3, s3, x3 = _load(weight_ptr, scale_ptr, x_ptr, at, w_off, s_off, x_off, row_ok, groups, pairs, token_ok, half_k)
        total = _add(w0, s0, x0, total, ROWS, DECODE, UNZIP, operand)
        total = _add(w1, s1, x1, total, ROWS, DECODE, UNZIP, operand)
        total = _add(w2, s2, x2, total, ROWS, DECODE, UNZIP, operand)
        total = _add(w3, s3, x3, total, ROWS, DECODE, UNZIP, operand)
    alpha = gl.load(alpha_ptr) * 256.0
    out_row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    out_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, mma))
    if SHUFFLED:  # kernel row i is logical row P(i): see layouts/shuffle_rows.py
        out_row = 32 * (out_row // 32) + 4 * (out_row % 8) + (out_row % 32) // 8
    where = out_ptr + part * split_stride + gl.expand_dims(out_token, 0) * out_stride + gl.expand_dims(out_row, 1)
    ok = gl.expand_dims(out_row < out_stride, 1) & gl.expand_dims(out_token < m_size, 0)
    gl.store(where, (total * alpha).to(out_ptr.dtype.element_ty), mask=ok)


@cache
def _layout(warps: int, rows: int) -> Any:
    """Which register of which lane holds (row, lane of four, side, byte): [Note: fragments by address]."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [8, 0, 0, 0]]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    by_warp = [[16 * 2**i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=registers, lane_bases=lanes, warp_bases=by_warp, block_bases=[], shape=[rows, 4, 2, 8]
    )


def launch_options(tokens: int, n: int, k: int) -> tuple[int, dict[str, Any]]:
    """(row blocks, constants) by shape alone, so that a captured graph and a later call run the same kernel."""
    warps, rows = 2, 32
    blocks, split = -(-n // rows), 1
    while split < 8 and blocks * split < 2048 and k // 512 >= 2 * split:
        split *= 2
    constants = {
        "ROWS": rows,
        "TOKENS": 8 if tokens <= 8 else 16,
        "SPLIT_K": split,
        "LAYOUT": _layout(warps, rows),
        "WARPS": warps,
        "DECODE": _DECODE,
        "UNZIP": _UNZIP,
        "num_warps": warps,
    }
    return blocks, constants
