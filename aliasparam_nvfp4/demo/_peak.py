"""Peak resident memory of a block of code."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """``with PeakMemory() as peak: ...`` then ``peak.extra_bytes``: how far residence rose above where it began.

    On Linux the kernel's high-water mark is reset at the start (``clear_refs``), so this is the true peak of the block. Where
    that cannot be done it is the rise of the process-wide peak, a lower bound.
    """

    extra_bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.exact = self._reset()
        self._before = _field("VmRSS") if self.exact else _process_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        peak = _field("VmHWM") if self.exact else _process_peak()
        self.extra_bytes = max(0, peak - self._before)

    @staticmethod
    def _reset() -> bool:
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return _STATUS.is_file()


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
