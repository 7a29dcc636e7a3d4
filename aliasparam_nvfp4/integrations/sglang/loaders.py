"""A model's own ``load_weights`` inside a session. A loader that does not find a tensor's name says so in the log and goes on: so
what it wrote is counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aliasparam import AliasedParameter
from aliasparam.errors import ReloadError
from aliasparam.reload import ReloadSession
from aliasparam.reload.loading import Write, stand_ins
from aliasparam.reload.targets import find_targets
from aliasparam.storage.coverage import Box
from aliasparam.storage.states import State

from .served import checked, served


@contextmanager
def checked_loading(model: Any, session: ReloadSession, *, whole: bool) -> Iterator[tuple[set[str], set[str]]]:
    """While open, ``model.load_weights`` checks what it is given, and writes through the session. Gives the names that came, and
    those of the model's tensors that were written."""
    known, seen, written, load = served(model).tensors, set[str](), set[str](), model.load_weights

    def write(name: str, box: Box, value: Tensor) -> None:
        written.add(name)
        session.update(name, value, box=box)

    model.load_weights = lambda weights, *args, **kwargs: load(checked(weights, known, seen, whole=whole), *args, **kwargs)
    try:
        with written_to(model, write):
            yield seen, written
    finally:
        del model.load_weights


@contextmanager
def written_to(model: Any, write: Write) -> Iterator[None]:
    """While open, what the model's loaders write comes to ``write``. Around layers that LoRA has wrapped loaders look for names
    without the wrapper, and SGLang's find none."""
    named = model.named_parameters
    model.named_parameters = lambda *args, **kwargs: ((n.replace(".base_layer", ""), p) for n, p in named(*args, **kwargs))
    try:
        with stand_ins(find_targets(model), write):
            yield
    finally:
        del model.named_parameters


def loaded_before(session: ReloadSession) -> list[str]:
    """Tensors of our layers that have been loaded."""
    ours = ((name, tensor._alias_storage) for name, tensor in session.tensors.items() if isinstance(tensor, AliasedParameter))
    return [name for name, storage in ours if storage.state is not State.EMPTY]


def need_all(wanted: Sequence[str], seen: Collection[str]) -> None:
    """
    Raises:
        ReloadError: some are missing.
    """
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise ReloadError("tensors are missing", name=", ".join(missing[:5]), found=f"{len(missing)} of {len(wanted)} missing")
