"""How many layers config.json asks for, held against what the files number, before a model is built layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import CheckpointError

#: Models of up to so many layers are built, and told what they lack tensor by tensor.
BUILT = 256
_KEYS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"})
_NUMBER = re.compile(r"\.(\d{1,18})\.")


def need_layers(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise CheckpointError for a config that asks for more than ``BUILT`` layers and more than the files can have.

    Args:
        config: config.json, with those of parts in it.
        names: of all tensors in the files.
        where: the folder, for messages.
    """
    wanted = max(_asked(config), default=(0, ""))
    if wanted[0] <= BUILT:
        return
    numbered = max((int(number) + 1 for name in names for number in _NUMBER.findall(name)), default=0)
    if wanted[0] > numbered:
        raise CheckpointError(
            "config.json asks for more layers than the files have; no model was built",
            name=where,
            expected=f"at most {max(numbered, BUILT)}, the highest number in a tensor's name",
            found=f"{wanted[1]} = {wanted[0]}",
            remedy="Take the config.json that was exported with these files.",
        )


def _asked(config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _asked(value)
        elif key in _KEYS and isinstance(value, int):
            yield int(value), key
