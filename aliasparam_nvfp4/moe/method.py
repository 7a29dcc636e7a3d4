"""NvFp4MoEMethod: the quantization method of a mixture of experts, with the engines' calling convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aliasparam import AliasRegistry, Keep, declare, registry_of
from aliasparam.errors import StateError

from ..checkpoint.format import MODELOPT, CheckpointFormat
from ..errors import ShapeError
from ..kernels.choice import need_running
from ..kernels.declared import need_undeclared
from ..quantize.block_scales import FiniteBlockScales
from ..quantize.format import BLOCK_SIZE
from ..quantize.missing import Missing, RunTimeScales, need_policy
from .activation import SWIGLU, ExpertActivation
from .declarations import Declared, scalars
from .loader import ExpertLoader
from .ranks import ExpertRanks
from .routing import Routing
from .runners import MoENames, MoERunner, MoEShape, chosen, moe_runner, needs_of
from .stored import ROWS, Stored


class NvFp4MoEMethod:
    """NVFP4 experts: quantized weights, and activations quantized (W4A4) or as they are (W4A16).

    Args:
        backend: a runner's name, or "auto" for the best one that serves such experts here. An explicit choice works without its
            GPU up to ``apply``.
        activation: what lies between the two GEMMs: SwiGLU, with its numbers or without, or ReLU squared, which has no gate.
        checkpoint: the names and the direction of scales, ModelOpt's or those of compressed-tensors.
        input_scale: False for checkpoints without activation scales (W4A16_NVFP4, NVFP4A16).
        missing_input_scale: what to do where an expert's input scale is 0 or no number: "refuse" it, take the "max" of the
            layer, or compute it at run time for each token ("dynamic") or each call ("dynamic-tensor"), where the runner can.
        interleaved: True where fused tensors of the checkpoint have rows ``[g0, u0, g1, u1, ...]``. The loader takes them apart
            as they arrive; nothing on the layer remembers it, so they can arrive as often as they like.
        bias: True where experts have biases, ``w13_bias`` ``[E, 2I]`` and ``w2_bias`` ``[E, H]`` in the layer's dtype (gpt-oss).
            Every rank has the whole ``w2_bias``; of those that divide I the first adds it.
        stored: the form of the checkpoint's tensors; ``GPT_OSS`` for gpt-oss, whose names then have other shapes than below.
        retarget_to: runners to which a loaded layer may be moved by :func:`retarget_experts`, where their padding needs more
            room or their scalars are others.
        ep_rank: this rank among those which divide the experts.
        ep_size: how many divide them. Input scales are kept of all experts, so that every rank derives the same factors.
        tp_rank: this rank among those which divide I.
        tp_size: how many divide it.

    Checkpoint names on the layer, ModelOpt's (E experts of this rank): ``w13_weight`` u8 ``[E, 2I, H/2]`` with rows
    ``[w1 gate; w3 up]`` for every runner, ``w2_weight`` u8 ``[E, H, I/2]``, ``w13_weight_scale`` and ``w2_weight_scale`` e4m3,
    ``w13_weight_scale_2`` f32 ``[E, 2]``, ``w2_weight_scale_2`` f32 ``[E]``, ``w13_input_scale`` f32 ``[E * ep_size, 2]``,
    ``w2_input_scale`` f32 ``[E * ep_size]``. compressed-tensors': ``w13_weight_packed``, ``w2_weight_packed``,
    ``w13_weight_global_scale``, ``w13_input_global_scale`` and so on, of the same shapes. Without a gate w13 is w1 alone:
    ``[E, I, H/2]``, and its scales are ``[E]`` and ``[E * ep_size, 1]``, as in SGLang.

    Kernel names over the same memory, the same for all checkpoints: ``w13_weight_prepared``, ``w2_weight_prepared``,
    ``w13_blockscale_swizzled``, ``w2_blockscale_swizzled``; the scalars of scales.py have their own.

    Raises:
        BackendError: no such runner, or one that cannot serve such experts.
        ShapeError: no such rank, or interleaved halves without a gate.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        activation: ExpertActivation = SWIGLU,
        checkpoint: CheckpointFormat = MODELOPT,
        input_scale: bool = True,
        missing_input_scale: Missing = "refuse",
        interleaved: bool = False,
        bias: bool = False,
        stored: Stored = ROWS,
        retarget_to: Sequence[str] = (),
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        self.ranks = ExpertRanks(ep_rank, ep_size, tp_rank, tp_size)
        if interleaved and not activation.gated:
            raise ShapeError("without a gate there is nothing to interleave", expected="interleaved=False", found=activation.kind)
        if interleaved and stored.columns:
            raise ShapeError("by columns, gate and up are neighbours", expected="interleaved=False", found="interleaved=True")
        need_policy(missing_input_scale)
        needs = needs_of(activation, missing_input_scale, input_scale=input_scale, bias=bias)
        self.name = backend
        self.backend = moe_runner(backend, **needs)
        self.retarget_to = tuple(moe_runner(n, **needs) for n in retarget_to)
        self.activation, self.checkpoint, self.input_scale, self.interleaved = activation, checkpoint, input_scale, interleaved
        self.bias, self.stored = bias, stored
        self.missing_input_scale: Missing = missing_input_scale
        self.ep_rank, self.ep_size, self.tp_rank, self.tp_size = ep_rank, ep_size, tp_rank, tp_size

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register and declare the layer's weights, empty, on the default device.

        Args:
            layer: the module that gets the names.
            num_experts: E of this rank.
            hidden_size: H, a multiple of 16.
            intermediate_size_per_partition: I of this rank, a multiple of 16. Kernels which want more get zeros.
            params_dtype: dtype of activations and outputs.
            extra_weight_attrs: put on every parameter; ``weight_loader`` replaces :class:`ExpertLoader`.

        Raises:
            ShapeError: dims that are not positive, or not whole blocks.
            StateError: the layer has its weights already.
        """
        e, h, i = num_experts, hidden_size, intermediate_size_per_partition
        if min(e, h, i) <= 0 or h % BLOCK_SIZE or i % BLOCK_SIZE:
            raise ShapeError(
                "NVFP4 needs whole blocks along H and I",
                module=type(layer).__name__,
                expected=f"E > 0, H and I positive multiples of {BLOCK_SIZE}",
                found=f"E={e}, H={h}, I={i}",
                remedy=_would_do(h, i, self.tp_size),
            )
        everywhere = e * self.ep_size
        ranks = self.ep_rank, self.ep_size, self.activation, self.tp_rank, self.tp_size
        shape = MoEShape(e, h, i, e * self.ep_rank, everywhere, *ranks)
        bias = params_dtype if self.bias else None
        declared = Declared(shape, self.checkpoint, self.stored, self.input_scale, self.missing_input_scale, bias)
        need_undeclared(layer, declared.parameters())
        form = self.activation.gated, self.interleaved, self.stored.columns
        loader = ExpertLoader(e, shape.first_expert, everywhere, self.tp_rank, self.tp_size, *form)
        attributes = {"weight_loader": loader, **extra_weight_attrs}
        for name, (dims, dtype) in declared.parameters().items():
            parameter = nn.Parameter(torch.empty(dims, dtype=dtype), requires_grad=False)
            of_all = name.endswith(self.checkpoint.input_global)
            own = {"of_all_experts": of_all, "is_bias": name.endswith("_bias")}
            for key, value in {**attributes, **own}.items():
                setattr(parameter, key, value)
            layer.register_parameter(name, parameter)
        runner, reason = chosen(self.name, dtype=params_dtype, **declared.needs)
        layer.__dict__.update(nvfp4_moe_shape=shape, nvfp4_runner=runner, params_dtype=params_dtype)
        layer.__dict__["nvfp4_moe_declared"] = declared
        layer.__dict__["run_time_scales"] = RunTimeScales.of(self.missing_input_scale)
        self._declare(layer, declared, runner).about = f"{runner.name}: {reason}"

    def _declare(self, layer: nn.Module, declared: Declared, runner: MoERunner) -> AliasRegistry:
        own, *others = (declared.derivations(r) for r in (runner, *self.retarget_to))
        pairs = declared.aliases(runner, self.retarget_to)
        derived = scalars(own, [d for other in others for d in other], runner.name)
        read = {alias.source for alias in pairs} | {source for d in derived for source in d.sources}
        kept = [Keep(name) for name in declared.parameters() if name not in read]  # activation scales on W4A16 runners
        block_scales = f"w13_{self.checkpoint.block_scale}", f"w2_{self.checkpoint.block_scale}"
        checks = [FiniteBlockScales(block_scales, declared.shape.first_expert)]
        return declare(layer, *pairs, *derived, *kept, loaded=False, checks=checks, on_processed=[_tell_runner])

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring what was written since the last call to kernel format. Idempotent, in place, expert by expert.

        Raises:
            StateError: a tensor was not loaded whole.
            ScaleError: global scales that are not finite and positive, or that this runner cannot express.
        """
        registry = registry_of(layer)
        if registry is None:
            raise StateError("this layer has no NVFP4 experts", module=type(layer).__name__, remedy="Call create_weights first.")
        registry.process()

    def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """``x [..., H] -> [..., H]`` in ``x.dtype``: the weighted sum over each token's experts on this rank.

        Args:
            layer: made by :meth:`create_weights`.
            x: activations.
            topk_weights: ``[T, k]``, T the product of x's leading dims.
            topk_ids: ``[T, k]`` global expert numbers, int32 or int64; -1 is no expert.

        Raises:
            ShapeError: dims or dtypes which do not fit each other, the layer or its runner; on the CPU also numbers of no expert
                (on a GPU they are not looked at: that would wait for it, and could not be captured).
            BackendError: the runner cannot run on this device.
        """
        shape: MoEShape = layer.__dict__["nvfp4_moe_shape"]
        runner: MoERunner = layer.__dict__["nvfp4_runner"]
        rows = _rows(layer, x, shape)
        if topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] != rows.shape[:1]:
            raise ShapeError(
                "the input does not fit",
                module=type(layer).__name__,
                expected=f"topk_weights and topk_ids [{rows.shape[0]}, k]",
                found=f"{list(topk_weights.shape)}, {list(topk_ids.shape)}",
            )
        _need_experts(layer, topk_weights, topk_ids, shape.all_experts)
        runner.check_dtype(x.dtype)
        need_running(runner, x.device)
        if rows.shape[0] == 0:
            return torch.empty_like(x)
        return runner.apply(cast(MoENames, layer), rows, topk_weights, topk_ids, shape).reshape(x.shape)

    def apply_logits(self, layer: nn.Module, x: Tensor, router_logits: Tensor, routing: Routing) -> Tensor:
        """:meth:`apply` from the router's logits: runners whose kernel routes take them as they are, the others choose first.

        Args:
            layer: made by :meth:`create_weights`.
            x: activations ``[..., H]``.
            router_logits: ``[T, experts of all ranks]``, bf16 or f32, T the product of x's leading dims.
            routing: how the model chooses.

        Raises:
            ShapeError: dims which do not fit each other or the layer, or activations of a dtype that the runner does not take.
            BackendError: the runner cannot run on this device, or its kernel knows no such routing.
        """
        shape: MoEShape = layer.__dict__["nvfp4_moe_shape"]
        runner: MoERunner = layer.__dict__["nvfp4_runner"]
        rows = _rows(layer, x, shape)
        if router_logits.shape != (rows.shape[0], shape.all_experts):
            raise ShapeError(
                "the input does not fit",
                module=type(layer).__name__,
                expected=f"router_logits [{rows.shape[0]}, {shape.all_experts}]",
                found=list(router_logits.shape),
            )
        runner.check_dtype(x.dtype)
        need_running(runner, x.device)
        if rows.shape[0] == 0:
            return torch.empty_like(x)
        return runner.apply_logits(cast(MoENames, layer), rows, router_logits, routing, shape).reshape(x.shape)


