"""SGLang on a CPU: the packages that have no CPU build stand in from stub/, also in the engine's processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

STUB = str(Path(__file__).parent / "stub")
if importlib.util.find_spec("sglang") is not None:  # elsewhere a real torchvision may be missed
    sys.path.insert(0, STUB)
    os.environ["PYTHONPATH"] = os.pathsep.join([STUB, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
