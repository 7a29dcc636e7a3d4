"""NVFP4 experts of SGLang on :class:`NvFp4MoEMethod`.

A subclass of ``ModelOptNvFp4FusedMoEMethod`` (``sglang/srt/layers/quantization/modelopt_quant.py``, 0.5.23), because the loader
in ``layers/moe/fused_moe_triton/layer.py`` asks for it; nothing of its weights, processing or kernels is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
from torch import Tensor, nn

from ...errors import BackendError, ShapeError
from ...moe import ExpertActivation, NvFp4MoEMethod
from ..emulated import emulate_on_cpu
from ..engine_experts import need_no_biases
from ..leftover import pass_over
from .options import moe_backend, reads


class AliasedModelOptNvFp4FusedMoEMethod(ModelOptNvFp4FusedMoEMethod):  # type: ignore[misc]
    """SGLang's interface; the work is ``method``'s, which is made when the layer is known."""

    load_up_proj_weight_first = False  # the layout knows where rows go
    runner = None  # a direct kernel: standard choices of experts
    method: NvFp4MoEMethod

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config
        self.enable_flashinfer_trtllm_moe = self.use_flashinfer_trtllm_weight_layout = False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """
        Raises:
            BackendError: biases, an activation, or a way to combine experts, that no runner has.
            ShapeError: experts that are not spread evenly.
        """
        need_no_biases(bool(extra_weight_attrs.get("with_bias")), type(layer).__name__)
        if layer.num_experts != num_experts * layer.moe_ep_size:
            raise ShapeError(
                "the experts are not spread evenly over the ranks",
                module=type(layer).__name__,
                expected=f"{num_experts} on each of {layer.moe_ep_size} ranks",
                found=layer.num_experts,
            )
        layer.intermediate_size_per_partition = intermediate_size_per_partition
        layer.params_dtype, layer.quant_config = params_dtype, self.quant_config
        self.method = NvFp4MoEMethod(
            moe_backend() or "auto",
            activation=_activation(layer.moe_runner_config),
            input_scale=not self.quant_config.is_w4a16,
            missing_input_scale="refuse" if self.quant_config.is_w4a16 else "max",  # as SGLang: the largest of all experts
            ep_rank=layer.moe_ep_rank,
            ep_size=layer.moe_ep_size,
        )
        loader = extra_weight_attrs["weight_loader"]
        self.method.create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, weight_loader=loader
        )
        names = ("w13_input_scale", "w2_input_scale")
        if self.method.input_scale:
            for name in names:
                layer.get_parameter(name)._sglang_require_global_experts = True
            layer.w13_input_scale.weight_loader = _halves(loader)
        else:
            pass_over(layer, *names)
        emulate_on_cpu(layer)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def get_moe_runner_backend(self, layer: nn.Module) -> None:
        return None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The chosen experts of this rank; other ranks' come as -1."""
        x, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(chosen):
            chosen = chosen.to_standard(layer.layer_id)
        weights, ids = chosen.topk_weights, chosen.topk_ids
        if self.moe_runner_config.apply_router_weight_on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        first = layer.moe_ep_rank * layer.num_local_experts
        if first:  # the dispatcher gives numbers within the rank
            ids = torch.where(ids >= 0, ids + first, ids)
        return StandardCombineInput(hidden_states=self.method.apply(layer, x, weights, ids))


def _halves(loader: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's loader writes an input scale of w1 or w3 to both of an expert's two; here each goes to its own."""

    def load(param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int | None) -> Any:
        half: Any = param.data[:, 0 if shard_id == "w1" else param.shape[1] - 1]
        half._sglang_require_global_experts = True
        return loader(half, loaded_weight.reshape(()), weight_name, shard_id, expert_id)

    return load


def _activation(config: Any) -> ExpertActivation:
    """Of ``MoeRunnerConfig`` (``layers/moe/moe_runner/base.py``)."""
    limit = config.gemm1_clamp_limit if config.gemm1_clamp_limit is not None else config.swiglu_limit
    kinds = {("silu", True): "swiglu", ("gelu", True): "geglu", ("relu2", False): "relu2"}
    kind = kinds.get((config.activation, config.is_gated))
    if kind is None or config.no_combine:
        raise BackendError(
            "these experts have no kernel here",
            expected="silu or gelu with a gate, relu2 without one, combined",
            found=f"{config.activation}, gated={config.is_gated}, no_combine={config.no_combine}",
            remedy="Set SGLANG_PLUGINS= to other plugins, and SGLang's own classes serve the model.",
        )
    if kind != "swiglu":
        return ExpertActivation(kind)  # type: ignore[arg-type]
    alpha, beta = config.gemm1_alpha, config.gemm1_beta
    return ExpertActivation("swiglu", 1.0 if alpha is None else alpha, 0.0 if beta is None else beta, limit)


def is_ours(quant_config: Any) -> bool:
    """Whether experts of SGLang's method become ours. Subclasses, weights that are quantized while they load, scales of each
    token, and runners that are not ours stay SGLang's."""
    return reads(quant_config) and moe_backend() is not None
