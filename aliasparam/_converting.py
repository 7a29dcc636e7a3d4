"""Converting a storage's regions between the two formats, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from . import _convert
from ._bytes import StorageBytes
from ._reading import whose
from ._regions import regions_view
from ._states import State
from ._transform import TensorSpec
from ._verdict import StoragePlan


class ConvertibleStorage(StorageBytes):
    """A storage whose regions go from checkpoint format to kernel format and back."""

    def to_kernel(self, regions: Iterable[int] | None = None) -> int:
        """Bring regions (default: all) to kernel format in place; returns how many were converted.

        Raises:
            StateError: a region is empty, partly written or invalid. Nothing is converted then.
        """
        self.notice()
        self.settle()
        wanted = range(self.plan.regions) if regions is None else list(regions)
        self.need_loaded(wanted)
        stale = [r for r in wanted if self.states[r] is not State.KERNEL]
        if self.kernel_name is None or not stale:
            return 0
        self.need_unexposed("process")
        for start, count, _ in self.runs(stale):
            with self._converting(range(start, start + count), State.KERNEL, "process") as progress:
                checkpoint = regions_view(self.plan, self.checkpoint, start, count)
                _convert.to_kernel(self.plan, checkpoint, self.kernel_regions(start, count), progress)
        return len(stale)

    def need_loaded(self, regions: Iterable[int] | None = None) -> None:
        """Raise StateError where a region (default: any) is empty, partly written or invalid."""
        for region in range(self.plan.regions) if regions is None else regions:
            if self.states[region] not in (State.CHECKPOINT, State.KERNEL):
                raise self._not_loaded("cannot process", region)

    def restore(self, regions: Iterable[int] | None = None) -> None:
        """Bring regions (default: all) back to checkpoint format in place."""
        self.notice()
        if self.is_plain:
            return
        wanted = range(self.plan.regions) if regions is None else regions
        for start, count, state in self.runs(wanted):
            if state is State.KERNEL:
                self.need_unexposed("restore")
                with whose(self), self._converting(range(start, start + count), State.CHECKPOINT, "restore") as progress:
                    checkpoint = regions_view(self.plan, self.checkpoint, start, count)
                    _convert.to_checkpoint(self.plan, checkpoint, self.kernel_regions(start, count), progress)

    @contextmanager
    def _converting(self, run: range, to: State, doing: str) -> Iterator[_convert.Progress]:
        """Move ``run`` to ``to`` at the end; if it fails after the first byte changed, the run holds both formats."""
        progress = _convert.Progress()
        try:
            yield progress
            self._move(run, to, doing)
        except BaseException:
            if progress.wrote:
                self._why = "a conversion failed half-way"
                self._move(run, State.INVALID, doing)
                self._changed()
            raise

    def put_kernel(self, value: Tensor) -> None:
        """Write kernel-format bytes made elsewhere (the ported helpers) over the whole storage."""
        if self.kernel_name is None or TensorSpec.of(value) != self.plan.derived:
            raise AssertionError(f"{self.label}: {TensorSpec.of(value)} is not the kernel format {self.plan.derived}")
        self.need_unexposed("process")
        self.kernel_name.memory.copy_(value)
        self.kernel_name.accept()
        self._states.set_known((r, State.KERNEL) for r in range(self.plan.regions))
        self._written.clear()
        self._look()

    def retarget(self, plan: StoragePlan) -> None:
        """Change to another kernel format of the same capacity. The bytes must be in checkpoint format, or not loaded."""
        if self.kernel_name is None or (plan.regions, plan.region_capacity) != (self.plan.regions, self.plan.region_capacity):
            raise AssertionError(f"{self.label}: {plan} does not fit {self.plan}")
        if self.holds_kernel_bytes:
            raise AssertionError(f"{self.label}: retargeted before it was restored")
        self.plan = plan
        self.name_buffer(self.buffer, has_kernel_name=True)
        self._changed()
