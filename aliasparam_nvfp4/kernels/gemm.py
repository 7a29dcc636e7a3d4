"""One GEMM with kernel-format weights, of a linear layer or of all experts at once: which kernel, how it is cut, its launch.

Everything is decided by shapes and the GPU, so that a captured graph and a later call compute the same.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from .cut import cut_for
from .plan import Plan
from .tiled import constants as tiled_constants
from .tiled import split_of_k, tile_sizes, tiled_linear


def partial_sums(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    n: int,
    alpha: Tensor | None = None,
    planned: Plan | None = None,
    slots: int = 0,
    share: int = 1,
    shuffled: bool = False,
) -> Tensor:
    """``[ranges of K, M, n]``: float32 sums to be added up, or the result in ``x.dtype`` where a linear layer has one range.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous; K a multiple of 16.
        weight: u8 ``[>= n, >= K/2]`` packed codes, or one more dim for experts.
        scale: e4m3 128x4-swizzled ``[rows in whole 128s, columns]``, or one more dim for experts.
        n: logical output features.
        alpha: f32 ``[1]``, what sums are multiplied with; for a linear layer.
        planned: which rows meet which expert: row ``slot // share`` of x gives row ``slot`` of the result, unscaled.
        slots: rows of the result, with ``planned``.
        share: see there.
        shuffled: whether rows are in TRT-LLM's order (``layouts.lines.shuffled``).
    """
    rows = slots if planned else x.shape[0]
    tile = planned.tile if planned else rows
    run = _by_decode if _decodes(x, tile, weight) else _by_tiles
    return run(x, weight, scale, n, alpha, planned, rows, share, shuffled)


def _by_decode(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    alpha: Tensor | None,
    planned: Plan | None,
    rows: int,
    share: int,
    shuffled: bool,
) -> Tensor:
    from .decode import constants, decode_linear

    tile, half_k = planned.tile if planned else rows, x.shape[1] // 2
    kernel_rows = weight.shape[-2] if shuffled else n
    cut = cut_for(tile, kernel_rows, half_k, planned.likely if planned else 1, processors(x.device))
    out = _target(x, cut.split, rows, n, planned)
    decode_linear[(cut.blocks, cut.split, planned.tiles if planned else 1)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale.view(torch.int32),
        out if alpha is None else alpha,
        out,
        planned.table if planned else x,
        rows,
        kernel_rows,
        half_k,
        weight.stride(-2) // 4,
        scale.shape[-1] // 4,
        n,
        rows * n,
        weight.stride(0) // 4,
        scale.stride(0) // 4,
        planned.tiles if planned else 0,
        share,
        cut.split,
        GROUPED=planned is not None,
        SHUFFLED=shuffled,
        **constants(tile, cut, native_e4m3=_converts_e4m3(x.device)),
    )
    return out


def _by_tiles(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    alpha: Tensor | None,
    planned: Plan | None,
    rows: int,
    share: int,
    shuffled: bool,
) -> Tensor:
    k, sizes = x.shape[1], tile_sizes(planned.tile if planned else rows)
    kernel_rows = weight.shape[-2] if shuffled else n
    blocks = triton.cdiv(kernel_rows, sizes["BLOCK_N"])
    tiles = planned.tiles if planned else triton.cdiv(rows, sizes["BLOCK_M"])
    split = split_of_k(blocks * tiles, k // sizes["BLOCK_K"], processors(x.device)) if sizes["BLOCK_M"] <= 64 else 1
    out = _target(x, split, rows, n, planned)
    tiled_linear[(blocks, tiles, split)](
        x,
        weight,
        scale.view(torch.uint8),
        out if alpha is None else alpha,
        out,
        planned.table if planned else x,
        rows,
        kernel_rows,
        k,
        weight.stride(-2),
        scale.shape[-1],
        n,
        rows * n,
        weight.stride(0),
        scale.stride(0),
        planned.tiles if planned else 0,
        share,
        SPLIT_K=split,
        GROUPED=planned is not None,
        SHUFFLED=shuffled,
        **tiled_constants(x.dtype, x.device),
        **sizes,
    )
    return out


def _target(x: Tensor, split: int, rows: int, n: int, planned: Plan | None) -> Tensor:
    dtype = x.dtype if split == 1 and planned is None else torch.float32
    return torch.empty(split, rows, n, dtype=dtype, device=x.device)


def _decodes(x: Tensor, tile: int, weight: Tensor) -> bool:
    """Whether decode.py takes it: few bf16 rows, weights whose rows begin at multiples of 16 bytes."""
    return tile <= most_decode_tokens(x) and weight.stride(-2) % 16 == 0


def most_decode_tokens(x: Tensor) -> int:
    """How many rows a tile of decode.py takes of such activations; none where Triton is older than 3.5."""
    return _most_decode_tokens() if x.is_cuda and x.dtype is torch.bfloat16 else 0


@cache
def _most_decode_tokens() -> int:
    if triton.knobs.runtime.interpret:
        return 0
    try:
        from .decode import MAX_TOKENS
    except ImportError:  # no explicit register layouts
        return 0
    return MAX_TOKENS


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _converts_e4m3(device: torch.device) -> bool:
    """Whether the GPU has the conversion instruction."""
    return torch.cuda.get_device_capability(device) >= (8, 9)
