"""Where faces are listed, and the small words they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Gets the layer and returns what can be compared (a tensor), or None. What it writes is compared afterwards.
Face = Callable[[nn.Module], Any]

#: Group to title to face.
FACES: dict[str, dict[str, Face]] = {}
#: Group to the kind of layer it is done to, see layers.py.
KINDS: dict[str, str] = {}
#: Done to the ready layer, before the state is made.
PREPARED: dict[str, Face] = {}
#: Faces whose refusal leaves nothing loaded, because that is what was asked for, or because the bytes are not known any more.
INVALIDATES: set[str] = set()
#: Faces that go past everything the library can see: neither right nor refused. The docs name them.
UNSEEN: set[str] = set()

W = "weight"


def titled(name: str, faces: dict[str, Face], *, layer: str = "linear") -> None:
    FACES.setdefault(name, {}).update(faces)
    KINDS[name] = layer


def weight(layer: nn.Module) -> Any:
    return getattr(layer, W)


def kernel(layer: nn.Module) -> Tensor:
    """The kernel name; of the plain layer, the values it should have."""
    return layer.prepare()  # type: ignore[no-any-return, operator]


def other(like: Tensor, value: int = 9) -> Tensor:
    """New values for a tensor like this one."""
    count = torch.arange(like.shape[-1], device=like.device)
    return (torch.full(like.shape, value, device=like.device) + count).to(like.dtype)


def on(do: Callable[[Any], Any]) -> Face:
    return lambda layer: do(weight(layer))


def unary(do: Callable[[Any], Any]) -> Face:
    """A write: does it, returns nothing."""

    def face(layer: nn.Module) -> None:
        do(weight(layer))

    return face


def flat(*tensors: Tensor) -> Tensor:
    """Several results as one, for comparison."""
    return torch.cat([t.cpu().reshape(-1).double() for t in tensors])


def each_refuses(*faces: Callable[[Any], Any]) -> Face:
    """Every one of them must refuse; the last refusal counts."""

    def face(layer: nn.Module) -> None:
        refusal: Exception | None = None
        for do in faces:
            try:
                do(weight(layer))
            except Exception as error:
                refusal = error
            else:
                raise AssertionError(f"{do} did not refuse")
        if refusal is not None:
            raise refusal

    return face
