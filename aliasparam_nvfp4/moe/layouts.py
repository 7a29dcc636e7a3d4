"""Kernel layouts of an MoE layer's four large tensors. Checkpoint rows of w13 are ``[w1 gate; w3 up]`` for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from aliasparam import Layout

from ..errors import ShapeError
from ..layouts import lines
from .activation import ExpertActivation


@dataclass(frozen=True)
class MoELayout:
    """Four layouts of one expert.

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


_SAME = Layout.identity(2)
_pad, _swizzle = lines.pad, lines.swizzle

_ROWS_64 = MoELayout("rows", _pad(64, 32), _pad(64, 4), _pad(64, 32), _pad(64, 4), 64, 64)
_SWIZZLED_64 = MoELayout("rows-swizzled", _pad(64, 32), _swizzle(), _pad(64, 32), _swizzle(), 64, 64)
#: I in whole 128s: CUTLASS checks scales for exactly ``ceil(I/64)*64`` rows and reads tiles of 128 (``binding.cu``,
#: ``getQuantParams``; SGLang 0.5.23 pads alike in ``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading``).
_SWIZZLED_128 = MoELayout("rows-swizzled", _pad(128, 32), _swizzle(), _pad(64, 64), _swizzle(8), 64, 128)
_SWIZZLED_256 = MoELayout("rows-swizzled", _pad(256, 64), _swizzle(8, 256), _pad(128, 128), _swizzle(16), 128, 256)
#: ``_maybe_get_cached_w3_w1_permute_indices`` with ``is_gated_act_gemm=False`` is the plain row shuffle.
_SHUFFLED_ROWS = MoELayout(
    "rows-shuffled",
    w13=lines.shuffle(64, rows=128),
    w13_scale=lines.shuffle_swizzled(8),
    w2=lines.shuffle(64, rows=128),
    w2_scale=lines.shuffle_swizzled(8),
    hidden=128,
    intermediate=128,
)

#: The checkpoint's own bytes: the reference.
CHECKPOINT = MoELayout("checkpoint", _SAME, _SAME, _SAME, _SAME, ungated=MoELayout("rows", _SAME, _SAME, _SAME, _SAME))
#: The same rows with H and I in whole 64s, and row-major scales (FlashInfer ``prepare_cutile_nvfp4_weights``, below 10.0).
ROW_MAJOR_64 = MoELayout("row-major", lines.gate_up(64, 32), lines.gate_up(64, 4), _pad(64, 32), _pad(64, 4), 64, 64, _ROWS_64)
#: ``[gate; up]``, scales swizzled: CuteDSL v1, cuTile on 12.x. A tile of 128 rows may hold the end of gate and the start of up.
GATE_UP = MoELayout(
    "gate-up",
    w13=lines.gate_up(64, 32),
    w13_scale=lines.gate_up(64, 4).then(_swizzle()),
    w2=_pad(64, 32),
    w2_scale=_swizzle(),
    hidden=64,
    intermediate=64,
    ungated=_SWIZZLED_64,
)
#: ``[up; gate]``, scales swizzled: CUTLASS (fused_moe ``binding.cu``: scales ``[E, 2*ceil(I/64)*64, ...]``).
UP_GATE_SWIZZLED = MoELayout(
    "up-gate",
    w13=lines.up_gate(64, 32),
    w13_scale=lines.up_gate(64, 4).then(_swizzle()),
    w2=_pad(64, 32),
    w2_scale=_swizzle(),
    hidden=64,
    intermediate=64,
    ungated=_SWIZZLED_128,
)
#: The same with H in whole 128s and I in whole 256s: b12x takes I in pairs of 128, and where they are not whole it makes padded
#: copies, which it keeps by address and no reload would reach (``moe_dispatch.py``, ``_STATIC_RETAINED_GROUP_N``).
UP_GATE_256 = MoELayout(
    "up-gate-256",
    w13=lines.up_gate(256, 64),
    w13_scale=lines.up_gate(256, 8).then(_swizzle()),
    w2=_pad(128, 128),
    w2_scale=_swizzle(16),
    hidden=128,
    intermediate=256,
    ungated=_SWIZZLED_256,
)
#: Blocks of 64 rows from up and gate in turn: CuteDSL v2.
INTERLEAVED = MoELayout(
    "interleaved",
    w13=lines.up_gate_blocks(32),
    w13_scale=lines.up_gate_blocks_swizzled(4),
    w2=_pad(64, 32),
    w2_scale=_swizzle(),
    hidden=64,
    intermediate=64,
    ungated=_SWIZZLED_128,
)
#: Pairs (up, gate), shuffled for an epilogue tile of 128: TRT-LLM. The scale shuffle wants whole 128s of rows.
SHUFFLED = MoELayout(
    "shuffled",
    w13=lines.up_gate_shuffled(64),
    w13_scale=lines.up_gate_shuffled_swizzled(8),
    w2=lines.shuffle(32, rows=128),
    w2_scale=lines.shuffle_swizzled(4),
    hidden=128,
    intermediate=64,
    ungated=_SHUFFLED_ROWS,
)

MOE_LAYOUTS = (CHECKPOINT, ROW_MAJOR_64, GATE_UP, UP_GATE_SWIZZLED, UP_GATE_256, INTERLEAVED, SHUFFLED)
