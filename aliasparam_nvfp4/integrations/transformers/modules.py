"""The modules which stand in for ``nn.Linear`` in a transformers model.

[Note: fused but shown apart] Projections that read the same input (q, k, v; gate, up) are one fused layer in memory, because
the kernel is called once for them. The checkpoint and the model's code know them by their own names. So the fused layer owns
the storages and kernel names, and each projection shows its rows as parameters of its own: the state dict has exactly the
checkpoint's names, and writing ``q_proj.weight`` writes rows of the fused weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import registry_of

from ...checkpoint import UnsupportedFormatError
from ...checkpoint.format import MODELOPT, CheckpointFormat
from ...checkpoint.scheme import NVFP4, Scheme
from ...linear import NvFp4LinearMethod
from ...quantize.format import BLOCK_SIZE
from ...quantize.missing import Missing
from .shared_call import partition


@dataclass(frozen=True)
class ProjectionKind:
    """Which tensors a projection's checkpoint has.

    Attributes:
        names: of the tensors.
        input_scale: whether activations have a scale.
        missing_input_scale: what counts for one that is missing, see missing.py; "refuse" of a checkpoint that has none.
        pre_quant_scale: whether input features have a factor (AWQ).
    """

    names: CheckpointFormat = MODELOPT
    input_scale: bool = True
    missing_input_scale: Missing = "refuse"
    pre_quant_scale: bool = False

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name to (shape, dtype) of the tensors that the fused layer takes in."""
        names, scalar = self.names, (self.names.scalar_shape, torch.float32)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            names.weight: ((out_features, in_features // 2), torch.uint8),
            names.block_scale: ((out_features, in_features // BLOCK_SIZE), torch.float8_e4m3fn),
            names.weight_global: scalar,
        }
        if self.input_scale:
            found[names.input_global] = scalar
        if self.pre_quant_scale:
            found["pre_quant_scale"] = ((in_features,), dtype)
        return found

    def method(self, backend: str, retarget_to: Sequence[str] = ()) -> NvFp4LinearMethod:
        """The quantization method of such a projection."""
        return NvFp4LinearMethod(
            backend,
            checkpoint=self.names,
            input_scale=self.input_scale,
            missing_input_scale=self.missing_input_scale,
            pre_quant_scale=self.pre_quant_scale,
            retarget_to=retarget_to,
        )


class Projection(nn.Module):
    """One projection under its checkpoint name.

    While the model loads it holds placeholders that the loader fills. Then :meth:`attach` makes its parameters show rows of
    the fused layer, and calling it gives its columns of the fused output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        kind: ProjectionKind,
        scheme: Scheme = NVFP4,
        scalars: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self._scalars = dict(scalars or {})
        self.in_features = in_features
        self.out_features = out_features
        self.kind = kind
        self.scheme = scheme
        self.dtype = dtype
        for name, (shape, element) in self.tensors().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=element), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._index = 0
        # In a tuple, so that the fused layer is not registered a second time as our submodule.
        self._fused: tuple[FusedLinear, ...] = ()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name to (shape, dtype) of what the fused layer takes in; global scales in the shape that the files have."""
        found = self.kind.tensors(self.in_features, self.out_features, self.dtype)
        return {name: (self._scalars.get(name, shape), dtype) for name, (shape, dtype) in found.items()}

    def attach(self, fused: FusedLinear, index: int) -> None:
        self._fused, self._index = (fused,), index
        fused._members = (*fused._members, self)

    def forward(self, x: Tensor) -> Tensor:
        if not self._fused:
            raise RuntimeError("this projection has not been bound to its fused layer: the model is still loading")
        (fused,) = self._fused
        if not x.dtype.is_floating_point:
            raise UnsupportedFormatError(
                "the model cast activations to the dtype of packed weights: its code goes by the dtype of this layer's weight",
                module=None if (registry := registry_of(fused)) is None else registry.label,
                expected="activations in floating point",
                found=x.dtype,
                remedy="Export the model with this layer left unquantized.",
            )
        out = fused(x) if len(fused.partitions) == 1 else partition(fused, fused.partitions, x, self._index)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FusedLinear(nn.Module):
    """One kernel call for several projections of the same input (or for a single one)."""

    def __init__(
        self,
        method: NvFp4LinearMethod,
        in_features: int,
        partitions: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.quant_method = method
        self.partitions = tuple(partitions)
        out_features = sum(partitions)
        method.create_weights(self, in_features, self.partitions, in_features, out_features, dtype)
        self._members: tuple[Projection, ...] = ()

    def members(self) -> tuple[Projection, ...]:
        """The projections this layer serves, in partition order."""
        return self._members

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x)

    def extra_repr(self) -> str:
        return f"partitions={list(self.partitions)}, backend={self.__dict__['nvfp4_backend'].name}"
