"""The scalars of a linear layer, from the global scales of its partitions.

With ModelOpt's names: a weight is ``e2m1 * weight_scale * weight_scale_2``, an activation ``e2m1 * block_scale * input_scale``.
A kernel multiplies codes and block scales and applies one ``alpha = input_scale * weight_scale_2`` at the end; the activation
quantizer is given ``1 / input_scale`` (FlashInfer ``fp4_quantize``: global scale = 448 * 6 / amax). compressed-tensors stores the
reciprocals, so where partitions are combined its *smallest* scales count, not its largest.

[Note: partitions with different global scales] One alpha cannot be right for all of them. It is the largest, and the output
columns of each partition are multiplied with the ratio to it: in float32, so that the result is rounded once more and no worse,
and not at all where the ratio is a power of two. Engines take the largest and leave the columns alone, which is silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ScaleError
from ..quantize.global_scale import EXPECTED, are_scales
from ..quantize.missing import Missing, completed, is_dynamic


@dataclass(frozen=True)
class GlobalScales:
    """The derivations of a layer's scalars, for scales which are multipliers or their reciprocals.

    ``missing`` says what counts for an input scale that is 0 or no number. Where that is to be computed at run time,
    ``alpha`` and ``input_scale_inv`` are 0.
    """

    reciprocal: bool = False
    missing: Missing = "refuse"

    def weight_alpha(self, weight_global: Tensor) -> Tensor:
        """The weights' global scale, f32 ``[1]``: the largest of the partitions, as a multiplier.

        Raises:
            ScaleError: a scale is not finite or not positive.
        """
        _need_scales("a weight global scale", weight_global)
        return _usable("weight_alpha", self._largest(weight_global))

    def alpha(self, input_global: Tensor, weight_global: Tensor) -> Tensor:
        """``input_scale * weight_scale_2`` of the largest multipliers, f32 ``[1]``."""
        input_global = self._inputs(input_global)
        if self._at_run_time(input_global):
            return input_global.new_zeros(1)
        if self.reciprocal:
            return _usable("alpha", 1.0 / (input_global.min().reshape(1) * weight_global.min().reshape(1)))
        return _usable("alpha", input_global.max().reshape(1) * weight_global.max().reshape(1))

    def input_scale_inv(self, input_global: Tensor) -> Tensor:
        """What the activation quantizer multiplies with, f32 ``[1]``; of the partitions the smallest, so that none saturates."""
        input_global = self._inputs(input_global)
        if self._at_run_time(input_global):
            return input_global.new_zeros(1)
        return _usable(
            "input_scale_inv", input_global.min().reshape(1) if self.reciprocal else 1.0 / input_global.max().reshape(1)
        )

    def _inputs(self, stored: Tensor) -> Tensor:
        found = completed(stored, self.missing, reciprocal=self.reciprocal)
        if not self._at_run_time(found):
            _need_scales("an input global scale", found)
        return found

    def _at_run_time(self, inputs: Tensor) -> bool:
        return is_dynamic(self.missing) and not bool(inputs.any())

    def _largest(self, scales: Tensor) -> Tensor:
        return 1.0 / scales.min().reshape(1) if self.reciprocal else scales.max().reshape(1)


@dataclass(frozen=True)
class PartitionRatios:
    """The factor of every output column. See [Note: partitions with different global scales].

    A captured graph has the multiplication or not, so ``multiplied`` is said when the layer is made.
    """

    sizes: tuple[int, ...]
    reciprocal: bool = False
    multiplied: bool = False

    def __call__(self, weight_global: Tensor) -> Tensor:
        """f32 ``[N]``, at most 1.

        Raises:
            ScaleError: a ratio is not 1 in a layer that does not multiply its columns.
        """
        ratio = weight_global.min() / weight_global if self.reciprocal else weight_global / weight_global.max()
        if not self.multiplied and bool((ratio != 1).any()):
            raise ScaleError(
                "the partitions of a fused projection have different weight global scales",
                expected="equal scales",
                found=weight_global.tolist(),
                remedy="Make the layer with column_scales=True: it then multiplies its output columns.",
            )
        return torch.cat([one.expand(size) for one, size in zip(ratio, self.sizes, strict=True)])


def _need_scales(what: str, values: Tensor) -> None:
    if not bool(are_scales(values).all()):
        raise ScaleError(f"{what} is not a scale", expected=EXPECTED, found=values.tolist(), remedy=_REMEDIES.get(what))


_REMEDIES = {
    "an input global scale": "A layer that met no token in calibration has none: calibrate again, or choose what counts instead: "
    'missing_input_scale="max" (the largest of its fused partitions) or "dynamic" (computed at run time).'
}


def _usable(what: str, value: Tensor) -> Tensor:
    """Scales may each be one and have a product or a reciprocal that float32 does not hold."""
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ScaleError(
            f"{what} has no value in float32",
            name=what,
            expected="finite, > 0",
            found=value.tolist(),
            remedy="Export the checkpoint again: these global scales are beyond any weight or activation.",
        )
    return value
