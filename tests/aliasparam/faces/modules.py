"""What is done to a module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from .forwards import forward
from .titled import INVALIDATES, W, on, other, titled, unary, weight

# -- modules -------------------------------------------------------------------------------------------------------------


def state_dict(layer: nn.Module) -> Tensor:
    return layer.state_dict()[W] + 0


def through_a_file(value: Any, **kwargs: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


def load(layer: nn.Module, value: Tensor, **kwargs: Any) -> None:
    layer.load_state_dict({W: value}, **kwargs)


def stay(layer: nn.Module) -> None:
    layer.to(weight(layer).device)
    if weight(layer).device.type == "cpu":
        layer.cpu()


def functional_call(layer: nn.Module) -> Tensor:
    return torch.func.functional_call(layer, {W: other(weight(layer))}, (torch.ones(1, device=weight(layer).device),))


def replace(layer: nn.Module) -> Tensor:
    """setattr of another Parameter, then the forward without any verb."""
    layer.weight = nn.Parameter(other(weight(layer)), requires_grad=False)
    return forward(layer)


titled(
    "modules",
    {
        "`state_dict` values": state_dict,
        "`named_parameters` counts it once": lambda layer: torch.tensor(
            [len(list(layer.named_parameters())), len(layer.state_dict())]
        ),
        "`load_state_dict`": lambda layer: load(layer, other(weight(layer))),
        "`load_state_dict(assign=True)`": lambda layer: load(layer, other(weight(layer)), assign=True),
        "`load_state_dict(strict=False)` without it": lambda layer: layer.load_state_dict({}, strict=False) and None,
        "`load_state_dict` from another dtype": lambda layer: load(layer, other(weight(layer)).float()),
        "`load_state_dict` of another shape": lambda layer: load(layer, other(weight(layer))[:3]),
        "`torch.save` of the state dict": lambda layer: through_a_file(layer.state_dict(), weights_only=True)[W],
        "`torch.save` of the module": lambda layer: through_a_file(layer, weights_only=False).weight + 0,
        "`copy.deepcopy` of the name": on(lambda w: copy.deepcopy(w) + 0),
        "`copy.deepcopy` of the module": lambda layer: copy.deepcopy(layer).weight + 0,
        "`pickle` of the name": on(lambda w: pickle.loads(pickle.dumps(w)) + 0),
        "`nn.Parameter(name)`": on(lambda w: nn.Parameter(w, requires_grad=False) + 0),
        "`.data = .data.half()` (what `Module.half` does to floats)": unary(lambda w: setattr(w, "data", w.data.half())),
        "`Module.to(device)` and `cpu` where it is": lambda layer: stay(layer),
        '`Module.to("meta")`, then the forward': lambda layer: forward(layer.to("meta")),
        "`Module.to_empty`, then the forward": lambda layer: forward(layer.to_empty(device=weight(layer).device)),
        "`requires_grad_`": unary(lambda w: w.requires_grad_()),
        "`functional_call` with another weight": functional_call,
        "`setattr` of another Parameter, then the forward": replace,
    },
)


INVALIDATES.add("`Module.to_empty`, then the forward")
