"""What each model of this process was loaded from: names, shapes and dtypes of the checkpoint's tensors, and a version."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import TensorSpec
from aliasparam.errors import ReloadError

from ..folder import same
from ..hooking import say_what_serves

_logger = logging.getLogger(__name__)


@dataclass
class Served:
    """
    Attributes:
        tensors: as the first load brought them; empty where a loader went another way.
        base: version of the folder that was loaded last; 0 where it is none of a trainer's.
        version: what serves: that, and the deltas that were applied since.
    """

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    base: int = 0
    version: int = 0


_served: weakref.WeakKeyDictionary[nn.Module, Served] = weakref.WeakKeyDictionary()


def served(model: nn.Module) -> Served:
    return _served.setdefault(model, Served())


def record(original: Any, model: nn.Module, weights: Iterable[tuple[str, Tensor]], target_device: torch.device) -> None:
    """AROUND ``DefaultModelLoader.load_weights_only`` (``sglang/srt/model_loader/loader.py``, 0.5.23): notes the first load."""
    known = served(model).tensors
    if known:
        original(model, weights, target_device)
        return
    seen: dict[str, TensorSpec] = {}
    original(model, _noted(weights, seen), target_device)
    known.update(seen)
    say_what_serves(model, _logger)


def _noted(weights: Iterable[tuple[str, Tensor]], seen: dict[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        seen[name] = TensorSpec.of(tensor)
        yield name, tensor


def checked(
    weights: Iterable[tuple[str, Tensor]], known: Mapping[str, TensorSpec], seen: set[str], *, whole: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, each held against the first load before a loader sees it: some loaders cut what is too long, and fill
    what is too short with zeros.

    Args:
        weights: incoming.
        known: of the first load; nothing is checked where it is empty.
        seen: gets the names.
        whole: whether other names are refused; senders may put several tensors of the checkpoint in one of their own.

    Raises:
        ReloadError: another shape or dtype than the checkpoint's, or a name that it did not have.
    """
    for name, tensor in weights:
        wanted, found = known.get(name), TensorSpec.of(tensor)
        if wanted is None and known and whole:
            raise ReloadError("the checkpoint that was loaded first had no such tensor", name=name, found=found)
        if wanted is not None and not same(found, wanted):
            raise ReloadError("the tensor is not as the checkpoint has it", name=name, expected=wanted, found=found)
        seen.add(name)
        yield name, tensor
