"""How a checkpoint holds the experts of a layer, where it is not expert by expert and row by row."""

from __future__ import annotations

from dataclasses import dataclass

from aliasparam import Layout

_COLUMNS = Layout("k r -> (r) k")
_PAIRS = Layout("k (i h) -> (h i) k, h=2")
_BIAS_PAIRS = Layout("(i h) -> h i, h=2")


@dataclass(frozen=True)
class Stored:
    """The form of a layer's checkpoint names.

    Attributes:
        columns: matrices are ``[E, K, N]``, and gate and up are neighbours: w13 u8 ``[E, H/2, 2I]`` with columns
            ``[g0, u0, g1, u1, ...]``, w2 ``[E, I/2, H]``, scales and the bias of w13 alike.
            Global and input scales are of gate and up together.
        one_scale: one global scale counts for all experts: f32 ``[1]``.
        one_input_scale: the same of input scales.
    """

    columns: bool = False
    one_scale: bool = False
    one_input_scale: bool = False

    def matrix(self, n: int, k: int) -> tuple[int, int]:
        """The shape of a matrix of N by K."""
        return (k, n) if self.columns else (n, k)

    def scales(self, experts: int, *, halves: bool, inputs: bool) -> tuple[int, ...]:
        """The shape of the global or input scales of so many experts; ``halves``: of w13 with a gate."""
        if self.one_input_scale if inputs else self.one_scale:
            return (1,)
        return (experts, 2) if halves and not self.columns else (experts,)

    def order(self, layout: Layout, *, halves: bool) -> Layout:
        """``layout``, which is one of rows, for a tensor in this form; ``halves``: of w13 with a gate."""
        if not self.columns:
            return layout
        return (_PAIRS if halves else _COLUMNS).then(layout)

    def bias_order(self, layout: Layout, *, halves: bool) -> Layout:
        """The same for a bias, and its ``layout`` of ``[gate; up]`` rows."""
        return _BIAS_PAIRS.then(layout) if self.columns and halves else layout


ROWS = Stored()
#: gpt-oss as transformers has it, and ModelOpt's export of it (0.47, ``hf_export_handlers.py`` for ``GptOssExperts``).
GPT_OSS = Stored(columns=True, one_scale=True, one_input_scale=True)
