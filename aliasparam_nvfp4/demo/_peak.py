"""Peak resident memory of a block of code."""

from __future__ import annotations

import gc
import mmap
import resource
import sys
from functools import cache
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PROBE = 32 << 20


class PeakMemory:
    """``with PeakMemory() as peak: ...`` then ``peak.extra_bytes``: how far residence rose above where it began.

    On Linux the kernel's high-water mark is reset at the start (``clear_refs``), so this is the true peak of the block. Where
    that cannot be done, or the mark does not see an allocation made to try it (some sandboxes), it is the rise of the
    process-wide peak, a lower bound; ``exact`` says which.
    """

    extra_bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.exact = _high_water_mark_works() and _reset()
        self._before = _field("VmRSS") if self.exact else _process_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        peak = _field("VmHWM") if self.exact else _process_peak()
        self.extra_bytes = max(0, peak - self._before)


def _reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


@cache
def _high_water_mark_works() -> bool:
    """Whether memory that was touched and given back shows in the mark, and a reset forgets it."""
    try:
        if not _reset():
            return False
        before = _field("VmRSS")
        with mmap.mmap(-1, _PROBE) as memory:
            for page in range(0, _PROBE, mmap.PAGESIZE):
                memory[page] = 1
        seen = _field("VmHWM") - before
        return _reset() and seen > _PROBE // 2 and _field("VmHWM") - before < _PROBE // 2
    except (OSError, ValueError):
        return False


def _field(name: str) -> int:
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(name)), None)
    if line is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(line.split()[1]) * 1024


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
