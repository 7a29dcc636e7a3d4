"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SUITE = """
from aliasparam import Alias, SwapHalves, declare
from torch import nn
import torch

def make():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.uint8), requires_grad=False)
    return layer

def declared():
    layer = make()
    declare(layer, Alias("weight", "prepared", SwapHalves()), loaded=False)
    return layer

def by_hand(layer):
    layer.weight.data.copy_(layer.weight.data.roll(1, 0))

def test_good(check_method):
    check_method(declared)

def test_bad(check_method):
    check_method(make, process=by_hand, outputs=lambda layer: {"weight": layer.weight.data})
"""


def test_the_plugin_reports_which_law_broke_with_the_steps(tmp_path: Path) -> None:
    (tmp_path / "test_methods.py").write_text(_SUITE)

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--aliasparam-examples", "20", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    summary = run.stdout.partition("aliasparam: laws of quantization methods")[2]
    assert run.returncode == 1, run.stdout + run.stderr
    assert "test_good: all laws hold (20 sequences" in summary
    assert "test_bad breaks law" in summary
    assert "1. load weight" in summary
