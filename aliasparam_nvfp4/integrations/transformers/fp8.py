"""A plain FP8 linear layer, for the modules of a mixed checkpoint which are not NVFP4. Nothing of it is aliased."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliasparam import TensorSpec
from aliasparam.spec import is_wide

from ...checkpoint.scheme import FP8, FP8_BLOCK, Scheme
from ...errors import ScaleError
from ...quantize.global_scale import need_stored_scales

_E4M3_MAX = 448.0
_F32_SCALAR = TensorSpec((), torch.float32)


class Fp8Linear(nn.Module):
    """Weights in e4m3, activations in e4m3 or as they are; computed in float32.

    Checkpoint names: ``weight`` e4m3 ``[N, K]``; ``weight_scale``, a multiplier: one value, one a row (``[N]`` or ``[N, 1]``), or
    one a block of rows and columns (``[n, k]``); ``input_scale`` f32 where activations have a stored one, a multiplier. As
    ModelOpt and compressed-tensors (``float-quantized``) store them.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        dtype: of the bias.
        scheme: how activations are quantized.
        weight_scale: as the files have it.
        input_scale: likewise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        scheme: Scheme = FP8,
        weight_scale: TensorSpec = _F32_SCALAR,
        input_scale: TensorSpec = _F32_SCALAR,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = _empty(TensorSpec((out_features, in_features), torch.float8_e4m3fn))
        self.weight_scale = _empty(weight_scale)
        if scheme.inputs == "stored":
            self.input_scale = _empty(input_scale)
        self.bias = _empty(TensorSpec((out_features,), dtype)) if bias else None

    def takes(self, weight_scale: TensorSpec) -> bool:
        """Whether such scales divide the weight."""
        n, shape = self.out_features, weight_scale.shape
        rows = shape[:1] == (n,) and len(shape) <= 2 and shape[1:] in ((), (1,))
        one = len(shape) <= 1 and shape in ((), (1,))
        return is_wide(weight_scale.dtype) and (one or rows or self._block_sizes(shape) is not None)

    def _block_sizes(self, counts: Sequence[int]) -> tuple[int, int] | None:
        """(rows, columns) of the blocks of which there are so many: the config's, of 128, or what divides the weight evenly."""
        if len(counts) != 2:
            return None
        sizes = []
        dims = (self.out_features, self.in_features)
        for dim, count, said in zip(dims, counts, self.scheme.block or (None, None), strict=True):
            even = [dim // count] if count and dim % count == 0 else []
            fitting = [size for size in ([said] if said else [FP8_BLOCK, *even]) if -(-dim // size) == count]
            sizes += fitting[:1]
        return (sizes[0], sizes[1]) if len(sizes) == 2 else None

    @property
    def scales(self) -> list[str]:
        """The names of those that are stored."""
        return [name for name in ("weight_scale", "input_scale") if name in self._parameters]

    def check_scales(self, path: str, value: Callable[[str], Tensor]) -> None:
        """Raise ScaleError for scales that are none: what they are divided by or multiplied with would be NaN.

        Args:
            path: of this module, for messages.
            value: of the tensor of such a name, loaded or about to be.
        """
        scale = value("weight_scale").float()
        if not bool(torch.isfinite(scale).all()):
            index = (~torch.isfinite(scale)).nonzero()[0]
            found = f"{scale[tuple(index)].item()} at {index.tolist()} of {list(scale.shape)}"
            raise ScaleError(
                "a scale of FP8 weights is no number", module=path, name="weight_scale", expected="finite", found=found
            )
        if self.scheme.inputs == "stored":
            need_stored_scales({"input_scale": value("input_scale")}, path)

    def forward(self, x: Tensor) -> Tensor:
        rows, factor = self._quantized(x.float())
        scale = self.weight_scale.float()
        if scale.numel() in (1, self.out_features) and scale.dim() < 3 and (scale.dim() < 2 or scale.shape[1] == 1):
            out = functional.linear(rows, self.weight.float()) * scale.reshape(-1)
        else:
            out = functional.linear(rows, self.weight.float() * self._by_blocks(scale))
        out = (out if factor is None else out * factor).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(values of the codes, what they are multiplied with)."""
        how = self.scheme.inputs
        if how is None:
            return x, None
        if how == "block":
            padded = functional.pad(x, (0, -x.shape[-1] % FP8_BLOCK)).reshape(*x.shape[:-1], -1, FP8_BLOCK)
            scale = (padded.abs().amax(-1, keepdim=True) / _E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            return (_e4m3(padded / scale) * scale).flatten(-2)[..., : x.shape[-1]], None
        if how == "stored":
            scale = self.input_scale.float().reshape(())
        else:
            largest = x.abs().amax(-1, keepdim=True) if how == "token" else x.abs().amax()
            scale = (largest / _E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        return _e4m3(x / scale), scale

    def _by_blocks(self, scale: Tensor) -> Tensor:
        """``[N, K]`` of one scale for each block."""
        sizes = self._block_sizes(scale.shape)
        if sizes is None:
            raise AssertionError("scales that do not divide the weight were refused before it was loaded")
        return scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _empty(spec: TensorSpec) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
