"""``triton``: our W4A16 kernel, which decodes weights in registers from the plain kernel format. Compute capability 8.0 on."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ._base import KernelNames, LinearBackend, LinearShape
from ._layouts import PLAIN


class Triton(LinearBackend):
    name = "triton"
    layout = PLAIN
    weight_only = True
    needs_input_scale = False
    packages = ("triton",)
    rank = 2
    call = "aliasparam_nvfp4.kernels.triton_linear.linear"
    shuffled = False

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(device) or no_triton(device)

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from ...kernels.triton_linear import linear

        return linear(
            kernel_input(x),
            layer.weight_prepared,
            layer.weight_scale_interleaved,
            layer.weight_alpha,
            n=shape.n,
            shuffled=self.shuffled,
        )


def no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``, where Triton is installed."""
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later (or TRITON_INTERPRET=1)"
    return None


def kernel_input(x: Tensor) -> Tensor:
    """``x`` as the kernels take it: bf16 or fp16, contiguous, and at an even offset, because they read pairs.

    Raises:
        ShapeError: another dtype.
    """
    if x.is_cuda and x.dtype not in (torch.bfloat16, torch.float16):
        raise ShapeError("the Triton kernels take bfloat16 and float16", expected="bfloat16 or float16", found=x.dtype)
    x = x.contiguous()
    return x if x.storage_offset() % 2 == 0 else x.clone()


BACKEND = Triton()
