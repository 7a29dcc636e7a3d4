"""Plain parameters beside declared ones on a layer, a bias: held until the commit, because layerwise reload leaves the layer
out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from aliasparam import AliasedParameter

from .layerwise import owned


class Beside:
    """One such parameter. From its making until :meth:`close` its loader holds what comes.

    Attributes:
        begun: whether something came.
    """

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        self._had = "weight_loader" in parameter.__dict__
        self._loader = getattr(parameter, "weight_loader", default_weight_loader)
        self._signature = inspect.signature(self._loader)
        self._held: list[inspect.BoundArguments] = []
        parameter.weight_loader = self._hold

    @property
    def begun(self) -> bool:
        return bool(self._held)

    def _hold(self, *args: Any, **kwargs: Any) -> None:
        bound = self._signature.bind(*args, **kwargs)
        bound.arguments.update(owned(bound.arguments, on_host=False))
        self._held.append(bound)

    def values(self) -> Tensor | None:
        """What came, loaded as it would have been; None where elements are missing."""
        scratch: Any = torch.full_like(self.parameter.data, torch.nan)
        scratch.__class__, scratch.__dict__ = self.parameter.__class__, self.parameter.__dict__.copy()
        for bound in self._held:
            bound.arguments["param"] = scratch
            self._loader(*bound.args, **bound.kwargs)
        values: Tensor = scratch.data
        return None if bool(values.isnan().any()) else values

    def close(self) -> None:
        if self._had:
            self.parameter.weight_loader = self._loader
        else:
            self.parameter.__dict__.pop("weight_loader", None)


def plain_beside(declared: dict[str, nn.Module], others: list[nn.Module]) -> dict[str, Beside]:
    """By name, the parameters of declared layers that are not declared, and that no other layer loads (a router's bias)."""
    elsewhere = {id(p) for module in others for p in module._parameters.values()}
    return {
        f"{path}.{name}": Beside(parameter)
        for path, module in declared.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and not isinstance(parameter, AliasedParameter) and parameter.is_floating_point()
        if name not in SKIP_LOAD_TENSORS and id(parameter) not in elsewhere
    }
