"""With what experts are served."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...moe import ExpertRanks
from ...quantize.missing import Missing


@dataclass(frozen=True)
class ExpertChoice:
    """Attributes:
    runner: an MoE runner's name, or "auto".
    ranks: the part of this process. With more than one, results are added up over the default process group.
    missing_input_scale: what counts for experts without an input scale, see :class:`~aliasparam_nvfp4.NvFp4MoEMethod`.
    """

    runner: str = "auto"
    ranks: ExpertRanks = field(default_factory=ExpertRanks)
    missing_input_scale: Missing = "refuse"
