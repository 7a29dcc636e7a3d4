"""What the two cuTile runners share: FlashInfer ``MoELayer`` with ``CuTileNvfp4Bf16Config``, over our kernel-format bytes.

W4A16: weights are decoded beside the MMA, activations stay bfloat16, and each GEMM's sum is multiplied with the weight global
scale of its expert, gate and up each with its own (``flashinfer/fused_moe/cutile/fp4.py``, ``_grouped_gemm_w4a16_impl``).

A ``MoELayer`` is built once for a layer's shape, and holds scratch memory and no weights. The weight views are taken anew at
every call from names that never move, so that a captured graph goes on reading what the last reload wrote. The first call
of every power of two of tokens compiles and allocates scratch: make it before capturing a graph.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..activation import ExpertActivation
from ..scales import InputScales, SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, own_choices, padded_input

#: FlashInfer's own ceiling of tokens a call (``ExecutionConfig.tune_max_num_tokens``); more get a layer of their own.
_TOKENS = 8192


class CuTile(MoERunner):
    input_scales = InputScales.NONE
    separate_scales = True
    packages = ("flashinfer",)
    call = "MoELayer"
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS

    @abstractmethod
    def scale_view(self, scales: Tensor) -> Tensor:
        """Block scales of the kernel format in the shape which the kernel indexes. A view."""

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(device) or _no_compiler(device)

    def weight_views(self, layer: MoENames, shape: MoEShape) -> dict[str, Tensor]:
        """What ``prepare_cutile_nvfp4_weights`` would return, over the layer's own bytes."""
        gated = shape.expert_activation.gated
        return {
            "w1": layer.w13_weight_prepared,
            "w1_scale": self.scale_view(layer.w13_blockscale_swizzled),
            "w1_global_scale": layer.g1_alphas_gate_up if gated else layer.g1_alphas,
            "w2": layer.w2_weight_prepared,
            "w2_scale": self.scale_view(layer.w2_blockscale_swizzled),
            "w2_global_scale": layer.g2_alphas,
        }

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from flashinfer.fused_moe import MoEActivationPack, MoEWeightPack

        self.check_activation(shape.expert_activation)
        hidden, intermediate = shape.padded(self.layout)
        ids, weights = own_choices(topk_ids, topk_weights, shape)
        rows = padded_input(x, shape, self.layout).to(torch.bfloat16).contiguous()
        ceiling = max(_TOKENS, 1 << (x.shape[0] - 1).bit_length())
        moe = _layer(shape.experts, hidden, intermediate, ids.shape[1], shape.expert_activation, x.device, ceiling)
        if moe.tuner.is_tuning_mode:  # within flashinfer.autotune(): what was chosen outside it is chosen again
            moe.reset_winner()
        pack = MoEWeightPack({"cutile_nvfp4": self.weight_views(layer, shape)})
        out = moe(MoEActivationPack(rows, None, ids, weights), pack)
        return out[:, : shape.hidden].to(x.dtype)  # type: ignore[no-any-return]


@cache
def _no_compiler(device: torch.device) -> str | None:
    from flashinfer.cutile import is_cuda_tile_available

    return None if is_cuda_tile_available(device) else "cuda-tile with its compiler (cuda-tile[tileiras]) is not installed"


@cache
def _layer(
    experts: int, hidden: int, intermediate: int, top_k: int, activation: ExpertActivation, device: torch.device, tokens: int
) -> Any:
    """The MoELayer of a shape. ``hidden`` is part of the key, because the layer remembers the best tactic it found."""
    from flashinfer import fused_moe as fi

    config = fi.MoEConfig(
        routing=fi.RoutingConfig(num_experts=experts, top_k=top_k),
        quant=fi.QuantConfig(weight=fi.QuantFormat.NVFP4, activation=fi.QuantFormat.BF16),
        experts=fi.ExpertConfig(intermediate_size=intermediate),
        activation=_flashinfer_activation(activation),
        backend=fi.BackendOptions(candidates=(fi.CuTileNvfp4Bf16Config(),)),
        execution=fi.ExecutionConfig(tune_max_num_tokens=tokens),
    )
    return fi.MoELayer(config, device=device)


def _flashinfer_activation(activation: ExpertActivation) -> Any:
    from flashinfer import fused_moe as fi

    if not activation.gated:
        return fi.ReLU2()
    limit = {} if activation.limit is None else {"limit": activation.limit}
    return fi.SwiGLU(alpha=activation.alpha, beta=activation.beta, **limit)
