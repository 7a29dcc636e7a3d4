"""What an MoE runner is: the layout it wants, how scales meet its activations, where it runs, and its call."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from ...checkpoint.format import MODELOPT, CheckpointFormat
from ...errors import BackendError
from ...kernels.base import Kernel
from ...quantize.format import BLOCK_SIZE
from ...quantize.missing import Missing, RunTimeScales, is_dynamic
from ..activation import SWIGLU, ExpertActivation
from ..biases import Biases
from ..global_scales import GlobalScales
from ..layouts import MoELayout
from ..routing import Routing
from ..scales import InputScales, MoEScales, SwigluNumbers


@dataclass(frozen=True)
class MoEShape:
    """Logical dims of an MoE layer on this rank.

    Attributes:
        experts: E of this rank.
        hidden: H.
        intermediate: I of this rank.
        first_expert: global number of this rank's first expert.
        all_experts: experts of all ranks.
        ep_rank: this rank among the expert-parallel ones.
        ep_size: ranks which divide the experts.
        expert_activation: what lies between the two GEMMs.
        tp_rank: this rank among those which divide I.
        tp_size: how many divide it.
    """

    experts: int
    hidden: int
    intermediate: int
    first_expert: int = 0
    all_experts: int = 0
    ep_rank: int = 0
    ep_size: int = 1
    expert_activation: ExpertActivation = SWIGLU
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def w13_rows(self) -> int:
        """2I with a gate, I without."""
        return self.intermediate * (2 if self.expert_activation.gated else 1)

    def padded(self, layout: MoELayout) -> tuple[int, int]:
        """(H, I) of the kernel format for experts with this activation."""
        layout = layout.of(self.expert_activation)
        return _round_up(self.hidden, layout.hidden), _round_up(self.intermediate, layout.intermediate)


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to


class MoENames(Protocol):
    """Kernel names of a layer. The scalars are in the tables of scales.py; which a layer has depends on its runner."""

    w13_weight_prepared: Tensor
    w2_weight_prepared: Tensor
    w13_blockscale_swizzled: Tensor
    w2_blockscale_swizzled: Tensor
    g1_alphas: Tensor
    g1_scale_c: Tensor
    g1_alphas_gate_up: Tensor
    g2_alphas: Tensor
    w13_input_scale_quant: Tensor
    w2_input_scale_quant: Tensor
    w13_input_scale_max: Tensor
    w2_input_scale_max: Tensor
    gemm1_alpha: Tensor
    gemm1_beta: Tensor
    gemm1_clamp_limit: Tensor
    run_time_scales: RunTimeScales | None
    gemm1_bias: Tensor
    gemm2_bias: Tensor
    gemm1_bias_raw: Tensor
    gemm2_bias_raw: Tensor


class Needs(TypedDict, total=False):
    """What experts ask of a runner.

    Attributes:
        activation: between the two GEMMs.
        input_scale: whether the checkpoint has scales of activations.
        dynamic: whether those that are missing are to be computed at run time.
        bias: whether experts have biases.
    """

    activation: ExpertActivation
    input_scale: bool
    dynamic: bool
    bias: bool


def needs_of(activation: ExpertActivation, missing: Missing, *, input_scale: bool, bias: bool) -> Needs:
    return {"activation": activation, "input_scale": input_scale, "dynamic": is_dynamic(missing), "bias": bias}


class MoERunner(Kernel):
    """One fused-MoE path."""

    what, folder, constant = "runner", __package__, "RUNNER"

    layout: MoELayout
    input_scales: InputScales = InputScales.ONE
    #: How it takes biases of experts, see biases.py. None: not at all.
    biases: Biases | None = None
    #: Whether gate and up of an expert may have different weight scales.
    separate_scales: bool = False
    #: The kinds of :class:`~aliasparam_nvfp4.moe.activation.ExpertActivation` its call takes.
    activations: frozenset[str] = frozenset({"swiglu"})
    #: How its call takes alpha, beta and limit of SwiGLU, see scales.py. None: it has none.
    swiglu_numbers: SwigluNumbers | None = None

    @property
    def needs_input_scale(self) -> bool:
        """Whether it quantizes activations with the checkpoint's own scales."""
        return self.input_scales is not InputScales.NONE

    def scales(
        self, shape: MoEShape, checkpoint: CheckpointFormat = MODELOPT, *, input_scale: bool = True, missing: Missing = "refuse"
    ) -> MoEScales:
        """The scalars it reads. Without activation scales in the checkpoint, those of activations as they are."""
        inputs = self.input_scales if input_scale else InputScales.NONE
        stored = GlobalScales(
            self.name,
            self.separate_scales,
            shape.expert_activation.gated,
            inputs is InputScales.EACH,
            shape.first_expert,
            shape.experts,
            checkpoint,
            missing,
        )
        return MoEScales(stored, inputs, shape.expert_activation, self.swiglu_numbers)

    def refusal(
        self,
        activation: ExpertActivation,
        *,
        input_scale: bool = True,
        dynamic: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        """Why it cannot serve experts that are (:class:`Needs`), or None where it can."""
        if bias and self.biases is None:
            return "it adds no biases of experts"
        if dynamic and self.input_scales is not InputScales.NONE and not self.dynamic_scales:
            return "it cannot compute activation scales at run time"
        if not input_scale and self.needs_input_scale:
            return "it quantizes activations, and the checkpoint has no activation scales"
        if activation.kind not in self.activations or not (activation.gated or self.layout.ungated):
            return f"its kernel has no {activation.kind}, only {', '.join(sorted(self.activations))}"
        if activation.has_numbers and self.swiglu_numbers is None:
            return "its kernel has no alpha, beta or limit of SwiGLU"
        if dtype is not None and dtype not in self.dtypes:
            return f"it takes no activations of {dtype}"
        return None

    @abstractmethod
    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        """``x [T, H] -> [T, H]`` in ``x.dtype``; T is not 0.

        Args:
            layer: kernel names.
            x: activations.
            topk_weights: f32 ``[T, k]``.
            topk_ids: int32 ``[T, k]``, global expert numbers; experts of other ranks give nothing here.
            shape: logical dims.
        """

    def apply_logits(self, layer: MoENames, x: Tensor, logits: Tensor, routing: Routing, shape: MoEShape) -> Tensor:
        """The same from router logits ``[T, all experts]``. Default: choose, then :meth:`apply`."""
        weights, ids = routing.choose(logits)
        if routing.on_input:
            return self.apply(layer, (x * weights).to(x.dtype), torch.ones_like(weights), ids, shape)
        return self.apply(layer, x, weights, ids, shape)

    def weights_changed(self) -> None:
        """Called after a layer was processed: drop what a library keeps by address."""

    def check_activation(self, activation: ExpertActivation) -> None:
        """Raise BackendError for an activation which the kernel does not compute."""
        if activation.kind not in self.activations or (activation.has_numbers and self.swiglu_numbers is None):
            raise BackendError(
                "this runner's kernel has no such activation",
                name=self.name,
                expected=" or ".join(sorted(self.activations))
                + (" as it is" if self.swiglu_numbers is None else ", with its numbers"),
                found=activation,
                remedy="Choose another runner; reference computes every activation.",
            )


def own_choices(topk_ids: Tensor, topk_weights: Tensor, shape: MoEShape) -> tuple[Tensor, Tensor]:
    """(int32 numbers within this rank, f32 weights): a choice of another rank's expert goes to one of ours with weight 0.

    For kernels which know no expert parallelism. Spread evenly, because ranks hold equally many experts.
    """
    ids, weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
    if shape.ep_size > 1:
        own = torch.div(ids, shape.experts, rounding_mode="floor") == shape.ep_rank
        ids, weights = ids % shape.experts, weights * own
    return ids.contiguous(), weights.contiguous()


def own_biases(layer: MoENames, shape: MoEShape, suffix: str = "") -> tuple[Tensor | None, Tensor | None]:
    """``gemm1_bias`` and ``gemm2_bias``; None where there is none to add. Results of ranks that divide I add up, so one of them
    adds the second."""
    first = getattr(layer, f"gemm1_bias{suffix}", None)
    return first, None if first is None or shape.tp_rank else getattr(layer, f"gemm2_bias{suffix}")


def padded_input(x: Tensor, shape: MoEShape, layout: MoELayout) -> Tensor:
    """``[T, H]`` with zero columns up to the kernel's H."""
    hidden, _ = shape.padded(layout)
    return x if hidden == shape.hidden else functional.pad(x, (0, hidden - shape.hidden))


def quantized_input(x: Tensor, layer: MoENames) -> tuple[Tensor, Tensor]:
    """(codes u8 ``[T, H/2]``, row-major block scales e4m3 ``[T, H/16]``) by FlashInfer's quantizer."""
    from flashinfer import fp4_quantize

    codes, scales = fp4_quantize(x, layer.w13_input_scale_quant, is_sf_swizzled_layout=False, nvfp4_4over6=None)
    return codes, scales.view(torch.float8_e4m3fn).reshape(x.shape[0], x.shape[1] // BLOCK_SIZE)
