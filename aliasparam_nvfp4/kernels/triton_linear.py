"""W4A16 GEMM and GEMV from the bytes of the CUTLASS (or TRT-LLM) kernel format: `out = x @ dequantized weight.T * alpha`.

Weights are decoded in registers. Written for compute capability 8.0 and later; sums in float32 on tensor cores.

[Note: exact decoding] An e2m1 code ``s ee m`` put into the bits of a bfloat16 (sign to 15, ``ee m`` to 8..6) is the value times
2^-126; its zero and 0.5 come out as subnormals, so there are no special cases. A block scale e4m3 becomes bfloat16 times 2^118
and the product, ``code * scale * 2^-8``, has at most 6 significant bits: exact. ``alpha`` takes the factor out at the end.
In float16 the same with ``ee m`` at 11..9 (2^-14), scales times 2^7, and 2^7 at the end.

[Note: even and odd] A byte holds columns 2j (low nibble) and 2j+1. Low and high nibbles are multiplied with the even and the odd
columns of x in two products, so nothing is interleaved.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _linear(
    x_ptr,
    weight_ptr,
    scale_ptr,
    alpha_ptr,
    out_ptr,
    m_size,
    n_size,
    k_size,
    weight_stride,
    scale_columns,
    out_stride,
    split_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ASM: tl.constexpr,
    PTX: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    OUT_FACTOR: tl.constexpr,
):
    """One tile of BLOCK_N kernel rows by BLOCK_M activations, over one of SPLIT_K ranges of K."""
    GROUPS: tl.constexpr = BLOCK_K // 16
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
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
        x = tl.load(x_rows + k, mask=(tokens < m_size)[:, None] & (k + column < k_size)[None, :], other=0.0)
        if not ASM:
            x = x.to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        total = tl.dot(tl.reshape(low, (BLOCK_N, BLOCK_K // 2)), tl.trans(even), total)
        total = tl.dot(tl.reshape(high, (BLOCK_N, BLOCK_K // 2)), tl.trans(odd), total)
    alpha = tl.load(alpha_ptr) * OUT_FACTOR
    if SHUFFLED:  # kernel row i is logical row P(i): see layouts/shuffle_rows.py
        rows = 32 * (rows // 32) + 4 * (rows % 8) + (rows % 32) // 8
    row_ok = rows < out_stride
    where = out_ptr + part.to(tl.int64) * split_stride + tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
    tl.store(where, (total * alpha).to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (tokens < m_size)[None, :])


@triton.jit
def _sum_parts(parts_ptr, out_ptr, size, split_stride, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the SPLIT_K partial sums in order, so that the result is the same every time."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + part * split_stride + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)


def linear(x: Tensor, weight: Tensor, scale: Tensor, alpha: Tensor, *, n: int, shuffled: bool = False) -> Tensor:
    """``[M, K] -> [M, n]`` in ``x.dtype``, from kernel-format bytes.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous; K a multiple of 16.
        weight: u8 ``[>= n, >= K/2]`` packed codes, in row order or shuffled (``ShuffleRows(128)``).
        scale: e4m3 ``[ceil(n/128)*128, P]``, 128x4-swizzled, rows in the order of ``weight``.
        alpha: f32 ``[1]``.
        n: logical output features.
        shuffled: whether rows are in TRT-LLM's order.

    Deterministic, allocates only its result and partial sums, and looks at no value on the host: safe in CUDA graphs.
    """
    if x.is_cuda and x.dtype is torch.bfloat16 and x.shape[0] <= _most_decode_tokens():
        return _decode(x, weight, scale, alpha, n=n, shuffled=shuffled)
    m, k = x.shape
    config = _config(m, n, k, x.device)
    split = config["SPLIT_K"]
    out, target = _outputs(split, m, n, x)
    kernel_rows = weight.shape[0] if shuffled else n
    grid = (triton.cdiv(kernel_rows, config["BLOCK_N"]), triton.cdiv(m, config["BLOCK_M"]), split)
    half, decode = x.dtype is torch.float16, x.is_cuda and not triton.knobs.runtime.interpret
    _linear[grid](
        x,
        weight,
        scale.view(torch.uint8),
        alpha,
        target,
        m,
        kernel_rows,
        k,
        weight.stride(0),
        scale.shape[-1],
        n,
        m * n,
        SHUFFLED=shuffled,
        ASM=decode,
        PTX=_DECODE_FP16 if half else _DECODE_BF16,
        SCALE_FACTOR=2.0**7 if half else 2.0**118,
        OUT_FACTOR=1.0 if not decode else 2.0**7 if half else 2.0**8,
        **config,
    )
    return _summed(out, target, split)


def _decode(x: Tensor, weight: Tensor, scale: Tensor, alpha: Tensor, *, n: int, shuffled: bool) -> Tensor:
    """Up to 16 tokens: see decode.py."""
    from .decode import decode_linear, launch_options

    m, k = x.shape
    kernel_rows = weight.shape[0] if shuffled else n
    blocks, constants = launch_options(m, kernel_rows, k)
    split = constants["SPLIT_K"]
    out, target = _outputs(split, m, n, x)
    decode_linear[(blocks, split)](
        x.view(torch.int32),
        weight,
        scale.view(torch.uint8),
        alpha,
        target,
        m,
        kernel_rows,
        k // 2,
        weight.stride(0),
        scale.shape[-1],
        n,
        m * n,
        SHUFFLED=shuffled,
        **constants,
    )
    return _summed(out, target, split)


def _outputs(split: int, m: int, n: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and where the kernel writes: the result itself, or float32 partial sums ``[split, m, n]``."""
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    return out, out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)


def _summed(out: Tensor, parts: Tensor, split: int) -> Tensor:
    if split > 1:
        size = out.numel()
        _sum_parts[(triton.cdiv(size, 1024),)](parts, out, size, size, SPLIT_K=split, BLOCK=1024)
    return out


@cache
def _most_decode_tokens() -> int:
    """How many tokens decode.py takes; none where Triton is older than 3.5 and has no explicit register layouts."""
    try:
        from .decode import MAX_TOKENS
    except ImportError:
        return 0
    return MAX_TOKENS


def _config(m: int, n: int, k: int, device: torch.device) -> dict[str, Any]:
    """Tile sizes by shape alone, so that a captured graph and a later call run the same kernel."""
    if m <= 16:
        block_n, block_k, warps, stages = 64, 128, 2, 4
        block_m = 16
    else:
        block_n, block_k, warps, stages = 128, 64, 8, 3
        block_m = 32 if m <= 32 else 64 if m <= 64 else 128
    tiles = -(-n // block_n) * -(-m // block_m)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    split = 1
    while split < 16 and tiles * split < 3 * processors and k // block_k >= 4 * split and m <= 64:
        split *= 2
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": split,
        "num_warps": warps,
        "num_stages": stages,
    }
