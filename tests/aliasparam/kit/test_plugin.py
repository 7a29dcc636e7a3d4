"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from aliasparam.testing import LAWS

_SUITE = """
from aliasparam import Alias, declare, process
from torch import nn
import torch

def make():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.uint8), requires_grad=False)
    return layer

def declared():
    layer = make()
    declare(layer, Alias("weight", "prepared", "(h r) k -> ~h r k, h=2"), loaded=False)
    return layer

def by_hand(layer):
    layer.weight.data.copy_(layer.weight.data.roll(1, 0))

class Called(nn.Module):
    # Answers with its kernel tensors, whatever was loaded since; or refuses by a count of loads.

    def __init__(self, counts):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.counts, self.loads, self.processed = counts, 0, 0
        for parameter in self.parameters():
            parameter.weight_loader = self.load

    def load(self, parameter, value):
        self.loads += 1
        parameter.data.copy_(value)

    def forward(self):
        if self.counts and self.processed < self.loads:
            raise RuntimeError("stale")
        return self.w.clone(), self.b.clone()

def in_two_steps(layer):
    layer.processed = layer.loads
    for name, value in (("w", layer.weight.data.roll(1, 0)), ("b", layer.bias.data.roll(1, 0))):
        getattr(layer, name).copy_(value) if hasattr(layer, name) else setattr(layer, name, value)

def insists(layer):
    process(layer)
    assert layer.prepared.data_ptr() == layer.weight.data_ptr()

def test_7(check_method):
    check_method(declared, process=insists)

def test_8(check_method):
    check_method(lambda: Called(False), process=in_two_steps)

def test_10(check_method):
    check_method(lambda: Called(True), process=in_two_steps, partial=False)

def test_good(check_method):
    check_method(declared)

def test_bad(check_method):
    check_method(make, process=by_hand, outputs=lambda layer: {"weight": layer.weight.data})
"""


def test_the_plugin_reports_which_law_broke_with_the_steps(tmp_path: Path) -> None:
    (tmp_path / "test_methods.py").write_text(_SUITE)

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--aliasparam-examples", "4", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    summary = run.stdout.partition("aliasparam: laws of quantization methods")[2]
    assert run.returncode == 1, run.stdout + run.stderr
    assert "test_good: all laws hold (" in summary
    assert "test_bad breaks law" in summary
    for law in (7, 8, 10):
        assert f"test_{law} breaks law {law} ({LAWS[law]})" in summary
    assert "1. load weight" in summary
