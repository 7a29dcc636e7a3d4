"""The scalars of a linear layer, from the global scales of its partitions.

With ModelOpt's names: a weight is ``e2m1 * weight_scale * weight_scale_2``, an activation ``e2m1 * block_scale * input_scale``.
A kernel multiplies codes and block scales and applies one ``alpha = input_scale * weight_scale_2`` at the end; the activation
quantizer is given ``1 / input_scale`` (FlashInfer ``fp4_quantize``: global scale = 448 * 6 / amax). compressed-tensors stores the
reciprocals, so where partitions are combined its *smallest* scales count, not its largest.

[Note: partitions with different global scales] One alpha cannot be right for all of them. It is the largest, and the output
columns of each partition are multiplied with the ratio to it, which is exact where the ratio is a power of two. Any other ratio
would round, and is refused. Engines take the largest and leave the columns alone, which is silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ScaleError


@dataclass(frozen=True)
class GlobalScales:
    """The derivations of a layer's scalars, for scales which are multipliers or their reciprocals."""

    reciprocal: bool = False

    def weight_alpha(self, weight_global: Tensor, block_scale: Tensor) -> Tensor:
        """The weights' global scale, f32 ``[1]``: the largest of the partitions, as a multiplier.

        Raises:
            ScaleError: a scale is not finite or not positive, or a block scale is NaN (ModelOpt writes those for a tensor of
                zeros).
        """
        if bool(((block_scale.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise ScaleError(
                "block scales are NaN",
                name="weight_scale",
                expected="finite e4m3 values",
                found="NaN, as ModelOpt writes for a tensor of zeros",
                remedy="Exclude this module from quantization and export again.",
            )
        _need_scales("weight global scale", weight_global)
        return self._largest(weight_global)

    def alpha(self, input_global: Tensor, weight_global: Tensor) -> Tensor:
        """``input_scale * weight_scale_2`` of the largest multipliers, f32 ``[1]``."""
        _need_scales("input global scale", input_global)
        if self.reciprocal:
            return 1.0 / (input_global.min().reshape(1) * weight_global.min().reshape(1))
        return input_global.max().reshape(1) * weight_global.max().reshape(1)

    def input_scale_inv(self, input_global: Tensor) -> Tensor:
        """What the activation quantizer multiplies with, f32 ``[1]``; of the partitions the smallest, so that none saturates."""
        _need_scales("input global scale", input_global)
        return input_global.min().reshape(1) if self.reciprocal else 1.0 / input_global.max().reshape(1)

    def _largest(self, scales: Tensor) -> Tensor:
        return 1.0 / scales.min().reshape(1) if self.reciprocal else scales.max().reshape(1)


@dataclass
class PartitionRatios:
    """The factor of every output column. See [Note: partitions with different global scales].

    Whether columns are multiplied at all is decided by the first weights and never changes: a captured graph has it or not.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    reciprocal: bool = False
    applies: bool | None = None

    def __call__(self, weight_global: Tensor) -> Tensor:
        """``[N]`` in the layer's dtype, powers of two.

        Raises:
            ScaleError: a ratio is not a power of two, or the layer began with equal scales and now comes with different ones.
        """
        ratio = weight_global.min() / weight_global if self.reciprocal else weight_global / weight_global.max()
        different = bool((ratio != 1).any())
        exact = bool((torch.frexp(ratio).mantissa == 0.5).all()) and bool((ratio.to(self.dtype).float() == ratio).all())
        if different and (not exact or self.applies is False):
            raise ScaleError(
                "the partitions of a fused projection have different weight global scales",
                expected="equal scales, as in the first checkpoint" if exact else "ratios that are powers of two",
                found=weight_global.tolist(),
                remedy="Start cold from this checkpoint: the layer then scales its columns."
                if exact
                else "Export the checkpoint with unified scales, or load these projections unfused.",
            )
        if self.applies is None:
            self.applies = different
        sizes = torch.tensor(self.sizes, device=ratio.device)
        return ratio.to(self.dtype).repeat_interleave(sizes)


def _need_scales(what: str, values: Tensor) -> None:
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ScaleError(f"an {what} is not a scale", expected="finite, > 0", found=values.tolist())
