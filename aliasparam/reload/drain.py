"""Forwards in flight: what they read is not written before they have ended, and new ones refuse meanwhile.

[Note: no cost] Nothing is counted while no reload runs: no hook, no lock. A reload looks at the stacks of the other threads,
which say whether a forward of the model is running there. First modules are closed: their hooks let through who is in flight.
Compiled callers run no such hooks; those that come meanwhile are waited for, when refusing twins stand in the place of all names.
On CUDA the devices are waited for too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReloadError
from ..module.names import ModuleNames, Readiness
from ..torch_private import FORWARD, nothing_compiles
from .collector import collector_paused

_LOOK_AGAIN = 0.0005


class Drain:
    """
    Args:
        model: whose forwards are waited for.
        seconds: the longest that a write waits.
    """

    def __init__(self, model: nn.Module, seconds: float) -> None:
        self._model, self._seconds = model, seconds
        self._modules: frozenset[int] = frozenset()
        self._may_go_on: frozenset[int] = frozenset()
        self._held: set[int] = set()
        self._devices: set[torch.device] = set()
        self._waited_for_devices = False

    def begin(self, modules: Sequence[nn.Module]) -> None:
        self._modules = frozenset(map(id, modules))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            parameters = (one for module in modules for one in module._parameters.values() if one is not None)
            self._devices = {one.device for one in parameters if one.is_cuda}

    def lets_through(self) -> bool:
        """Whether this thread runs a forward that began before what is waiting to be written was closed."""
        return threading.get_ident() in self._may_go_on

    def holds(self, names: ModuleNames) -> bool:
        """Whether the module stays closed until the reload has ended, also where nothing of it was written yet."""
        return id(names) in self._held

    def close(self, names: Iterable[ModuleNames], twins: Sequence[tuple[dict[str, Any], str, Tensor]]) -> None:
        """New forwards of these modules refuse; those in flight end.

        Args:
            names: modules that are about to be written, which stay closed.
            twins: refusing twins of plain tensors, and the places (module's dict, name) for them.

        Raises:
            ReloadError: a forward did not end in time. Everything is as before.
        """
        until = time.monotonic() + self._seconds
        running = self._in_flight(until)
        self._may_go_on = frozenset(running)
        shown = [(holder, key, holder.get(key)) for holder, key, _ in twins]  # a twin, where an earlier reload failed
        closed = [one for one in names if one.readiness is Readiness.READY]
        try:
            self._held |= {id(one) for one in closed}
            for one in closed:
                one.readiness = Readiness.CLOSED
            self._wait_for(running, until)
            for one in closed:
                one.open()
            for holder, key, twin in twins:
                dict.__setitem__(holder, key, twin)
            self._wait_for(self._in_flight(until), until)  # who came in between ends; who comes now is refused
            self._may_go_on = frozenset()
            if not self._waited_for_devices:
                self.wait_for_devices()
                self._waited_for_devices = True
        except BaseException:
            for holder, key, tensor in shown:
                dict.__setitem__(holder, key, tensor)
            self._held -= {id(one) for one in closed}
            for one in closed:
                if one.readiness is Readiness.CLOSED:
                    one.readiness = Readiness.READY
                one.close_if_unchanged()
            self._may_go_on = frozenset()  # not before those in flight run into nothing closed
            raise

    def wait_for_devices(self) -> None:
        """What other threads have launched has run; what they launch from now on sees what was written."""
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _wait_for(self, forwards: dict[int, FrameType], until: float) -> None:
        while forwards:
            now = self._in_flight(until)
            forwards = {thread: frame for thread, frame in forwards.items() if now.get(thread) is frame}
            if forwards and time.monotonic() > until:
                names = {thread.ident: thread.name for thread in threading.enumerate()}
                raise self._too_long(", ".join(names.get(thread) or str(thread) for thread in forwards))
            if forwards:
                time.sleep(_LOOK_AGAIN)

    def _too_long(self, found: str) -> ReloadError:
        return ReloadError(
            "forwards are in flight, and did not end in time",
            module=type(self._model).__name__,
            expected=f"none within {self._seconds:g} s",
            found=found,
            remedy="Nothing was written. Commit again when they have ended, or give the reload more drain_seconds.",
        )

    def _in_flight(self, until: float) -> dict[int, FrameType]:
        """Thread -> the outermost call of the model, of a module in it, or of one that has it, in other threads than this one."""
        with nothing_compiles(until - time.monotonic()) as safe:
            if not safe:
                raise self._too_long("a thread in torch.compile")
            with collector_paused():  # else it may run where CPython 3.11 makes a frame its object: others go on, and free it
                return self._calls()

    def _calls(self) -> dict[int, FrameType]:
        found: dict[int, FrameType] = {}
        tops = sys._current_frames()
        # A frame that has itself, and its callers' session, in a local lives until it is collected.
        del tops[threading.get_ident()]
        for thread, top in tops.items():
            frame: FrameType | None = top
            while frame is not None:
                if frame.f_code is FORWARD and self._is_ours(frame.f_locals.get("self")):
                    found[thread] = frame
                frame = frame.f_back
        return found

    def _is_ours(self, module: object) -> bool:
        if not isinstance(module, nn.Module):
            return False
        return id(module) in self._modules or any(inner is self._model for inner in module.modules())
