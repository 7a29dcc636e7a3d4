"""Laws 1, 2, 3, 5, 7, 8 and 9 as a state machine, with shared memory and with copies, on the CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch

from aliasparam.testing import machine_for

TestSharedMemory = machine_for("cpu")
TestCopies_law_7_fallback_equivalence = machine_for("cpu", aliasing=False)
TestSharedMemoryOnCuda = pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")(machine_for("cuda")))
