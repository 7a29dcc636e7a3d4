"""Laws 8 and 10 in any order: the state machine, with conversions that die midway and other code that writes kernel names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor

import aliasparam._convert as convert
from aliasparam import State, process
from aliasparam.errors import StaleKernelError, StateError
from aliasparam.testing import AliasMachine


class Died(BaseException):
    """As KeyboardInterrupt: not an Exception that an operator raises before it writes."""


@contextmanager
def dying_at(piece: int) -> Iterator[list[int]]:
    """The ``piece``-th piece that is converted from now on is left as rubbish. Yields what was hit."""
    real, left, hit = convert._overwrite, [piece], list[int]()

    def overwrite(target: Tensor, value: Tensor, progress: convert.Progress) -> None:
        left[0] -= 1
        if left[0] == 0:
            progress.wrote = True
            target.view(torch.uint8).fill_(0x5A)
            hit.append(piece)
            raise Died
        real(target, value, progress)

    convert._overwrite = overwrite
    try:
        yield hit
    finally:
        convert._overwrite = real


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "fill": lambda k: k.view(torch.uint8).fill_(0x5A),
    "detached": lambda k: k.detach().zero_(),
    "out": lambda k: torch.bitwise_not(k.view(torch.uint8).clone(), out=k.view(torch.uint8)),
}


class FaultMachine(AliasMachine):
    """Everything that the machine does, and faults in between."""

    @rule(piece=st.integers(1, 3), through=st.sampled_from(["process", "write"]), index=st.integers(0, 7))
    def a_conversion_dies(self, piece: int, through: str, index: int) -> None:
        name = self._pick(index)
        with dying_at(piece) as hit:
            try:
                if through == "process":
                    process(self.layer)
                    self.stale = False
                elif self._parameter(name).dim():
                    self._parameter(name)[:1] = self.oracle[name][:1].clone()
                    self.stale = True
            except Died:
                pass
        if hit:
            self.stale = True
            self.load_what_was_lost(at_least_one=True)

    @rule(aliased=st.booleans(), index=st.integers(0, 7), writer=st.sampled_from(list(WRITERS)))
    def other_code_writes_a_kernel_name(self, aliased: bool, index: int, writer: str) -> None:
        process(self.layer)
        registry = self._registry()
        names = [s.derived for s in registry.sources.values() if s.derived and aliased] or sorted(registry.derived)
        name = names[index % len(names)]
        WRITERS[writer](self.layer.get_buffer(name))

        if name in registry.derived:  # it has its sources: it is computed again
            process(self.layer)
            self.stale = False
            return
        self._refused(lambda: process(self.layer), StateError)
        self._refused(self.layer, StaleKernelError)
        self.stale = True
        self.load_what_was_lost(at_least_one=True)

    def load_what_was_lost(self, *, at_least_one: bool) -> None:
        """Whatever refuses is loaded again; all else must still be what the oracle says (the machine's invariants look)."""
        lost = [n for n, s in self._registry().sources.items() if s.storage is not None and State.INVALID in s.storage.states]
        if at_least_one and not lost:
            raise AssertionError("bytes were lost and nothing refuses (law 10)")
        for name in lost:
            self._refused(lambda name=name: self._parameter(name).clone(), StateError)  # type: ignore[misc]
            self.oracle[name] = self._new(name)
            self._parameter(name).copy_(self.oracle[name])

    @staticmethod
    def _refused(action: Callable[[], Any], error: type[Exception]) -> None:
        try:
            action()
        except error:
            return
        raise AssertionError(f"no {error.__name__} (laws 8 and 10)")


class CopiesMachine(FaultMachine):
    aliasing = False


TestFaults = FaultMachine.TestCase
TestFaultsWithCopies_law_7_fallback_equivalence = CopiesMachine.TestCase
