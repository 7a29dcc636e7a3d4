"""Kernel formats of an MoE layer's four large tensors. Checkpoint rows of w13 are ``[w1 gate; w3 up]`` for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from aliasparam import Identity, PadLast2, Transform

from ..layouts import UP_GATE, PadHalves, ShuffleRows, Swizzle128x4, up_gate_blocks, up_gate_shuffled


@dataclass(frozen=True)
class MoELayout:
    """Four transforms, all per expert.

    ``w13``: u8 ``[E, 2I, H/2]``; ``w13_scale``: e4m3 ``[E, 2I, H/16]``; ``w2``: u8 ``[E, H, I/2]``; ``w2_scale``: e4m3
    ``[E, H, I/16]``. ``hidden`` and ``intermediate`` say to which multiples H and I are padded with zeros: a padded gate and
    up row gives ``silu(0) * 0``, which meets a zero column of w2, so results do not change.
    """

    name: str
    w13: Transform
    w13_scale: Transform
    w2: Transform
    w2_scale: Transform
    hidden: int = 1
    intermediate: int = 1


def _padded(name: str, order: Transform, w2_order: Transform, swizzle: Transform, hidden: int, intermediate: int) -> MoELayout:
    """Pad, put rows in order, swizzle the scales."""
    h, i = hidden, intermediate
    return MoELayout(
        name,
        w13=PadHalves(i, h // 2).then(order),
        w13_scale=PadHalves(i, h // 16).then(order).then(swizzle),
        w2=PadLast2(h, i // 2).then(w2_order),
        w2_scale=PadLast2(h, i // 16).then(w2_order).then(swizzle),
        hidden=h,
        intermediate=i,
    )


#: The checkpoint's own bytes: the reference, and cuTile on compute capability 8.9 and 9.0.
CHECKPOINT = MoELayout("checkpoint", Identity(), Identity(), Identity(), Identity())
#: The same rows with H and I in whole 64s, and row-major scales (FlashInfer ``prepare_cutile_nvfp4_weights``, below 10.0).
ROW_MAJOR_64 = _padded("row-major", Identity(), Identity(), Identity(), 64, 64)
#: ``[gate; up]``, scales swizzled: CuteDSL v1, cuTile on 12.x.
GATE_UP = _padded("gate-up", Identity(), Identity(), Swizzle128x4(), 64, 64)
#: ``[up; gate]``, scales swizzled: CUTLASS (fused_moe ``binding.cu``: scales ``[E, 2*ceil(I/64)*64, ...]``).
UP_GATE_SWIZZLED = _padded("up-gate", UP_GATE, Identity(), Swizzle128x4(), 64, 64)
#: The same with H in whole 128s and I in whole 256s: b12x takes I in pairs of 128, and where they are not whole it makes padded
#: copies, which it keeps by address and no reload would reach (``moe_dispatch.py``, ``_STATIC_RETAINED_GROUP_N``).
UP_GATE_256 = _padded("up-gate-256", UP_GATE, Identity(), Swizzle128x4(), 128, 256)
#: Blocks of 64 rows from up and gate in turn: CuteDSL v2.
INTERLEAVED = _padded("interleaved", up_gate_blocks(64), Identity(), Swizzle128x4(), 64, 64)
#: Pairs (up, gate), shuffled for an epilogue tile of 128: TRT-LLM. The scale shuffle wants whole 128s of rows.
SHUFFLED = _padded("shuffled", up_gate_shuffled(), ShuffleRows(128), Swizzle128x4(), 128, 64)
