"""Orders of gate and up rows that fused activations want. Checkpoints store ``[gate; up]``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aliasparam import InterleaveHalves, PermuteRows, SwapHalves, Transform

from .shuffle_rows import ShuffleRows

#: ``[up; gate]``: CUTLASS and b12x MoE.
UP_GATE = SwapHalves()


def up_gate_blocks(rows: int = 64) -> Transform:
    """Blocks of ``rows`` rows taken in turn from up and gate, up first: CuteDSL (FlashInfer ``_interleave_linear_and_gate``).

    Kernel row j is row ``rows*(j//(2*rows)) + ((j%(2*rows))//rows)*I + j%rows`` of ``[up; gate]``. I a multiple of ``rows``.
    """
    return SwapHalves().then(InterleaveHalves(rows))


@dataclass(frozen=True)
class _UpGateShuffled(PermuteRows):
    def source_rows(self, rows: int) -> Tensor:
        shuffled, half = ShuffleRows(128).source_rows(rows), rows // 2
        return (shuffled // 2 + (shuffled % 2) * half + half) % rows


def up_gate_shuffled() -> Transform:
    """Pairs (up, gate), then the TRT-LLM row shuffle: FlashInfer ``_maybe_get_cached_w3_w1_permute_indices``.

    Kernel row i is row ``s//2 + (s%2)*I`` of ``[up; gate]``, s the shuffle's source row. 2*I a multiple of 32. One gather; rows
    move across the whole, so it converts in bands of columns.
    """
    return _UpGateShuffled()