def _rows(layer: nn.Module, x: Tensor, shape: MoEShape) -> Tensor:
    """``[T, H]``."""
    if x.dim() == 0 or x.shape[-1] != shape.hidden:
        raise ShapeError(
            "the input does not fit", module=type(layer).__name__, expected=f"x [..., {shape.hidden}]", found=list(x.shape)
        )
    return x.reshape(-1, shape.hidden)


def _need_experts(layer: nn.Module, weights: Tensor, ids: Tensor, experts: int) -> None:
    wrong = [int(n) for n in ids.flatten().tolist() if not -1 <= n < experts] if ids.device.type == "cpu" else []
    if wrong or ids.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ShapeError(
            "these are no choices of experts",
            module=type(layer).__name__,
            expected=f"topk_weights of a float dtype, topk_ids int32 or int64, expert 0 to {experts - 1} (or -1 for none)",
            found=f"{weights.dtype}, {ids.dtype}{f', experts {wrong[:5]}' if wrong else ''}",
        )


def _tell_runner(registry: AliasRegistry) -> None:
    registry.module.__dict__["nvfp4_runner"].weights_changed()


def _would_do(h: int, i: int, tp_size: int) -> str | None:
    """What to change where a dim is not whole blocks."""
    if h > 0 and i > 0 and h % BLOCK_SIZE == 0 and tp_size > 1:
        whole = i * tp_size
        fit = [n for n in range(tp_size, 0, -1) if whole % (n * BLOCK_SIZE) == 0]
        return f"A tensor-parallel size of {fit[0]} divides I={whole} into whole blocks." if fit else None
    return "Quantize this layer padded to whole blocks, or exclude it from quantization."
