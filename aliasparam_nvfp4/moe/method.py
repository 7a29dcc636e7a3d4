"""NvFp4MoEMethod: the quantization method of a mixture of experts, with the engines' calling convention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from aliasparam import Alias, declare, registry_of
from aliasparam.errors import StateError

from ..errors import BackendError, ShapeError
from ..format import BLOCK_SIZE
from .loader import ExpertLoader
from .routing import Routing
from .runners import MoENames, MoERunner, MoEShape, moe_runner
from .scales import MoEScales


class NvFp4MoEMethod:
    """NVFP4 experts, gated by SiLU.

    Args:
        backend: a runner's name, or "auto" for the best one that runs here. An explicit choice works without its GPU up to
            ``apply``.
        ep_rank: this rank among those which divide the experts.
        ep_size: how many divide them. Input scales are kept of all experts, so that every rank derives the same factors.
        tp_rank: this rank among those which divide I.
        tp_size: how many divide it.

    Checkpoint names on the layer (E experts of this rank): ``w13_weight`` u8 ``[E, 2I, H/2]`` with rows ``[w1 gate; w3 up]`` for
    every runner, ``w2_weight`` u8 ``[E, H, I/2]``, ``w13_weight_scale`` and ``w2_weight_scale`` e4m3,
    ``w13_weight_scale_2`` f32 ``[E, 2]``, ``w2_weight_scale_2`` f32 ``[E]``, ``w13_input_scale`` f32 ``[E * ep_size, 2]``,
    ``w2_input_scale`` f32 ``[E * ep_size]``. Kernel names over the same memory: ``w13_weight_prepared``,
    ``w2_weight_prepared``, ``w13_blockscale_swizzled``, ``w2_blockscale_swizzled``; the scalars of scales.py have their own.
    """

    def __init__(self, backend: str = "auto", *, ep_rank: int = 0, ep_size: int = 1, tp_rank: int = 0, tp_size: int = 1) -> None:
        for what, rank, size in (("ep", ep_rank, ep_size), ("tp", tp_rank, tp_size)):
            if not 0 <= rank < size:
                raise ShapeError(f"no such {what} rank", expected=f"0 to {size - 1}", found=rank)
        self.backend: MoERunner = moe_runner(backend)
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
        """
        e, h, i = num_experts, hidden_size, intermediate_size_per_partition
        if min(e, h, i) <= 0 or h % BLOCK_SIZE or i % BLOCK_SIZE:
            raise ShapeError(
                "NVFP4 needs whole blocks along H and I",
                module=type(layer).__name__,
                expected=f"E > 0, H and I positive multiples of {BLOCK_SIZE}",
                found=f"E={e}, H={h}, I={i}",
            )
        everywhere = e * self.ep_size
        shape = MoEShape(e, h, i, e * self.ep_rank, everywhere, self.ep_rank, self.ep_size)
        loader = ExpertLoader(e, shape.first_expert, everywhere, self.tp_rank, self.tp_size)
        attributes = {"weight_loader": loader, **extra_weight_attrs}
        u8, e4m3, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
        for name, dims, dtype in (
            ("w13_weight", (e, 2 * i, h // 2), u8),
            ("w2_weight", (e, h, i // 2), u8),
            ("w13_weight_scale", (e, 2 * i, h // BLOCK_SIZE), e4m3),
            ("w2_weight_scale", (e, h, i // BLOCK_SIZE), e4m3),
            ("w13_weight_scale_2", (e, 2), f32),
            ("w2_weight_scale_2", (e,), f32),
            ("w13_input_scale", (everywhere, 2), f32),
            ("w2_input_scale", (everywhere,), f32),
        ):
            parameter = nn.Parameter(torch.empty(dims, dtype=dtype), requires_grad=False)
            for key, value in {**attributes, "of_all_experts": name.endswith("input_scale")}.items():
                setattr(parameter, key, value)
            layer.register_parameter(name, parameter)
        layer.__dict__.update(nvfp4_moe_shape=shape, nvfp4_runner=self.backend, params_dtype=params_dtype)
        layout = self.backend.layout
        scales = MoEScales(self.backend.activation, self.backend.name, self.backend.untied, shape.first_expert, e)
        registry = declare(
            layer,
            Alias("w13_weight", "w13_weight_prepared", layout.w13),
            Alias("w2_weight", "w2_weight_prepared", layout.w2),
            Alias("w13_weight_scale", "w13_blockscale_swizzled", layout.w13_scale),
            Alias("w2_weight_scale", "w2_blockscale_swizzled", layout.w2_scale),
            *scales.derivations(),
            loaded=False,
        )
        registry.on_processed.append(lambda registry: registry.module.__dict__["nvfp4_runner"].weights_changed())

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring what was written since the last call to kernel format. Idempotent, in place, expert by expert.

        Raises:
            StateError: a tensor was not loaded whole.
            ScaleError: scales that are none, or that this runner cannot express.
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
            topk_ids: ``[T, k]`` global expert numbers.

        Raises:
            ShapeError: dims which do not fit each other or the layer.
            BackendError: the runner cannot run on this device.
        """
        shape: MoEShape = layer.__dict__["nvfp4_moe_shape"]
        runner: MoERunner = layer.__dict__["nvfp4_runner"]
        rows = x.reshape(-1, x.shape[-1])
        if x.shape[-1] != shape.hidden or topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] != rows.shape[:1]:
            raise ShapeError(
                "the input does not fit",
                module=type(layer).__name__,
                expected=f"x [T, {shape.hidden}], topk_weights and topk_ids [T, k]",
                found=f"{list(x.shape)}, {list(topk_weights.shape)}, {list(topk_ids.shape)}",
            )
        if (reason := runner.unavailable(x.device)) is not None:
            raise BackendError(
                "this runner cannot run here", name=runner.name, found=reason, remedy='Use backend="reference" or "auto".'
            )
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
            ShapeError: dims which do not fit each other or the layer.
            BackendError: the runner cannot run on this device, or its kernel knows no such routing.
        """
        shape: MoEShape = layer.__dict__["nvfp4_moe_shape"]
        runner: MoERunner = layer.__dict__["nvfp4_runner"]
        rows = x.reshape(-1, x.shape[-1])
        if x.shape[-1] != shape.hidden or router_logits.shape != (rows.shape[0], shape.all_experts):
            raise ShapeError(
                "the input does not fit",
                module=type(layer).__name__,
                expected=f"x [T, {shape.hidden}], router_logits [T, {shape.all_experts}]",
                found=f"{list(x.shape)}, {list(router_logits.shape)}",
            )
        if (reason := runner.unavailable(x.device)) is not None:
            raise BackendError(
                "this runner cannot run here", name=runner.name, found=reason, remedy='Use backend="reference" or "auto".'
            )
        if rows.shape[0] == 0:
            return torch.empty_like(x)
        return runner.apply_logits(cast(MoENames, layer), rows, router_logits, routing, shape).reshape(x.shape)
