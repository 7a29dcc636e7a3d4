"""Experts: what objects of ``ModelOptNvFp4FusedMoE`` (vllm/model_executor/layers/quantization/modelopt.py, 0.32.0) become.

``RoutedExperts.weight_loader`` (vllm/model_executor/layers/fused_moe/routed_experts.py) looks for "ModelOpt" in the class's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ...checkpoint.format import MODELOPT
from ...errors import BackendError, ShapeError
from ...moe import NvFp4MoEMethod
from ...moe.activation import GEGLU, RELU2, SWIGLU, ExpertActivation
from ...moe.scales import InputScales
from ..emulated import emulate_on_cpu
from ..engine_experts import need_no_biases
from ..leftover import pass_over
from .options import options


class ModelOptNvFp4Experts(FusedMoEMethodBase):  # type: ignore[misc]
    """:class:`NvFp4MoEMethod` with vLLM's base class. Expert numbers are vLLM's physical ones."""

    #: Input scales are of all experts, as the kernels want one for all.
    use_global_sf = True
    supports_eplb = True
    checkpoint = MODELOPT

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        super().__init__(moe_config)
        if getattr(quant_config, "moe_activation_override", None) is not None:
            raise BackendError(
                "experts that quantize activations by token are vLLM's own", remedy="Drop quantization_config.moe."
            )
        self.quant_config = quant_config
        self.input_scale = quant_config.quant_method != "W4A16_NVFP4"
        self.method: NvFp4MoEMethod | None = None

    def uses_weight_scale_2_pattern(self) -> bool:
        return True

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Any = None,
        **other: Any,
    ) -> None:
        """See :meth:`NvFp4MoEMethod.create_weights`; ``num_experts`` are those of this rank."""
        need_no_biases(self.moe.has_bias, layer.layer_name)  # type: ignore[arg-type]
        parallel = self.moe.moe_parallel_config
        ranks = {"ep_rank": parallel.ep_rank, "ep_size": parallel.ep_size} if parallel.use_ep else {}
        self.method = NvFp4MoEMethod(
            options().moe_backend,
            activation=activation_of(layer),
            checkpoint=self.checkpoint,
            input_scale=self.input_scale,
            tp_rank=parallel.tp_rank,
            tp_size=parallel.tp_size,
            **ranks,
        )
        if parallel.enable_eplb and self.method.backend.input_scales is InputScales.EACH:
            raise BackendError(
                "EPLB moves experts, and this runner has input scales of each that vLLM does not move",
                name=self.method.backend.name,
            )
        _need_even(layer, num_experts, self.method.ep_rank, self.method.ep_size)
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        by_vllm = weight_loader is not None and self.checkpoint is MODELOPT and self.method.activation.gated
        loader = {"weight_loader": weight_loader} if by_vllm else {}
        self.method.create_weights(layer, *sizes, params_dtype, **loader)
        layer.num_experts, layer.quant_config = num_experts, self.quant_config  # type: ignore[assignment]
        if not self.input_scale and self.checkpoint is MODELOPT:
            pass_over(layer, "w13_input_scale", "w2_input_scale")
        emulate_on_cpu(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert self.method is not None
        self.method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Routed experts alone: vLLM adds shared ones itself where the method does not overlap them."""
        assert self.method is not None
        return self.method.apply(layer, x, topk_weights, topk_ids)


def activation_of(layer: Any) -> ExpertActivation:
    """
    Raises:
        BackendError: one that no runner computes.
    """
    numbers = {n: v for n in ("limit", "alpha", "beta") if (v := getattr(layer, f"swiglu_{n}", None)) is not None}
    known = {"silu": SWIGLU, "swigluoai_uninterleave": SWIGLU, "gelu_tanh": GEGLU, "relu2_no_mul": RELU2}
    name = layer.activation.value
    if name not in known:
        raise BackendError("unsupported activation of experts", name=layer.layer_name, expected=sorted(known), found=name)
    return ExpertActivation(**numbers) if numbers else known[name]


def _need_even(layer: Any, experts: int, rank: int, ranks: int) -> None:
    """Runners know their experts by the first number and how many there are."""
    local = layer.expert_map
    if local is None or ranks == 1:
        return
    own = (local >= 0).nonzero().flatten().tolist()
    if experts * ranks != layer.global_num_experts or own != list(range(rank * experts, (rank + 1) * experts)):
        raise ShapeError(
            "experts must lie one after another on ranks, equally many on each",
            module=layer.layer_name,
            expected=f"{layer.global_num_experts} experts, a multiple of {ranks}, with --expert-placement-strategy linear",
            found=f"{experts} on rank {rank}: {own[:4]}...",
        )
