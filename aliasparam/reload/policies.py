"""What a session does with a new value: write it, write it and keep the old one, or hold it until the commit.

| policy | from the first value to the commit | host memory | an abort leaves |
|---|---|---|---|
| write-through | what was written refuses | none | a refusal |
| journal | what was written refuses | old bytes that changed: 5 for each, at most all | the old weights |
| staged | the old weights serve | the new values | the old weights; in the pass of the commit, a refusal |
| staged-journal | the old weights serve, and are kept meanwhile | the sum of both | the old weights |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from ..errors import ReloadError
from ..storage.coverage import Box
from ..tensors.faces import _Aliased
from .journal import Journal
from .live import Live
from .patch import Patch, patched
from .staged import StagedValues
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
        self._staged = StagedValues()
        self._patches: list[tuple[Target, Patch]] = []

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._staged.nbytes + (0 if self._journal is None else self._journal.nbytes)

    def update(self, target: Target, box: Box, value: Tensor) -> None:
        """Write a value, or hold it."""
        if self._name == "delta":
            raise ReloadError("a delta takes no values", name=target.label, remedy="Open another reload for them.")
        if self._name.startswith("staged"):
            if self._journal is not None:
                self._journal.keep_ahead(target, box, value)
            self._staged.add(target, box, value)
        else:
            self._write(target, box, value, again=False)

    def watch(self, target: Target) -> Live:
        """What patches are made of; it must not change from now on."""
        self._delta(target).touch(target)
        return Live(target.tensor)

    def hold(self, target: Target, live: Live, patches: list[Patch]) -> None:
        """Write the patches of ``live``, the tensor or a part of it, at the commit."""
        self._delta(target).hold(target, patches)
        self._patches += [(target, patch) for patch in patches]
        if target.shares_memory:
            self._written.give(target, live, patched(live, patches))

    def _delta(self, target: Target) -> Journal:
        if self._name != "delta" or self._journal is None:
            raise ReloadError("only a delta's session takes patches", name=target.label)
        return self._journal

    def flush(self) -> None:
        """Write what was held, in one pass. May be called again after a failure."""
        targets = {target.label: target for target in (*self._staged.targets, *(target for target, _ in self._patches))}.values()
        if self._journal is not None:
            if self._name == "delta":
                self._journal.need_unchanged()
            for target in targets:
                self._journal.touch(target)
        self._written.begin(targets)
        if self._journal is not None and self._name != "delta":
            self._journal.look_again()
        for staged in self._staged:
            self._write(*staged, again=True)
        for target, patch in self._patches:
            self._doing(target, patch.put_new)
        self._written.need_agreement()

    def restore(self) -> bool:
        """Bring the old weights back. False: this policy never does. Raises where it should and cannot."""
        if self._written.any and self._journal is not None:
            self._journal.restore()
        return not self._written.any or self._journal is not None

    def _write(self, target: Target, box: Box, value: Tensor, *, again: bool) -> None:
        """``again``: perhaps this very value was written before, by a commit that failed."""
        if self._journal is not None:
            if isinstance(value, _Aliased):  # the lock of its storage may not come second
                value = value._snapshot()
            self._journal.keep(target, box, value, again=again)
        if not again:  # a commit has begun them all
            self._written.begin([target])  # which may wait, under no lock
        self._doing(target, partial(self._written.write, target, box, value))

    def _doing(self, target: Target, write: Callable[[], object]) -> None:
        if self._journal is None:
            write()
        else:
            self._journal.write(target, write)
