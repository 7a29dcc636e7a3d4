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
from typing import Literal, Protocol, get_args

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
#: "delta" is what :func:`aliasparam.reload.apply_delta` opens.
AnyPolicy = PolicyName | Literal["delta"]


class Policy(Protocol):
    """How one session writes."""

    def update(self, target: Target, box: Box, value: Tensor) -> None: ...

    def flush(self) -> None:
        """Write what was held. May be called again after a failure."""
        ...

    def restore(self) -> bool:
        """Bring the old weights back. False: this policy never does. Raises where it should and cannot."""
        ...

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        ...


class WriteThrough:
    """Written at once; nothing is kept."""

    nbytes = 0

    def __init__(self, written: Written) -> None:
        self._written = written

    def update(self, target: Target, box: Box, value: Tensor, *, non_blocking: bool = False) -> None:
        """``non_blocking``: the value stays as it is until the commit."""
        self._written.write(target, box, value, non_blocking=non_blocking)

    def flush(self) -> None:
        pass

    def begin(self, targets: list[Target]) -> None:
        self._written.begin(targets)

    def restore(self) -> bool:
        return not self._written.any


class Journalled(WriteThrough):
    """Written at once, after what it replaces was kept."""

    def __init__(self, written: Written) -> None:
        super().__init__(written)
        self.journal = Journal()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.journal.nbytes

    def begin(self, targets: list[Target]) -> None:
        for target in targets:
            self.journal.touch(target)
        super().begin(targets)

    def update(self, target: Target, box: Box, value: Tensor, *, non_blocking: bool = False) -> None:
        self.journal.keep(target, box, value)
        super().update(target, box, value, non_blocking=non_blocking)

    def restore(self) -> bool:
        if self._written.any:
            self.journal.restore()
        return True


class Staged:
    """Held on the host, pinned where it goes to a CUDA device; written in one pass by ``then``."""

    def __init__(self, then: WriteThrough) -> None:
        self._then = then
        self._held: list[tuple[Target, Box, Tensor]] = []

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for _, _, value in self._held) + self._then.nbytes

    def update(self, target: Target, box: Box, value: Tensor) -> None:
        held = torch.empty(value.shape, dtype=value.dtype, pin_memory=target.tensor.is_cuda)
        self._held.append((target, box, held.copy_(value.detach())))

    def flush(self) -> None:
        self._then.begin([target for target, _, _ in self._held])
        for target, box, value in self._held:
            self._then.update(target, box, value, non_blocking=True)

    def restore(self) -> bool:
        return self._then.restore()


class Patched:
    """Patches, old and new bytes, that the commit puts in place."""

    def __init__(self, written: Written) -> None:
        self._written, self.journal = written, Journal()
        self._held: list[tuple[Target, list[Patch], Live, int]] = []

    @property
    def nbytes(self) -> int:
        return sum(patch.nbytes for _, patches, _, _ in self._held for patch in patches)

    def add(self, targets: list[Target], patches: Callable[[list[Live]], list[list[Patch]]]) -> int:
        """Make and hold the patches of some tensors, which must not change from now on; the bytes of them."""
        lives = [Live(target.tensor) for target in targets]
        versions = [live.version for live in lives]
        found = zip(targets, patches(lives), lives, versions, strict=True)
        held = [(target, made, live, version) for target, made, live, version in found if made]
        self._held += held
        return sum(patch.nbytes for _, made, _, _ in held for patch in made)

    def update(self, target: Target, box: Box, value: Tensor) -> None:
        raise ReloadError("a delta takes no values", name=target.label, remedy="Open another reload for them.")

    def flush(self) -> None:
        if not self._written.any:
            for target, _, live, version in self._held:
                if live.version != version:
                    raise ReloadError("the tensor changed since the delta was checked against it", name=target.label)
        for target, _, _, _ in self._held:
            self.journal.touch(target)
        self._written.begin([target for target, _, _, _ in self._held])
        for target, patches, _, _ in self._held:
            self.journal.add(target, patches)
            for patch in patches:
                patch.put_new()

    def restore(self) -> bool:
        if self._written.any:
            self.journal.restore()
        return True


def policy_of(name: AnyPolicy, written: Written) -> Policy:
    """
    Raises:
        ReloadError: no such policy.
    """
    if name == "delta":
        return Patched(written)
    if name not in get_args(PolicyName):
        expected = ", ".join(get_args(PolicyName))
        raise ReloadError("unknown policy", expected=expected, found=repr(name), remedy="'write-through' is the default.")
    writer = Journalled(written) if name.endswith("journal") else WriteThrough(written)
    return Staged(writer) if name.startswith("staged") else writer
