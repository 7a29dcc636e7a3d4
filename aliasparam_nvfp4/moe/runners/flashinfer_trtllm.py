"""``flashinfer_trtllm``: FlashInfer ``trtllm_fp4_block_scale_moe``, which routes inside the kernel; compute capability 10.x.

The kernel format is that of ``flashinfer_trtllm_routed``, whose call serves a choice made before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BackendError
from ..routing import Routing
from ._base import MoENames, MoEShape
from ._trtllm import TrtLlm


class FlashInferTrtllm(TrtLlm):
    name = "flashinfer_trtllm"
    rank = 25
    call = "trtllm_fp4_block_scale_moe"

    def apply_logits(self, layer: MoENames, x: Tensor, logits: Tensor, routing: Routing, shape: MoEShape) -> Tensor:
        """Router logits to the kernel. It weighs outputs, so a weight on the input is chosen before it and takes ``apply``.

        Raises:
            BackendError: the kernel has no such routing.
        """
        from flashinfer.fused_moe import trtllm_fp4_block_scale_moe

        if routing.on_input:
            return super().apply_logits(layer, x, logits, routing, shape)
        self.check_activation(shape.expert_activation)
        grouped = routing.bias is not None
        (out,) = trtllm_fp4_block_scale_moe(
            routing_logits=(logits if logits.dtype in (torch.float32, torch.bfloat16) else logits.float()).contiguous(),
            routing_bias=routing.bias,
            top_k=routing.top_k,
            n_group=routing.groups if grouped else None,
            topk_group=routing.top_groups if grouped else None,
            routed_scaling_factor=routing.scaling if grouped else None,
            routing_method_type=method_number(routing),
            **self.arguments(layer, x, shape),
        )
        return out[:, : shape.hidden].to(x.dtype)  # type: ignore[no-any-return]


def method_number(routing: Routing) -> int:
    """FlashInfer's ``RoutingMethodType`` (``tllm_enums.py``) which chooses as ``routing`` does.

    ``DeepSeekV3`` always divides by the sum (``trtllm_fused_moe_routing_runner.cu``, ``ScaledSumNormalize``); ``Llama4`` is
    for one expert a token.

    Raises:
        BackendError: there is none.
    """
    from flashinfer.tllm_enums import RoutingMethodType as Method

    if routing.kind == "sigmoid_bias_grouped" and not routing.renormalize:
        raise BackendError(
            "the TRT-LLM kernel has no such routing",
            name=FlashInferTrtllm.name,
            expected="sigmoid_bias_grouped with renormalize=True",
            found="renormalize=False",
            remedy="Choose experts first and use apply, or flashinfer_trtllm_routed.",
        )
    methods = {
        "softmax_topk": Method.Default,
        "softmax_topk_renormalized": Method.Renormalize,
        "sigmoid_topk": Method.Llama4 if routing.top_k == 1 else Method.TopKSigmoid,
        "sigmoid_bias_grouped": Method.DeepSeekV3,
    }
    return int(methods[routing.kind])


RUNNER = FlashInferTrtllm()
