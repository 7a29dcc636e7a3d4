"""The live tensors of a model by their checkpoint names: what a reload writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .plain import live_of


class Target(NamedTuple):
    """One live tensor.

    Attributes:
        tensor: a declared name, or a plain parameter or buffer.
        places: (module's dict of parameters or buffers, name) of every place that shows it.
        label: its first name.
    """

    tensor: Tensor
    places: list[tuple[dict[str, Any], str]]
    label: str


def find_targets(model: nn.Module) -> dict[str, Target]:
    """Parameters and persistent buffers by the name that the state dict gives them; of tied ones the first. What hooks or extra
    state add to a state dict is made for saving: a write into it would be lost. So a hook may rename, and nothing more."""
    called = {id(t): name for name, t in reversed(model.state_dict(keep_vars=True).items())}
    found: dict[str, Target] = {}
    seen: dict[int, Target] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        buffers = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for holder, names in ((module._parameters, list(module._parameters)), (module._buffers, buffers)):
            for name in names:
                shown = holder[name]
                if shown is None:
                    continue
                live = live_of(shown)
                known = seen.get(id(live))
                if known is not None:
                    known.places.append((holder, name))
                else:
                    label = called.get(id(shown)) or prefix + name
                    found[label] = seen[id(live)] = Target(live, [(holder, name)], label)
    return found


def in_scope(targets: Mapping[str, Target], scope: str | Iterable[str], begun: Mapping[int, object]) -> dict[str, Target]:
    """The targets that must arrive whole."""
    if scope == "all":
        return dict(targets)
    if scope == "partial":
        return {n: t for n, t in targets.items() if id(t.tensor) in begun}
    prefixes = tuple(scope)
    return {n: t for n, t in targets.items() if is_under(n, prefixes)}


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether one of the dotted prefixes is of this name."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
