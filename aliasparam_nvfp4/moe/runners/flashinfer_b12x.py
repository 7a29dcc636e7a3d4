"""``flashinfer_b12x``: FlashInfer ``b12x_fused_moe``, compute capability 12.x, CUDA 13 or later. It quantizes activations itself.

The kernel divides by an input scale ``a`` (``fp4_common.py``, ``quantize_block_fp4``: block scale ``amax / (6 * a)``), so
that is what it gets, not ``1/a``. It multiplies ``w1_alpha`` with the first one itself, and not ``w2_alpha`` with the second.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ...layouts import mma_view
from ...quantize.format import BLOCK_SIZE
from ..layouts import UP_GATE_256
from ..scales import InputScales, SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, own_choices, padded_input

#: The module of FlashInfer which keeps weights by address (not contents), and its dictionaries of them.
_MODULE = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch"
_CACHES = ("_WEIGHT_CACHE", "_PADDED_WEIGHT_CACHE", "_W4A16_WEIGHT_CACHE")


class FlashInferB12x(MoERunner):
    name = "flashinfer_b12x"
    layout = UP_GATE_256
    input_scales = InputScales.DIVIDING
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS
    capabilities = frozenset({(12, 0), (12, 1)})
    packages = ("flashinfer", "cutlass", "triton")
    rank = 25
    call = "b12x_fused_moe"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from flashinfer.fused_moe import b12x_fused_moe

        self.check_activation(shape.expert_activation)
        activation = shape.expert_activation
        hidden, intermediate = shape.padded(self.layout)
        rows13 = layer.w13_weight_prepared.shape[1]
        ids, weights = own_choices(topk_ids, topk_weights, shape)
        # Views made for this call alone: FlashInfer ties what it keeps of weights to the tensor objects it was given, and would
        # gather one entry a call, with its product of alphas, under objects that live on.
        out = b12x_fused_moe(
            padded_input(x, shape, self.layout).to(torch.bfloat16).contiguous(),
            _view(layer.w13_weight_prepared),
            mma_view(layer.w13_blockscale_swizzled, rows13, hidden // BLOCK_SIZE, shape.experts),
            _view(layer.w2_weight_prepared),
            mma_view(layer.w2_blockscale_swizzled, hidden, intermediate // BLOCK_SIZE, shape.experts),
            ids,
            weights,
            shape.experts,
            ids.shape[1],
            w1_alpha=_view(layer.g1_alphas),
            w2_alpha=_view(layer.g2_alphas),
            fc2_input_scale=_view(layer.w2_input_scale_max),
            input_global_scale=_view(layer.w13_input_scale_max),
            output=torch.empty(x.shape[0], hidden, dtype=torch.bfloat16, device=x.device),
            activation="relu2" if not activation.gated else "swigluoai_uninterleave" if activation.has_numbers else "silu",
            swiglu_alpha=activation.alpha,
            swiglu_beta=activation.beta,
            swiglu_limit=activation.limit,
            quant_mode="nvfp4",
        )
        return out[:, : shape.hidden].to(x.dtype)  # type: ignore[no-any-return]

    def weights_changed(self) -> None:
        """Forget weights looked up by address; after a reload the address is the same and the bytes are not."""
        module = sys.modules.get(_MODULE)  # not imported: nothing is kept
        for cache in _CACHES:
            getattr(module, cache, {}).clear()


def _view(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape)


RUNNER = FlashInferB12x()
