"""Kernel formats of an MoE layer's four large tensors. Checkpoint rows of w13 are ``[w1 gate; w3 up]`` for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from aliasparam import Identity, PadLast2, Transform

from ..errors import ShapeError
from ..layouts import UP_GATE, PadHalves, ShuffleRows, Swizzle128x4, up_gate_blocks, up_gate_shuffled
from .activation import ExpertActivation


@dataclass(frozen=True)
class MoELayout:
    """Four transforms, all per expert.

    ``w13``: u8 ``[E, 2I, H/2]``; ``w13_scale``: e4m3 ``[E, 2I, H/16]``; ``w2``: u8 ``[E, H, I/2]``; ``w2_scale``: e4m3
    ``[E, H, I/16]``. ``hidden`` and ``intermediate`` say to which multiples H and I are padded with zeros: a padded gate and
    up row gives ``silu(0) * 0``, which meets a zero column of w2, so results do not change.

    ``ungated`` is the format of experts without a gate, w13 ``[E, I, H/2]``: there is no order of halves, and I is padded as
    one. None: the kernel has none.
    """

    name: str
    w13: Transform
    w13_scale: Transform
    w2: Transform
    w2_scale: Transform
    hidden: int = 1
    intermediate: int = 1
    ungated: MoELayout | None = None

    def of(self, activation: ExpertActivation) -> MoELayout:
        """The format for experts with this activation. Raises ShapeError where there is none."""
        if activation.gated:
            return self
        if self.ungated is None:
            raise ShapeError("this kernel format has no experts without a gate", name=self.name, found=activation.kind)
        return self.ungated


def _padded(
    name: str,
    order: Transform,
    w2_order: Transform,
    swizzle: Transform,
    hidden: int,
    intermediate: int,
    ungated: MoELayout | None = None,
) -> MoELayout:
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
        ungated=ungated,
    )


def _ungated(name: str, order: Transform, swizzle: Transform, hidden: int, intermediate: int) -> MoELayout:
    """The same for w1 alone: both weights are matrices like any other."""
    h, i = hidden, intermediate
    return MoELayout(
        name,
        w13=PadLast2(i, h // 2).then(order),
        w13_scale=PadLast2(i, h // 16).then(order).then(swizzle),
        w2=PadLast2(h, i // 2).then(order),
        w2_scale=PadLast2(h, i // 16).then(order).then(swizzle),
        hidden=h,
        intermediate=i,
    )


_ROWS_64 = _ungated("rows", Identity(), Identity(), 64, 64)
_SWIZZLED_64 = _ungated("rows-swizzled", Identity(), Swizzle128x4(), 64, 64)
#: I in whole 128s: CUTLASS checks scales for exactly ``ceil(I/64)*64`` rows and reads tiles of 128 (``binding.cu``,
#: ``getQuantParams``; SGLang 0.5.23 pads alike in ``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading``).
_SWIZZLED_128 = _ungated("rows-swizzled", Identity(), Swizzle128x4(), 64, 128)
_SWIZZLED_256 = _ungated("rows-swizzled", Identity(), Swizzle128x4(), 128, 256)
#: ``_maybe_get_cached_w3_w1_permute_indices`` with ``is_gated_act_gemm=False`` is the plain row shuffle.
_SHUFFLED_ROWS = _ungated("rows-shuffled", ShuffleRows(128), Swizzle128x4(), 128, 128)

#: Expert by expert, so that a layer can be moved to and from the other formats.
_SAME = Identity(core_dims=2)
#: The checkpoint's own bytes: the reference.
CHECKPOINT = MoELayout(
    "checkpoint",
    _SAME,
    _SAME,
    _SAME,
    _SAME,
    ungated=MoELayout("rows", _SAME, _SAME, _SAME, _SAME),
)
#: The same rows with H and I in whole 64s, and row-major scales (FlashInfer ``prepare_cutile_nvfp4_weights``, below 10.0).
ROW_MAJOR_64 = _padded("row-major", Identity(), Identity(), Identity(), 64, 64, _ROWS_64)
#: ``[gate; up]``, scales swizzled: CuteDSL v1, cuTile on 12.x.
GATE_UP = _padded("gate-up", Identity(), Identity(), Swizzle128x4(), 64, 64, _SWIZZLED_64)
#: ``[up; gate]``, scales swizzled: CUTLASS (fused_moe ``binding.cu``: scales ``[E, 2*ceil(I/64)*64, ...]``).
UP_GATE_SWIZZLED = _padded("up-gate", UP_GATE, Identity(), Swizzle128x4(), 64, 64, _SWIZZLED_128)
#: The same with H in whole 128s and I in whole 256s: b12x takes I in pairs of 128, and where they are not whole it makes padded
#: copies, which it keeps by address and no reload would reach (``moe_dispatch.py``, ``_STATIC_RETAINED_GROUP_N``).
UP_GATE_256 = _padded("up-gate-256", UP_GATE, Identity(), Swizzle128x4(), 128, 256, _SWIZZLED_256)
#: Blocks of 64 rows from up and gate in turn: CuteDSL v2.
INTERLEAVED = _padded("interleaved", up_gate_blocks(64), Identity(), Swizzle128x4(), 64, 64, _SWIZZLED_128)
#: Pairs (up, gate), shuffled for an epilogue tile of 128: TRT-LLM. The scale shuffle wants whole 128s of rows.
SHUFFLED = _padded("shuffled", up_gate_shuffled(), ShuffleRows(128), Swizzle128x4(), 128, 64, _SHUFFLED_ROWS)
