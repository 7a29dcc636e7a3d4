"""Input scales in W4A16 folders: some exporters leave them, no kernel reads them, and engines' loaders want a place for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def pass_over(layer: nn.Module, *names: str) -> None:
    """Give ``layer`` a parameter of each name whose loader takes anything and keeps nothing."""
    for name in names:
        parameter: Any = nn.Parameter(torch.zeros(1), requires_grad=False)
        parameter.weight_loader, parameter.aliasparam_passed_over = _keep_nothing, True
        layer.register_parameter(name, parameter)


def is_passed_over(parameter: Any) -> bool:
    return hasattr(parameter, "aliasparam_passed_over")


def _keep_nothing(*args: Any, **kwargs: Any) -> bool:
    """Of every loader's calling convention; True: it is done."""
    return True
