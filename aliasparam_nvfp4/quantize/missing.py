"""What counts where a checkpoint has no usable input scale, and scales of activations that are computed at run time.

A scale is missing where the file has none, or 0, or no number, as exporters write for a layer or an expert that met no token in
calibration. Derivations give 0 for one which is to be computed at run time, so that a reload may bring a stored one, or take it
away, with no branch on the host: captured graphs stay right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ScaleError
from .format import E2M1_MAX, E4M3_MAX
from .global_scale import are_scales

#: "refuse" it; "max": the largest of the layer (its fused partitions, its experts); "dynamic": computed at run time for each
#: token, which depends on no other token of the batch; "dynamic-tensor": at run time, one for all tokens of a call.
Missing = Literal["refuse", "max", "dynamic", "dynamic-tensor"]


def need_policy(missing: str) -> None:
    """Raise ScaleError for a policy that there is not."""
    if missing not in get_args(Missing):
        names = ", ".join(get_args(Missing))
        raise ScaleError("unknown policy for missing input scales", expected=f"one of {names}", found=repr(missing))


def is_dynamic(missing: Missing) -> bool:
    """Whether missing scales are computed at run time."""
    return missing.startswith("dynamic")


def completed(scales: Tensor, missing: Missing, *, reciprocal: bool) -> Tensor:
    """Stored input scales with what counts for missing ones: the largest of the others, or all 0 where they are dynamic."""
    good = are_scales(scales)
    if missing == "refuse" or bool(good.all()):
        return scales
    if is_dynamic(missing):
        return torch.zeros_like(scales)
    if not bool(good.any()):
        return scales
    largest = scales[good].min() if reciprocal else scales[good].max()
    return torch.where(good, scales, largest)


@dataclass(frozen=True)
class RunTimeScales:
    """Scales of activations ``[rows, K]`` from the activations themselves, so that the largest block scale is 448.

    Attributes:
        whole: one scale for all rows of a call, instead of one for each row.
    """

    whole: bool = False

    @classmethod
    def of(cls, missing: Missing) -> RunTimeScales | None:
        return cls(missing == "dynamic-tensor") if is_dynamic(missing) else None

    def inverse(self, x: Tensor, stored: Tensor | None) -> Tensor:
        """What the quantizer multiplies with, f32 ``[rows, 1]`` or ``[1, 1]``: ``stored`` (``[1]``) where it is not 0."""
        largest = x.detach().abs().amax() if self.whole else x.detach().abs().amax(-1, keepdim=True)
        own = E2M1_MAX * E4M3_MAX / largest.float().reshape(-1, 1).clamp(min=_LEAST)
        return own if stored is None else torch.where(stored > 0, stored, own)


#: A row of zeros has zero codes whatever its scale; this one has a finite inverse.
_LEAST = 1e-30
