"""The scalars of a linear layer, from the scales of its partitions.

With ModelOpt's names: a weight is ``e2m1 * weight_scale * weight_scale_2``, an activation ``e2m1 * block_scale * input_scale``.
A kernel multiplies codes and block scales and applies one ``alpha = input_scale * weight_scale_2`` at the end; the activation
quantizer is given ``1 / input_scale`` (FlashInfer ``fp4_quantize``: global scale = 448 * 6 / amax).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ScaleError


def weight_global_scale(weight_scale_2: Tensor) -> Tensor:
    """The one global scale of all partitions, f32 ``[1]``.

    Raises:
        ScaleError: the partitions have different scales. One ``alpha`` cannot be right for all of them, and the block
            scales (e4m3) cannot take up an arbitrary ratio without rounding.
    """
    first = weight_scale_2[:1]
    if bool((weight_scale_2 != first).any()):
        raise ScaleError(
            "the partitions of a fused projection have different weight global scales",
            name="weight_scale_2",
            expected="one value for all partitions (ModelOpt unifies them at export)",
            found=weight_scale_2.tolist(),
            remedy="Export the checkpoint with unified scales, or load these projections unfused.",
        )
    if not bool(torch.isfinite(first).all()) or bool((first < 0).any()):
        raise ScaleError(
            "the weight global scale is not a scale", name="weight_scale_2", expected="finite, >= 0", found=first.item()
        )
    return first


def input_global_scale(input_scale: Tensor) -> Tensor:
    """The common activation scale of all partitions, f32 ``[1]``: their maximum, so that none saturates.

    Raises:
        ScaleError: a scale is not finite or not positive.
    """
    if not bool((torch.isfinite(input_scale) & (input_scale > 0)).all()):
        raise ScaleError("an input scale is not a scale", name="input_scale", expected="finite, > 0", found=input_scale.tolist())
    return input_scale.max().reshape(1)


def alpha(input_scale: Tensor, weight_scale_2: Tensor) -> Tensor:
    """``max(input_scale) * weight_scale_2``, f32 ``[1]``."""
    return input_global_scale(input_scale) * weight_global_scale(weight_scale_2)


def input_scale_inv(input_scale: Tensor) -> Tensor:
    """``1 / max(input_scale)``, f32 ``[1]``."""
    return 1.0 / input_global_scale(input_scale)
