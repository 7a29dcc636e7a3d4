"""What a global scale may be: the one check of linear layers, experts, folders and the command line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aliasparam.host import HOST

from ..errors import ScaleError

EXPECTED = "finite, > 0, and so its reciprocal"


def are_scales(values: Tensor) -> Tensor:
    """bool: which values are finite and positive in float32, as their reciprocals are."""
    return torch.isfinite(values) & (values > 0) & torch.isfinite(1 / values)


def need_stored_scales(stored: Mapping[str, Tensor | float], module: str | None = None) -> None:
    """Raise ScaleError with the names, as the files have them, of those that are not finite and positive."""
    values = {n: v if isinstance(v, Tensor) else torch.tensor(v, device=HOST) for n, v in stored.items()}
    bad = {name: stored[name] for name, value in values.items() if not bool(are_scales(value.float()).all())}
    if bad:
        raise ScaleError("a global scale is not a scale", module=module, expected=EXPECTED, found=bad)
