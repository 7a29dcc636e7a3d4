"""NvFp4LinearMethod: the quantization method of a linear layer, with the engines' calling convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, Declaration, Derivation, declare, registry_of
from aliasparam.errors import StateError

from .backends import KernelNames, LinearBackend, LinearShape, linear_backend
from .checkpoint_format import MODELOPT, CheckpointFormat
from .errors import BackendError, ShapeError
from .format import BLOCK_SIZE
from .loaders import load_partition
from .scales import GlobalScales, PartitionRatios

_runs: dict[tuple[str, torch.device], str | None] = {}


class NvFp4LinearMethod:
    """NVFP4 linear layers: quantized weights, and activations quantized (W4A4) or as they are (W4A16).

    Args:
        backend: a backend name, or "auto" for the best one that runs here. An explicit choice works without its GPU up to
            ``apply``: create, load, process, reload and export run anywhere.
        checkpoint: the names and the direction of scales, ModelOpt's or those of compressed-tensors.
        input_scale: False for checkpoints without activation scales (W4A16_NVFP4, NVFP4A16).
        pre_quant_scale: True for AWQ checkpoints: a factor for each input feature, applied before the activation is quantized.
        retarget_to: backends to which a loaded layer may be moved by :func:`retarget`, where their padding needs more room.

    Checkpoint names on the layer (ModelOpt's): ``weight`` u8 ``[N, K/2]``, ``weight_scale`` e4m3 ``[N, K/16]``,
    ``weight_scale_2`` f32 ``[partitions]``, ``input_scale`` f32 ``[partitions]``. Kernel names: ``weight_prepared``,
    ``weight_scale_interleaved`` (over the memory of the first two), ``alpha``, ``weight_alpha``, ``input_scale_inv`` f32 ``[1]``,
    ``output_scale`` ``[N]`` where there are several partitions, and ``input_factor`` ``[K]`` with AWQ.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        checkpoint: CheckpointFormat = MODELOPT,
        input_scale: bool = True,
        pre_quant_scale: bool = False,
        retarget_to: Sequence[str] = (),
    ) -> None:
        self.backend: LinearBackend = linear_backend(backend, input_scale=input_scale)
        self.checkpoint = checkpoint
        self.input_scale = input_scale
        self.pre_quant_scale = pre_quant_scale
        self.retarget_to = tuple(linear_backend(name) for name in retarget_to)
        for candidate in (self.backend, *self.retarget_to):
            self._need_input_scale(candidate)

    def _need_input_scale(self, backend: LinearBackend) -> None:
        if not self.input_scale and backend.needs_input_scale:
            raise BackendError(
                "this backend quantizes activations, and the checkpoint has no activation scales",
                name=backend.name,
                expected="a W4A16 backend (triton, flashinfer_cudnn_w4a16, flashinfer_cutedsl_w4a16) or reference",
            )

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
        self.backend.check_shape(shape)
        names = self.checkpoint
        attributes = {"weight_loader": load_partition, **extra_weight_attrs}
        matrix = {"input_dim": 1, "output_dim": 0, "output_partition_sizes": partitions, **attributes}
        scalar = {"needs_scalar_to_array": True, **attributes}
        _register(layer, names.weight, (shape.n, k // 2), torch.uint8, matrix)
        _register(layer, names.block_scale, (shape.n, k // BLOCK_SIZE), torch.float8_e4m3fn, matrix)
        _register(layer, names.weight_global, (len(partitions),), torch.float32, scalar)
        if self.input_scale:
            _register(layer, names.input_global, (len(partitions),), torch.float32, scalar)
        if self.pre_quant_scale:
            _register(layer, "pre_quant_scale", (k,), params_dtype, {"input_dim": 0, **attributes})
        state = layer.__dict__
        state["nvfp4_shape"], state["nvfp4_backend"], state["params_dtype"] = shape, self.backend, params_dtype
        registry = declare(layer, *self._declarations(layer, shape, params_dtype), loaded=False)
        registry.on_processed.append(_tell_backend)

    def _declarations(self, layer: nn.Module, shape: LinearShape, dtype: torch.dtype) -> list[Declaration]:
        names, layout, one = self.checkpoint, self.backend.layout, ((1,), torch.float32)
        room = [b.layout for b in self.retarget_to]
        scales = GlobalScales(names.reciprocal)
        declared: list[Declaration] = [
            Alias(names.weight, "weight_prepared", layout.weight, room_for=tuple(r.weight for r in room)),
            Alias(
                names.block_scale,
                "weight_scale_interleaved",
                layout.weight_scale,
                room_for=tuple(r.weight_scale for r in room),
            ),
            Derivation("weight_alpha", (names.weight_global, names.block_scale), scales.weight_alpha, *one),
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
            ratios = PartitionRatios(shape.partitions, dtype, names.reciprocal)
            layer.__dict__["nvfp4_ratios"] = ratios
            declared += [Derivation("output_scale", (names.weight_global,), ratios, (shape.n,), dtype)]
        return declared

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring what was written since the last call to kernel format. Idempotent, in place.

        Raises:
            StateError: a tensor was not loaded whole.
            ScaleError: scales that are none, or of partitions which no alpha can serve.
        """
        registry = registry_of(layer)
        if registry is None:
            raise StateError("this layer has no NVFP4 weights", module=type(layer).__name__, remedy="Call create_weights first.")
        registry.process()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K] -> [..., N]`` in ``x.dtype``.

        Raises:
            ShapeError: the last dim of ``x`` is not K, or a dtype that the backend does not take.
            BackendError: the backend cannot run on this device.
        """
        shape: LinearShape = layer.__dict__["nvfp4_shape"]
        backend: LinearBackend = layer.__dict__["nvfp4_backend"]
        if x.shape[-1] != shape.k:
            raise ShapeError(
                "the input does not fit", module=type(layer).__name__, expected=f"[..., {shape.k}]", found=list(x.shape)
            )
        _need_running(backend, x.device)
        rows = x.reshape(-1, shape.k)
        if rows.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], shape.n))
        if self.pre_quant_scale:
            rows = rows * layer.get_buffer("input_factor")
        out = backend.apply(cast(KernelNames, layer), rows, shape)
        ratios: PartitionRatios | None = layer.__dict__.get("nvfp4_ratios")
        if ratios is not None and ratios.applies:
            out = out * layer.get_buffer("output_scale").to(out.dtype)
        out = out.reshape(*x.shape[:-1], shape.n)
        return out if bias is None else out + bias


def retarget(module: nn.Module, backend: str) -> int:
    """Move every NVFP4 linear layer under ``module`` to the kernel format of another backend, in place; returns how many.

    Back by the old inverse, forward by the new transform: no reload, no second copy, the same addresses. Between backends of
    one format (cutlass, cudnn, cute-dsl, b12x, triton) nothing moves.

    Raises:
        BackendError: no such backend, or one that needs activation scales the checkpoint does not have.
        PointerError: the new format needs more padding than the layer has room for (see ``retarget_to``). Layers before it have
            been moved; all of them are right.
    """
    target, count = linear_backend(backend), 0
    for layer in module.modules():
        if "nvfp4_backend" not in layer.__dict__:
            continue
        registry = registry_of(layer)
        if registry is None or layer.__dict__["nvfp4_backend"] is target:
            continue
        if "input_scale_inv" not in registry.derived and target.needs_input_scale:
            raise BackendError("the checkpoint has no activation scales, which this backend needs", name=backend)
        layout = target.layout
        if layer.__dict__["nvfp4_backend"].layout is not layout:
            aliased = [s.name for s in registry.sources.values() if s.derived]
            formats = {"weight_prepared": layout.weight, "weight_scale_interleaved": layout.weight_scale}
            wanted = {s.name: formats[s.derived] for s in registry.sources.values() if s.derived in formats}
            if len(wanted) != len(formats):
                raise BackendError(
                    "a kernel name of this layer has memory of its own, so its format cannot be changed in place",
                    name=backend,
                    found=f"aliased sources {aliased}",
                    remedy="Create the layer with the backend it shall have.",
                )
            loaded = not registry.stale_names()
            registry.retarget(wanted)
            if loaded:
                registry.process()
        layer.__dict__["nvfp4_backend"] = target
        count += 1
    return count


def _tell_backend(registry: AliasRegistry) -> None:
    registry.module.__dict__["nvfp4_backend"].weights_changed()


def _need_running(backend: LinearBackend, device: torch.device) -> None:
    key = (backend.name, device)
    if key not in _runs:
        _runs[key] = backend.unavailable(device)
    if (reason := _runs[key]) is not None:
        raise BackendError(
            "this backend cannot run here", name=backend.name, found=reason, remedy='Use backend="reference" or "auto".'
        )


def _register(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    for key, value in attributes.items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)
