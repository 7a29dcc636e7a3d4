"""NvFp4LinearMethod: the quantization method of a linear layer, with the engines' calling convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, Declaration, Derivation, declare, registry_of
from aliasparam.errors import StateError

from ..checkpoint.format import MODELOPT, CheckpointFormat
from ..errors import ShapeError
from ..kernels.choice import need_running
from ..kernels.declared import need_undeclared
from ..quantize.block_scales import FiniteBlockScales
from ..quantize.format import BLOCK_SIZE
from ..quantize.missing import Missing, RunTimeScales, is_dynamic, need_policy
from .backends import KernelNames, LinearBackend, LinearLayout, LinearShape, chosen, linear_backend
from .loaders import load_partition
from .scales import GlobalScales, PartitionRatios


class NvFp4LinearMethod:
    """NVFP4 linear layers: quantized weights, and activations quantized (W4A4) or as they are (W4A16).

    Args:
        backend: a backend name, or "auto" for the best one that runs here and takes the layer's dims and dtype; chosen for each
            layer, and ``aliasparam.explain`` says why. An explicit choice works without its GPU up to ``apply``: create, load,
            process, reload and export run anywhere.
        checkpoint: the names and the direction of scales, ModelOpt's or those of compressed-tensors.
        input_scale: False for checkpoints without activation scales (W4A16_NVFP4, NVFP4A16).
        missing_input_scale: what to do where an input scale is 0 or no number: "refuse" it; take the "max" of the fused
            partitions; or compute it at run time for each token ("dynamic") or each call ("dynamic-tensor"), where the backend
            can. With ``input_scale=False`` the last two compute the scales that are not there; otherwise activations stay as
            they are.
        pre_quant_scale: True for AWQ checkpoints: a factor for each input feature, applied before the activation is quantized.
        retarget_to: backends to which a loaded layer may be moved by :func:`retarget`, where their padding needs more room.
        column_scales: True for checkpoints whose partitions have different weight scales: output columns are multiplied at every
            forward, by ones where the scales are equal. False: such weights are refused.

    Checkpoint names on the layer (ModelOpt's): ``weight`` u8 ``[N, K/2]``, ``weight_scale`` e4m3 ``[N, K/16]``,
    ``weight_scale_2`` f32 ``[partitions]``, ``input_scale`` f32 ``[partitions]``. Kernel names: ``weight_prepared``,
    ``weight_scale_interleaved`` (over the memory of the first two), ``alpha``, ``weight_alpha``, ``input_scale_inv`` f32 ``[1]``,
    ``output_scale`` f32 ``[N]`` where there are several partitions, and ``input_factor`` ``[K]`` with AWQ.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        checkpoint: CheckpointFormat = MODELOPT,
        input_scale: bool = True,
        missing_input_scale: Missing = "refuse",
        pre_quant_scale: bool = False,
        retarget_to: Sequence[str] = (),
        column_scales: bool = False,
    ) -> None:
        need_policy(missing_input_scale)
        dynamic = is_dynamic(missing_input_scale)
        self.name = backend
        self.backend: LinearBackend = linear_backend(backend, input_scale=input_scale, dynamic=dynamic)
        self.checkpoint = checkpoint
        self.input_scale = input_scale
        self.missing_input_scale: Missing = missing_input_scale
        self.pre_quant_scale = pre_quant_scale
        self.retarget_to = tuple(linear_backend(name) for name in retarget_to)
        self.column_scales = column_scales
        for candidate in (self.backend, *self.retarget_to):
            candidate.check_scales(input_scale=input_scale, dynamic=dynamic)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register and declare the layer's weights, empty, on the default device.

        Args:
            layer: the module that gets the names.
            input_size_per_partition: K on this rank, a multiple of 16.
            output_partition_sizes: N of each fused partition on this rank (q, k, v; gate, up; or one).
            input_size: K of the whole layer.
            output_size: N of the whole layer.
            params_dtype: dtype of activations and outputs.
            extra_weight_attrs: put on every parameter (``weight_loader``, ...).

        Raises:
            ShapeError: K is not a multiple of 16, or dims which the backend cannot take.
            StateError: the layer has its weights already.
        """
        k, partitions = input_size_per_partition, tuple(output_partition_sizes)
        shape = LinearShape(sum(partitions), k, partitions)
        if k <= 0 or k % BLOCK_SIZE or not partitions or min(partitions) <= 0:
            raise ShapeError(
                "NVFP4 needs whole blocks along K",
                module=type(layer).__name__,
                expected=f"K a positive multiple of {BLOCK_SIZE}, positive partitions",
                found=f"K={k} (whole layer {input_size}), partitions {list(partitions)}",
            )
        dynamic = is_dynamic(self.missing_input_scale)
        backend, reason = chosen(self.name, input_scale=self.input_scale, dynamic=dynamic, shape=shape, dtype=params_dtype)
        for candidate in (backend, *self.retarget_to):
            candidate.check_shape(shape)
        names = self.checkpoint
        need_undeclared(layer, (names.weight, names.block_scale, names.weight_global))
        attributes = {"weight_loader": load_partition, **extra_weight_attrs}
        matrix = {"input_dim": 1, "output_dim": 0, "output_partition_sizes": partitions, **attributes}
        scalar = {"needs_scalar_to_array": True, **attributes}
        _register(layer, names.weight, (shape.n, k // 2), torch.uint8, matrix)
        _register(layer, names.block_scale, (shape.n, k // BLOCK_SIZE), torch.float8_e4m3fn, matrix)
        _register(layer, names.weight_global, (len(partitions),), torch.float32, scalar)
        if self.input_scale:
            _register(layer, names.input_global, (len(partitions),), torch.float32, scalar)
        if self.pre_quant_scale:
            whole = {"input_dim": 0, "partitions": len(partitions), "shards_seen": set(), **attributes}
            _register(layer, "pre_quant_scale", (k,), params_dtype, whole)
        state = layer.__dict__
        state["nvfp4_shape"], state["nvfp4_backend"], state["params_dtype"] = shape, backend, params_dtype
        state["run_time_scales"] = RunTimeScales.of(self.missing_input_scale)
        checks, declarations = [FiniteBlockScales((names.block_scale,))], self._declarations(shape, backend.layout)
        registry = declare(layer, *declarations, loaded=False, checks=checks, on_processed=[_end_of_load])
        registry.about = f"{backend.name}: {reason}"

    def _declarations(self, shape: LinearShape, layout: LinearLayout) -> list[Declaration]:
        names, one = self.checkpoint, ((1,), torch.float32)
        room = [b.layout for b in self.retarget_to]
        scales = GlobalScales(names.reciprocal, self.missing_input_scale)
        declared: list[Declaration] = [
            Alias(names.weight, "weight_prepared", layout.weight, room_for=tuple(r.weight for r in room)),
            Alias(
                names.block_scale,
                "weight_scale_interleaved",
                layout.weight_scale,
                room_for=tuple(r.weight_scale for r in room),
            ),
            Derivation("weight_alpha", (names.weight_global,), scales.weight_alpha, *one),
        ]
        if self.input_scale:
            declared += [
                Derivation("alpha", (names.input_global, names.weight_global), scales.alpha, *one),
                Derivation("input_scale_inv", (names.input_global,), scales.input_scale_inv, *one),
            ]
        else:
            declared += [Derivation("alpha", ("weight_alpha",), torch.clone, *one)]
        if self.pre_quant_scale:
            declared += [Alias("pre_quant_scale", "input_factor")]
        if len(shape.partitions) > 1:
            ratios = PartitionRatios(shape.partitions, names.reciprocal, self.column_scales)
            declared += [Derivation("output_scale", (names.weight_global,), ratios, (shape.n,), torch.float32)]
        return declared

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring what was written since the last call to kernel format. Idempotent, in place.

        Raises:
            StateError: a tensor was not loaded whole.
            ScaleError: global scales that are not finite and positive, or of partitions which no alpha can serve.
        """
        registry = registry_of(layer)
        if registry is None:
            raise StateError("this layer has no NVFP4 weights", module=type(layer).__name__, remedy="Call create_weights first.")
        registry.process()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K] -> [..., N]`` in ``x.dtype``.

        Raises:
            ShapeError: the last dim of ``x`` is not K, or a dtype that the backend (or the scaling of columns) does not take.
            BackendError: the backend cannot run on this device.
        """
        shape: LinearShape = layer.__dict__["nvfp4_shape"]
        backend: LinearBackend = layer.__dict__["nvfp4_backend"]
        if x.dim() == 0 or x.shape[-1] != shape.k:
            raise ShapeError(
                "the input does not fit", module=type(layer).__name__, expected=f"[..., {shape.k}]", found=list(x.shape)
            )
        need_running(backend, x.device)
        backend.check_dtype(x.dtype)
        rows = x.reshape(-1, shape.k)
        if rows.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], shape.n))
        if self.pre_quant_scale:
            rows = rows * layer.get_buffer("input_factor").to(rows.dtype)
        scaled = self.column_scales and len(shape.partitions) > 1
        if scaled and x.dtype is torch.float16:  # before the multiplication a column is larger by the inverse ratio
            raise ShapeError(
                "partitions with different weight global scales need a dtype of wide range",
                expected="bfloat16 or float32 activations",
                found=x.dtype,
                remedy="Cast the activations, export the checkpoint with unified scales, or load these projections unfused.",
            )
        # Quantizers and kernels take rows that lie one after another, and some read strides as another layout.
        out = backend.apply(cast(KernelNames, layer), rows.contiguous(), shape)
        if scaled:
            out = (out * layer.get_buffer("output_scale")).to(out.dtype)  # float32 in between
        out = out.reshape(*x.shape[:-1], shape.n)
        return out if bias is None else out + bias.to(out.dtype)


def _end_of_load(registry: AliasRegistry) -> None:
    for source in registry.sources.values():
        for binding in source.bindings:
            getattr(binding.parameter, "shards_seen", set()).clear()


def _register(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    for key, value in attributes.items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)
