"""Kernel formats of an MoE layer's four large tensors. Checkpoint rows of w13 are ``[w1 gate; w3 up]`` for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aliasparam import Layout

from ..errors import ShapeError
from ..layouts import SWIZZLE_128X4
from ..layouts.lines import SAME, gate_up, padded, shuffled, up_gate, up_gate_blocks, up_gate_shuffled
from .activation import ExpertActivation


@dataclass(frozen=True)
class MoELayout:
    """Four layouts, all of one expert's matrix.

    ``w13``: u8 ``[E, 2I, H/2]``; ``w13_scale``: e4m3 ``[E, 2I, H/16]``; ``w2``: u8 ``[E, H, I/2]``; ``w2_scale``: e4m3
    ``[E, H, I/16]``. ``hidden`` and ``intermediate`` say to which multiples H and I are padded with zeros: a padded gate and
    up row gives ``silu(0) * 0``, which meets a zero column of w2, so results do not change.

    ``ungated`` is the format of experts without a gate, w13 ``[E, I, H/2]``: there is no order of halves, and I is padded as
    one. None: the kernel has none.
    """

    name: str
    w13: Layout
    w13_scale: Layout
    w2: Layout
    w2_scale: Layout
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


#: Columns to whole multiples of the argument.
_Order = Callable[[int], Layout]


def _made(
    name: str, w13: _Order, w2: _Order, *, swizzle: bool, hidden: int, intermediate: int, ungated: MoELayout | None = None
) -> MoELayout:
    """Rows in order, columns padded, scales swizzled or not."""
    last = SWIZZLE_128X4 if swizzle else None

    def scale(order: Layout) -> Layout:
        return order if last is None else order.then(last)

    return MoELayout(
        name,
        w13=w13(hidden // 2),
        w13_scale=scale(w13(hidden // 16)),
        w2=w2(intermediate // 2),
        w2_scale=scale(w2(intermediate // 16)),
        hidden=hidden,
        intermediate=intermediate,
        ungated=ungated,
    )


def _ungated(name: str, hidden: int, intermediate: int, *, swizzle: bool = True) -> MoELayout:
    """For w1 alone: both weights are matrices like any other, padded."""
    rows = partial(padded, intermediate), partial(padded, hidden)
    return _made(name, *rows, swizzle=swizzle, hidden=hidden, intermediate=intermediate)


def _gated(
    name: str, w13: Callable[[int, int], Layout], hidden: int, intermediate: int, ungated: MoELayout, *, swizzle: bool = True
) -> MoELayout:
    """Halves of w13 padded each for itself, rows of w2 in order."""
    rows = partial(w13, intermediate), partial(padded, hidden)
    return _made(name, *rows, swizzle=swizzle, hidden=hidden, intermediate=intermediate, ungated=ungated)


_ROWS_64 = _ungated("rows", 64, 64, swizzle=False)
_SWIZZLED_64 = _ungated("rows-swizzled", 64, 64)
#: I in whole 128s: CUTLASS checks scales for exactly ``ceil(I/64)*64`` rows and reads tiles of 128 (``binding.cu``,
#: ``getQuantParams``; SGLang 0.5.23 pads alike in ``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading``).
_SWIZZLED_128 = _ungated("rows-swizzled", 64, 128)
_SWIZZLED_256 = _ungated("rows-swizzled", 128, 256)
#: ``_maybe_get_cached_w3_w1_permute_indices`` with ``is_gated_act_gemm=False`` is the plain row shuffle.
_SHUFFLED_ROWS = _made("rows-shuffled", shuffled, shuffled, swizzle=True, hidden=128, intermediate=128)

#: The checkpoint's own bytes, expert by expert: the reference.
CHECKPOINT = MoELayout("checkpoint", SAME, SAME, SAME, SAME, ungated=MoELayout("rows", SAME, SAME, SAME, SAME))
#: The same rows with H and I in whole 64s, and row-major scales (FlashInfer ``prepare_cutile_nvfp4_weights``, below 10.0).
ROW_MAJOR_64 = _gated("row-major", gate_up, 64, 64, _ROWS_64, swizzle=False)
#: ``[gate; up]``, scales swizzled: CuteDSL v1, cuTile on 12.x.
GATE_UP = _gated("gate-up", gate_up, 64, 64, _SWIZZLED_64)
#: ``[up; gate]``, scales swizzled: CUTLASS (fused_moe ``binding.cu``: scales ``[E, 2*ceil(I/64)*64, ...]``).
UP_GATE_SWIZZLED = _gated("up-gate", up_gate, 64, 64, _SWIZZLED_128)
#: The same with H in whole 128s and I in whole 256s: b12x takes I in pairs of 128, and where they are not whole it makes padded
#: copies, which it keeps by address and no reload would reach (``moe_dispatch.py``, ``_STATIC_RETAINED_GROUP_N``).
UP_GATE_256 = _gated("up-gate-256", up_gate, 128, 256, _SWIZZLED_256)
#: Blocks of 64 rows from up and gate in turn: CuteDSL v2.
INTERLEAVED = _made(
    "interleaved", up_gate_blocks, partial(padded, 64), swizzle=True, hidden=64, intermediate=64, ungated=_SWIZZLED_128
)
#: Pairs (up, gate), shuffled for an epilogue tile of 128: TRT-LLM. The scale shuffle wants whole 128s of rows.
SHUFFLED = _made("shuffled", up_gate_shuffled, shuffled, swizzle=True, hidden=128, intermediate=64, ungated=_SHUFFLED_ROWS)
