"""Orders of gate and up rows that fused activations want. Checkpoints store ``[gate; up]``."""

from __future__ import annotations

from aliasparam import InterleaveHalves, SwapHalves, Transform

from .shuffle_rows import ShuffleRows

#: ``[up; gate]``: CUTLASS and b12x MoE.
UP_GATE = SwapHalves()


def up_gate_blocks(rows: int = 64) -> Transform:
    """Blocks of ``rows`` rows taken in turn from up and gate, up first: CuteDSL (FlashInfer ``_interleave_linear_and_gate``).

    Kernel row j is row ``rows*(j//(2*rows)) + ((j%(2*rows))//rows)*I + j%rows`` of ``[up; gate]``. I a multiple of ``rows``.
    """
    return SwapHalves().then(InterleaveHalves(rows))


def up_gate_shuffled() -> Transform:
    """Pairs (up, gate), then the TRT-LLM row shuffle: FlashInfer ``_maybe_get_cached_w3_w1_permute_indices``.

    Kernel row i is row ``s//2 + (s%2)*I`` of ``[up; gate]``, s the shuffle's source row. 2*I a multiple of 32.
    """
    return SwapHalves().then(InterleaveHalves(1)).then(ShuffleRows(128))
