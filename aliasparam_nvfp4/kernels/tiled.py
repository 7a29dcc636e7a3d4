"""The general W4A16 kernel: any number of tokens, bf16 and fp16, and the interpreter. `decode.py` is for few tokens.

Weights are decoded in registers from the bytes of a kernel format with 128x4-swizzled scales. Written for compute capability 8.0
and later; sums in float32 on tensor cores.

[Note: exact decoding] An e2m1 code ``s ee m`` put into the bits of a bfloat16 (sign to 15, ``ee m`` to 8..6) is the value times
2^-126; its zero and 0.5 come out as subnormals, so there are no special cases. A block scale e4m3 becomes bfloat16 times 2^118
and the product, ``code * scale * 2^-8``, has at most 6 significant bits: exact. ``alpha`` takes the factor out at the end.
In float16 the same with ``ee m`` at 11..9 (2^-14), scales times 2^7, and 2^7 at the end.

[Note: even and odd] A byte holds columns 2j (low nibble) and 2j+1. Low and high nibbles are multiplied with the even and the odd
columns of x in two products, so nothing is interleaved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def _decode_ptx(magnitude: int, shifts: tuple[int, int], kind: str) -> str:
    """PTX from four packed bytes and the scales of their block to four low and four high values, two to a register.

    Args:
        magnitude: mask of ``ee m`` in both halves of a register.
        shifts: left shifts which bring ``ee m`` of the low and of the high nibble under the mask.
        kind: "bf16x2" or "f16x2".
    """
    lines = [".reg .b32 p, q, s, m;", "prmt.b32 p, $4, 0, 0x4140;", "prmt.b32 q, $4, 0, 0x4342;"]
    low, high = shifts
    for out, source, sign, shift in ((0, "p", 12, low), (1, "q", 12, low), (2, "p", 8, high), (3, "q", 8, high)):
        lines += [f"shl.b32 s, {source}, {sign};", f"shl.b32 m, {source}, {shift};", "and.b32 s, s, 0x80008000;"]
        lines += [f"lop3.b32 ${out}, m, {magnitude:#010x}, s, 0xEA;"]
    lines += ["mov.b32 s, 0x80008000;"]  # -0: adding it changes nothing, not even a zero's sign
    lines += [f"fma.rn.{kind} ${out}, ${out}, ${5 + out % 2}, s;" for out in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


_DECODE_BF16 = _decode_ptx(0x01C001C0, (6, 2), "bf16x2")
_DECODE_FP16 = _decode_ptx(0x0E000E00, (9, 5), "f16x2")


@triton.jit
def _decode_slowly(packed, raw):
    """(low, high) values times the block scale in float32, by arithmetic: for the interpreter, which knows no PTX."""
    low = (packed & 15).to(tl.int32)
    high = (packed >> 4).to(tl.int32)
    exponent = ((raw >> 3) & 15).to(tl.float32)
    mantissa = (raw & 7).to(tl.float32)
    scale = tl.where(exponent == 0, mantissa * 0.001953125, (8 + mantissa) * tl.exp2(exponent - 10))
    scale = tl.where(raw >= 128, -scale, scale)
    return _value(low) * scale[:, :, None], _value(high) * scale[:, :, None]


@triton.jit
def _value(code):
    magnitude = (code & 7).to(tl.float32)
    value = tl.where(magnitude < 4, magnitude * 0.5, tl.where(magnitude < 6, magnitude - 2, 2 * magnitude - 8))
    return tl.where(code >= 8, -value, value)


@triton.jit
def tiled_linear(
    x_ptr,
    weight_ptr,
    scale_ptr,
    alpha_ptr,
    out_ptr,
    plan_ptr,
    m_size,
    n_size,
    k_size,
    weight_stride,
    scale_columns,
    out_stride,
    split_stride,
    weight_expert_stride,
    scale_expert_stride,
    tiles_size,
    x_share,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUPED: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ASM: tl.constexpr,
    PTX: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    OUT_FACTOR: tl.constexpr,
):
    """One tile of BLOCK_N kernel rows by BLOCK_M activations, over one of SPLIT_K ranges of K.

    GROUPED: a program works on one tile of plan.py, and row ``slot // x_share`` of x gives row ``slot`` of the result.
    """
    GROUPS: tl.constexpr = BLOCK_K // 16
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    if GROUPED:
        tile = tl.program_id(1)
        expert = tl.load(plan_ptr + 3 * tile).to(tl.int64)
        if expert < 0:
            return
        first = tl.load(plan_ptr + 3 * tile + 1)
        token_ok = tl.arange(0, BLOCK_M) < tl.load(plan_ptr + 3 * tile + 2)
        out_tokens = tl.load(plan_ptr + 3 * tiles_size + first + tl.arange(0, BLOCK_M), mask=token_ok, other=0)
        tokens = out_tokens // x_share
        weight_ptr += expert * weight_expert_stride
        scale_ptr += expert * scale_expert_stride
        alpha = OUT_FACTOR
    else:
        tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        out_tokens = tokens
        token_ok = tokens < m_size
        alpha = tl.load(alpha_ptr) * OUT_FACTOR
    dtype = x_ptr.dtype.element_ty
    group = tl.arange(0, GROUPS)
    byte = tl.arange(0, 8)
    column = tl.arange(0, BLOCK_K)
    row_ok = rows < n_size
    wide_rows = rows.to(tl.int64)
    weight_rows = weight_ptr + wide_rows[:, None, None] * weight_stride + group[None, :, None] * 8 + byte[None, None, :]
    # 128x4 tiles: see layouts/swizzle_128x4.py.
    scale_rows = scale_ptr + (wide_rows // 128) * 128 * scale_columns + (rows % 32) * 16 + ((rows % 128) // 32) * 4
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * k_size + column[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    steps = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLIT_K)
    for step in range(part * steps, (part + 1) * steps):
        k = step * BLOCK_K
        groups = k // 16 + group
        group_ok = groups < k_size // 16
        packed = tl.load(weight_rows + k // 2, mask=row_ok[:, None, None] & group_ok[None, :, None], other=0)
        offset = (groups // 4) * 512 + groups % 4
        raw = tl.load(scale_rows[:, None] + offset[None, :], mask=row_ok[:, None] & group_ok[None, :], other=0)
        if ASM:
            # e4m3 bits as bfloat16 bits are the scale times 2^-120.
            bits = (((raw & 127).to(tl.int16) << 4) | ((raw & 128).to(tl.int16) << 8)).to(tl.bfloat16, bitcast=True)
            scale = ((bits.to(tl.float32) * 1.329227995784916e36) * SCALE_FACTOR).to(dtype)  # times 2^120, then the factor
            scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, GROUPS, 8))
            low, high = tl.inline_asm_elementwise(
                PTX, "=r,=r,=r,=r,r,r,r", [packed, scale], dtype=(dtype, dtype), is_pure=True, pack=4
            )
        else:
            low, high = _decode_slowly(packed, raw)
        x = tl.load(x_rows + k, mask=token_ok[:, None] & (k + column < k_size)[None, :], other=0.0)
        if not ASM:
            x = x.to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        total = tl.dot(tl.reshape(low, (BLOCK_N, BLOCK_K // 2)), tl.trans(even), total)
        total = tl.dot(tl.reshape(high, (BLOCK_N, BLOCK_K // 2)), tl.trans(odd), total)
    if SHUFFLED:  # kernel row i is logical row P(i): see layouts/shuffle_rows.py
        rows = 32 * (rows // 32) + 4 * (rows % 8) + (rows % 32) // 8
    row_ok = rows < out_stride
    where = out_ptr + part.to(tl.int64) * split_stride + out_tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
    tl.store(where, (total * alpha).to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


def constants(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The kernel's compile-time arguments which depend on dtype and device: [Note: exact decoding]."""
    half, compiled = dtype is torch.float16, device.type == "cuda" and not triton.knobs.runtime.interpret
    return {
        "ASM": compiled,
        "PTX": _DECODE_FP16 if half else _DECODE_BF16,
        "SCALE_FACTOR": 2.0**7 if half else 2.0**118,
        "OUT_FACTOR": 1.0 if not compiled else 2.0**7 if half else 2.0**8,
    }


def tile_sizes(tokens: int) -> dict[str, int]:
    """Tile sizes for about so many tokens a tile."""
    if tokens <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 2, "num_stages": 4}
    block_m = 32 if tokens <= 32 else 64 if tokens <= 64 else 128
    return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def split_of_k(tiles: int, steps: int, processors: int) -> int:
    """Into how many ranges K is cut so that all multiprocessors have work; ``steps`` blocks of K, at least 4 a range."""
    split = 1
    while split < 16 and tiles * split < 3 * processors and steps >= 4 * split:
        split *= 2
    return split
