"""Bulk loads: for the time of one load every checkpoint name is a plain tensor, at a plain tensor's cost.

[Note: what a bulk load trusts] Writes to plain tensors are not seen. So at the end everything counts as loaded, as it does in
an engine without this library; which tensors arrived is the loader's business (or :func:`aliasparam.reload`'s, which counts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ._parameter import loader_attributes, plain_class
from ._planning import Binding
from ._reconcile import reconcile
from ._registry import AliasRegistry, registries
from ._storage import AliasedStorage, Write
from ._watch import put


@contextmanager
def bulk_load(model: nn.Module) -> Iterator[None]:
    """Inside the block the declared names of ``model`` are plain Parameters over the same memory, in checkpoint format.

    They are of the engine's Parameter class and have its loader attributes, so its loaders run unchanged and undisturbed.
    Fetch parameters inside the block: an AliasedParameter from before it refuses to be used until the block ends.

    On leaving, the library's names are back and everything counts as loaded (see [Note: what a bulk load trusts]); call
    :func:`aliasparam.process` next. If the block raises, every declared tensor is invalid until it is loaded whole.

    Raises:
        StateError: a tensor is exposed to another writer, or is in a bulk load already.
    """
    found = [registry for _, registry in registries(model)]
    with torch.no_grad():
        for registry in found:
            reconcile(registry)
    opened = _open(list(_storages(found)))
    plain: list[tuple[Binding, Tensor]] = []
    try:
        plain = [(b, _show_plain(b)) for r in found for s in r.sources.values() for b in s.bindings]
        yield
    except BaseException:
        _close(found, opened, plain, failed=True)
        raise
    _close(found, opened, plain, failed=False)


def _open(storages: list[AliasedStorage]) -> list[AliasedStorage]:
    """Expose all, or none: a refusal leaves every one as it was."""
    opened: list[tuple[AliasedStorage, Write]] = []
    try:
        with torch.no_grad():
            for storage in storages:
                storage.need_unexposed("open a bulk load")
            for storage in storages:
                with storage.lock:
                    opened.append((storage, storage.expose(storage.checkpoint, "a bulk load")))
    except BaseException:
        for storage, write in opened:
            with storage.lock, torch.no_grad():
                storage.cancel_exposure(write)
        raise
    return storages


def _show_plain(binding: Binding) -> Tensor:
    parameter = binding.parameter
    cls = plain_class(type(parameter))
    tensor: Tensor = torch.Tensor._make_subclass(cls, parameter._alias_memory, False)
    tensor.__dict__.update(loader_attributes(parameter))
    put(binding.module, binding.name, tensor)
    return tensor


def _close(
    registries: list[AliasRegistry], storages: list[AliasedStorage], plain: list[tuple[Binding, Tensor]], *, failed: bool
) -> None:
    for storage in storages:
        with storage.lock:
            storage.close_exposure([] if failed else [storage.checkpoint], failed=[storage.checkpoint] if failed else [])
    for binding, tensor in plain:
        if binding.module._parameters.get(binding.name) is tensor:
            binding.parameter.__dict__.update(loader_attributes(tensor))
            put(binding.module, binding.name, binding.parameter)
    for registry in registries:
        registry.suspect()  # a loader may have put tensors of its own there: the next verb takes them in


def _storages(registries: list[AliasRegistry]) -> Iterator[AliasedStorage]:
    seen: set[int] = set()
    for registry in registries:
        for source in registry.sources.values():
            if source.storage is not None and id(source.storage) not in seen:
                seen.add(id(source.storage))
                yield source.storage
