"""What a session does with a new value: write it, write it and keep the old one, or hold it until the commit.

| policy | from the first value to the commit | host memory | an abort leaves |
|---|---|---|---|
| write-through | what was written refuses | none | a refusal |
| journal | what was written refuses | old bytes that changed: 5 for each, at most all | the old weights |
| staged | the old weights serve | the new values | the old weights; in the pass of the commit, a refusal |
| staged-journal | the old weights serve | the sum of both | the old weights |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ReloadError
from ..storage.coverage import Box
from .journal import Journal
from .live import Live
from .patch import Patch
from .targets import Target
from .written import Written

PolicyName = Literal["write-through", "journal", "staged", "staged-journal"]
#: "delta" is what :func:`aliasparam.reload.apply_delta` opens: patches, old bytes and new, wait on the host.
AnyPolicy = PolicyName | Literal["delta"]


class Policy:
    """How one session writes.

    Raises:
        ReloadError: no such policy.
    """

    def __init__(self, name: AnyPolicy, written: Written) -> None:
        if name not in (*get_args(PolicyName), "delta"):
            expected = ", ".join(get_args(PolicyName))
            raise ReloadError("unknown policy", expected=expected, found=repr(name), remedy="'write-through' is the default.")
        self._name, self._written = name, written
        self._journal = Journal() if name.endswith("journal") or name == "delta" else None
        self._held: list[tuple[Target, Box, Tensor]] = []
        self._patched: list[tuple[Target, list[Patch], Live, int]] = []  # the version that the patches were made of

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        patches = self._patches or ([] if self._journal is None else self._journal.patches)
        return sum(value.nbytes for _, _, value in self._held) + sum(patch.nbytes for patch in patches)

    @property
    def _patches(self) -> list[Patch]:
        return [patch for _, made, _, _ in self._patched for patch in made]

    def update(self, target: Target, box: Box, value: Tensor) -> None:
        """Write a value, or hold it, pinned where it goes to a CUDA device."""
        if self._name == "delta":
            raise ReloadError("a delta takes no values", name=target.label, remedy="Open another reload for them.")
        if not self._name.startswith("staged"):
            self._write(target, box, value)
            return
        held = torch.empty(value.shape, dtype=value.dtype, pin_memory=target.tensor.is_cuda)
        self._held.append((target, box, held.copy_(value.detach())))

    def patch(self, targets: list[Target], patches: Callable[[list[Live]], list[list[Patch]]]) -> int:
        """Make and hold the patches of some tensors, which must not change from now on; the bytes of them."""
        if self._name != "delta":
            raise ReloadError("only a delta's session takes patches", name=", ".join(target.label for target in targets))
        lives = [Live(target.tensor) for target in targets]
        versions = [live.version for live in lives]
        made = [one for one in zip(targets, patches(lives), lives, versions, strict=True) if one[1]]
        self._patched += made
        return sum(patch.nbytes for _, found, _, _ in made for patch in found)

    def flush(self) -> None:
        """Write what was held, in one pass. May be called again after a failure."""
        for target, _, live, version in self._patched if not self._written.any else ():
            if live.version != version:
                raise ReloadError("the tensor changed since the delta was checked against it", name=target.label)
        targets = [*(target for target, _, _ in self._held), *(target for target, *_ in self._patched)]
        if self._journal is not None:
            for target in targets:
                self._journal.touch(target)
            self._journal.patches += self._patches if not self._written.any else ()
        self._written.begin(targets)
        for target, box, value in self._held:
            self._write(target, box, value, non_blocking=True)
        for patch in self._patches:
            patch.put_new()

    def restore(self) -> bool:
        """Bring the old weights back. False: this policy never does. Raises where it should and cannot."""
        if self._written.any and self._journal is not None:
            self._journal.restore()
        return not self._written.any or self._journal is not None

    def _write(self, target: Target, box: Box, value: Tensor, *, non_blocking: bool = False) -> None:
        """``non_blocking``: the value stays as it is until the commit."""
        if self._journal is not None:
            self._journal.keep(target, box, value)
        self._written.write(target, box, value, non_blocking=non_blocking)
