"""What is looked at before an MoE layer is processed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import AliasRegistry, State

from ..errors import ScaleError

#: Bytes looked at in one step; results and temporaries stay within it.
_STEP = 4 << 20


@dataclass(frozen=True)
class FiniteBlockScales:
    """Refuses NaN among the block scales that were written since the last processing. Experts in kernel format passed before.

    Attributes:
        names: checkpoint names of e4m3 ``[E, R, C]``; every expert is a region.
        first_expert: global number of this rank's first expert.
    """

    names: tuple[str, ...]
    first_expert: int

    def __call__(self, registry: AliasRegistry) -> None:
        """Raises ScaleError with tensor and expert; nothing is converted then."""
        for name in self.names:
            storage = registry.sources[name].storage
            if storage is None:
                raise AssertionError(f"{name}: checked before it has memory")
            written = [e for e, state in enumerate(storage.states) if state is not State.KERNEL]
            bad = _first_nan(storage.checkpoint.view(torch.uint8), written)
            if bad is not None:
                raise ScaleError(
                    "block scales are NaN",
                    module=registry.label,
                    name=f"{name}, expert {self.first_expert + bad}",
                    expected="finite e4m3 values",
                    found="NaN, as ModelOpt writes for an expert of zeros",
                    remedy="Store zeros instead, and 1.0 as its weight global scale: it then gives zeros.",
                )


def _first_nan(scales: Tensor, experts: list[int]) -> int | None:
    """The first of ``experts`` with a NaN in its bytes ``[R, C]``. One transfer from the device, whatever their number."""
    if not experts:
        return None
    step = max(1, _STEP // (2 * max(scales[0].numel(), 1)))
    runs = [experts[k : k + step] for k in range(0, len(experts), step)]
    worst = torch.cat([(scales[run[0] : run[-1] + 1] & 0x7F).amax(-1).amax(-1) for run in _unbroken(runs)])
    found = (worst == 0x7F).nonzero().flatten().tolist()
    return experts[found[0]] if found else None


def _unbroken(runs: list[list[int]]) -> list[list[int]]:
    """Runs of consecutive numbers: each can be taken as one slice."""
    found: list[list[int]] = []
    for run in runs:
        for k, expert in enumerate(run):
            if k and expert == run[k - 1] + 1:
                found[-1].append(expert)
            else:
                found.append([expert])
    return found
