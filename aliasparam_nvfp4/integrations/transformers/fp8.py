"""A plain FP8 linear layer, for the modules of a mixed checkpoint which are not NVFP4. Nothing of it is aliased."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_E4M3_MAX = 448.0


class Fp8Linear(nn.Module):
    """Weights and activations in e4m3 with one scale each, as ModelOpt's FP8 stores them; computed in float32.

    Checkpoint names: ``weight`` e4m3 ``[N, K]``, ``weight_scale`` f32, ``input_scale`` f32 (multipliers).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty((), dtype=torch.float32), requires_grad=False)
        self.input_scale = nn.Parameter(torch.empty((), dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        quantized = (x.float() / self.input_scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
        out = functional.linear(quantized, self.weight.float()) * (self.input_scale * self.weight_scale)
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
