"""NvFp4LinearMethod: the quantization method of a linear layer, with the engines' calling convention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, declare, registry_of
from aliasparam.errors import StateError

from . import scales
from .backends import KernelNames, LinearBackend, LinearShape, linear_backend
from .errors import BackendError, ShapeError
from .format import BLOCK_SIZE

WeightLoader = Callable[..., None]


class NvFp4LinearMethod:
    """NVFP4 weights and activations (W4A4) for linear layers.

    Args:
        backend: a backend name, or "auto" for the best one that runs here. An explicit choice works without its GPU up to
            ``apply``: create, load, process, reload and export run anywhere.

    Checkpoint names on the layer (ModelOpt's): ``weight`` u8 ``[N, K/2]``, ``weight_scale`` e4m3 ``[N, K/16]``,
    ``weight_scale_2`` f32 ``[partitions]``, ``input_scale`` f32 ``[partitions]``. Kernel names: ``weight_prepared``,
    ``weight_scale_interleaved`` (over the memory of the first two), ``alpha``, ``input_scale_inv`` f32 ``[1]``.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend: LinearBackend = linear_backend(backend)

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
        attributes = {"weight_loader": load_partition, **extra_weight_attrs}
        matrix = {"input_dim": 1, "output_dim": 0, "output_partition_sizes": partitions}
        _register(layer, "weight", (shape.n, k // 2), torch.uint8, {**matrix, **attributes})
        _register(layer, "weight_scale", (shape.n, k // BLOCK_SIZE), torch.float8_e4m3fn, {**matrix, **attributes})
        for name in ("weight_scale_2", "input_scale"):
            _register(layer, name, (len(partitions),), torch.float32, {"needs_scalar_to_array": True, **attributes})
        layer.nvfp4_shape = shape  # type: ignore[assignment]
        layer.params_dtype = params_dtype  # type: ignore[assignment]
        declare(
            layer,
            Alias("weight", "weight_prepared", self.backend.layout.weight),
            Alias("weight_scale", "weight_scale_interleaved", self.backend.layout.weight_scale),
            Derivation("alpha", ("input_scale", "weight_scale_2"), scales.alpha, (1,), torch.float32),
            Derivation("input_scale_inv", ("input_scale",), scales.input_scale_inv, (1,), torch.float32),
            loaded=False,
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring what was written since the last call to kernel format. Idempotent, in place.

        Raises:
            StateError: a tensor was not loaded whole.
            ScaleError: partitions with different weight global scales, or scales that are none.
        """
        registry = registry_of(layer)
        if registry is None:
            raise StateError("this layer has no NVFP4 weights", module=type(layer).__name__, remedy="Call create_weights first.")
        registry.process()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K] -> [..., N]`` in ``x.dtype``.

        Raises:
            ShapeError: the last dim of ``x`` is not K.
            BackendError: the backend cannot run on this device.
        """
        shape: LinearShape = layer.nvfp4_shape  # type: ignore[assignment]
        if x.shape[-1] != shape.k:
            raise ShapeError(
                "the input does not fit", module=type(layer).__name__, expected=f"[..., {shape.k}]", found=list(x.shape)
            )
        if (reason := self.backend.unavailable(x.device)) is not None:
            raise BackendError(
                "this backend cannot run here", name=self.backend.name, found=reason, remedy='Use backend="reference" or "auto".'
            )
        out = self.backend.apply(cast(KernelNames, layer), x, shape)
        return out if bias is None else out + bias


def _register(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    for key, value in attributes.items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)


_SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


def load_partition(param: Tensor, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
    """Weight loader with the engines' convention: one partition of a fused tensor, or the whole.

    Args:
        param: one of the layer's checkpoint names.
        loaded_weight: a shard as the checkpoint stores it; a 0-d scalar for the per-partition scales.
        loaded_shard_id: "q", "k", "v", a partition index, or None for everything.

    Raises:
        ShapeError: unknown shard, or a shard of another shape or dtype. Nothing is written then.
    """
    target = param
    if loaded_shard_id is not None:
        index = _SHARD_INDEX.get(loaded_shard_id, -1) if isinstance(loaded_shard_id, str) else loaded_shard_id
        sizes: Sequence[int] = getattr(param, "output_partition_sizes", (1,) * param.shape[0])
        if not 0 <= index < len(sizes):
            raise ShapeError("no such shard", expected=f"one of {len(sizes)} partitions", found=repr(loaded_shard_id))
        target = param[sum(sizes[:index]) : sum(sizes[: index + 1])]
    value = loaded_weight.reshape(1).expand(target.shape) if loaded_weight.dim() == 0 else loaded_weight
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ShapeError(
            "the loaded shard does not fit",
            expected=f"{target.dtype} {list(target.shape)}",
            found=f"{loaded_weight.dtype} {list(loaded_weight.shape)}",
        )
    with torch.no_grad():
        target.copy_(value)
