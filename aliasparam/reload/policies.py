"""What a session does with a new value: write it, write it and keep the old one, or hold it until the commit; and what becomes of
what was written. Apart from the session, so that an abandoned one can still be ended.

| policy | from the first value to the commit | host memory | an abort leaves |
|---|---|---|---|
| write-through | what was written refuses | none | a refusal |
| journal | what was written refuses | old bytes that changed: 5 for each, at most all | the old weights |
| staged | the old weights serve | the new values | the old weights; in the pass of the commit, a refusal |
| staged-journal | the old weights serve, and are kept meanwhile | the sum of both | the old weights |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from ..errors import ReloadError
from ..module.names import ModuleNames
from ..storage.coverage import Box
from ..tensors.faces import _Aliased
from ..torch_private import writing
from .digest import Hashed
from .drain import Drain
from .journal import Journal
from .live import Live, part_of
from .live_digest import add_pieces
from .patch import Patch, patched
from .staged import StagedValues
from .targets import PlainName, Target

PolicyName = Literal["write-through", "journal", "staged", "staged-journal"]
#: "delta" is what :func:`aliasparam.reload.apply_delta` opens: patches, old bytes and new, wait on the host.
AnyPolicy = PolicyName | Literal["delta"]

_FAILED = "a reload failed after it had written this tensor"


class Policy:
    """How one session writes, and the tensors that it has begun: declared names, and plain ones behind their refusing twins.

    Raises:
        ReloadError: no such policy.
    """

    def __init__(self, name: AnyPolicy, label: str, drain: Drain) -> None:
        if name not in (*get_args(PolicyName), "delta"):
            expected = ", ".join(get_args(PolicyName))
            raise ReloadError("unknown policy", expected=expected, found=repr(name), remedy="'write-through' is the default.")
        self._name, self._label, self._drain = name, label, drain
        self._journal = Journal() if name.endswith("journal") or name == "delta" else None
        self._staged = StagedValues()
        self._begun: dict[int, tuple[Target, PlainName | None]] = {}  # a plain one with its twin
        #: What tensors that share memory, or parts of them, are to hold at the end: the SHA-256 (hex) of the bytes.
        self._given: list[tuple[Target, Live, str]] = []

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._staged.nbytes + (0 if self._journal is None else self._journal.nbytes)

    def update(self, target: Target, box: Box, value: Tensor) -> None:
        """Write a value, or hold it."""
        if self._name == "delta":
            raise ReloadError("a delta takes no values", name=target.label, remedy="Open another reload for them.")
        if not self._name.startswith("staged"):
            if self._journal is not None:
                if isinstance(value, _Aliased):  # the lock of its storage may not come second
                    value = value._snapshot()
                self._journal.touch(target).keep(target, box, value)
            self._begin([target])  # which may wait, under no lock
            self._doing(target, partial(self.write, target, box, value))
            return
        if self._journal is not None and target.storage is not None:  # a plain tensor may change unseen: not yet
            memory = self._journal.touch(target)
            memory.keep(target, box, value)
            memory.ahead = True
        self._staged.add(target, box, value)

    def watch(self, target: Target) -> Live:
        """What patches are made of; it must not change from now on."""
        self._delta(target).touch(target)
        return Live(target.tensor)

    def hold(self, target: Target, live: Live, patches: list[Patch]) -> None:
        """Write the patches of ``live``, the tensor or a part of it, at the commit."""
        self._delta(target).touch(target).patches.extend(patches)
        if target.shares_memory:
            self._give(target, live, patched(live, patches))

    def _delta(self, target: Target) -> Journal:
        if self._name != "delta" or self._journal is None:
            raise ReloadError("only a delta's session takes patches", name=target.label)
        return self._journal

    def flush(self) -> None:
        """Write what was held, in one pass. May be called again after a failure."""
        if self._name == "delta" and self._journal is not None:
            memories = self._journal.need_unchanged()
            self._begin(memory.target for memory in memories)
            for memory in memories:
                memory.put_new()
        else:
            self._flush_values()
        self._need_agreement()

    def _flush_values(self) -> None:
        targets = {target.label: target for target in self._staged.targets}.values()
        if self._journal is not None:
            for target in targets:
                self._journal.touch(target)
        self._begin(targets)
        if self._journal is not None:
            self._journal.look_again()
        for target, box, value in self._staged:
            if self._journal is not None and not (memory := self._journal.touch(target)).ahead:
                memory.keep(target, box, value)
            self._doing(target, partial(self.write, target, box, value))

    def restore(self) -> bool:
        """Let the old weights serve again. False: this policy has none. Raises where it should and cannot."""
        if self.wrote:
            if self._journal is None:
                return False
            self._journal.restore()
            self.commit(whole=False)
            self.end()
        return True

    def _doing(self, target: Target, write: Callable[[], object]) -> None:
        if self._journal is None:
            write()
        else:
            self._journal.touch(target).write(write)

    # -- what was begun ---------------------------------------------------------------------------------------------------

    @property
    def wrote(self) -> bool:
        """Whether a tensor was begun."""
        return bool(self._begun)

    def write(self, target: Target, box: Box, value: Tensor) -> None:
        """Write ``value`` in place, as ``copy_`` does, into a tensor that was begun."""
        part = part_of(target.tensor, box)
        with writing(target.tensor):
            part.copy_(value)
        if target.shares_memory:
            self._give(target, Live(part), Live(value))

    def _give(self, target: Target, part: Live, value: Live) -> None:
        """``part`` of a tensor that shares memory must hold these bytes at the end, whatever the others are given."""
        self._given.append((target, part, _sha256(value)))

    def _need_agreement(self) -> None:
        """
        Raises:
            ReloadError: tensors that share memory were given bytes that differ.
        """
        for target, part, digest in self._given:
            others = {one.label for one, _, _ in self._given if one in target.together and one is not target}
            if others and _sha256(part) != digest:
                raise ReloadError(
                    "it shares memory with tensors that were given other values",
                    module=self._label,
                    name=target.label,
                    expected="values that agree where they are in one memory",
                    found="others for " + ", ".join(sorted(others)),
                    remedy="Send one of them alone, or untie them in the model.",
                )

    def _begin(self, targets: Iterable[Target]) -> None:
        """The tensors are about to be written: they refuse from now on, and nobody reads them any more.

        Raises:
            ReloadError: a forward that began before did not end in time. They serve on.
        """
        new = [t for target in targets for t in target.together if id(t.tensor) not in self._begun]
        begun = {id(t.tensor): (t, None if t.storage is not None else PlainName(t.label, t.tensor)) for t in new}
        if not begun:
            return
        names = {id(one): one for t in new if t.storage is not None for one in t.storage.listeners}
        registries = [one for one in names.values() if isinstance(one, ModuleNames)]
        twins = [(holder, key, twin.refusing) for t, twin in begun.values() if twin is not None for holder, key in t.places]
        try:
            self._begun |= begun  # before, as an interrupt may come when twins are in their places
            if twins or not all(self._drain.holds(one) for one in registries):
                self._drain.close(registries, twins)
        except BaseException:
            for key in begun:
                self._begun.pop(key, None)
            raise

    def reopen(self) -> None:
        """What was processed refuses again, with its new weights in place."""
        for target, _ in self._begun.values():
            if target.storage is not None:
                with target.storage.lock:
                    target.storage.tell()

    def commit(self, *, whole: bool) -> None:
        """Everything that was written may be read. ``whole``: what an earlier reload left refusing was written too."""
        for target, twin in self._begun.values():
            for holder, key in target.places:
                if twin is not None and (whole or holder.get(key) is twin.refusing):
                    dict.__setitem__(holder, key, target.tensor)

    def poison(self) -> None:
        """What was written is of no generation: it refuses until it is loaded whole. Plain twins stay where they are."""
        for target, _ in self._begun.values():
            if target.storage is not None:
                target.storage.invalidate(_FAILED)
        self.end()

    def end(self) -> None:
        """Nothing is written or brought back any more: who keeps the session keeps no weights."""
        self._begun, self._given, self._staged = {}, [], StagedValues()
        self._journal = self._journal and Journal()

    def abandon(self) -> None:
        """:meth:`poison` by the garbage collector: whoever looks at a tensor next carries it out."""
        for target, _ in self._begun.values():
            if target.storage is not None:
                target.storage.invalidate_later(_FAILED)


def _sha256(live: Live) -> str:
    """No weaker sum: small numbers in another order have the same adler32."""
    digest = Hashed("hashlib", "sha256")
    add_pieces(digest, live)
    return digest.hexdigest(live.nbytes)
