"""The acceptance command for MoE runners: on the one that runs anywhere, and that it would see a kernel gone wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.errors import BackendError
from aliasparam_nvfp4.moe import verify
from aliasparam_nvfp4.moe.runners import moe_runner, moe_runners


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SHAPES", (("small", 4, 64, 64), ("ragged", 4, 80, 48)))
    monkeypatch.setattr(verify, "TOKENS", (1, 7))


def test_the_reference_is_accepted_loaded_reloaded_and_routed() -> None:
    run = CliRunner().invoke(app, ["verify", "--moe", "--backend", "reference"])
    assert run.exit_code == 0, run.output
    assert "WRONG" not in run.output
    for row in (
        "small",
        "ragged, reloaded",
        "ragged, addresses",
        "ragged, sigmoid_bias_grouped",
        "ragged, relu2, reloaded",
        "ragged, clamped, reloaded",
        "ragged, clamped, biases, reloaded",
        "dB against the emulator",
    ):
        assert row in run.output


@pytest.mark.parametrize("wrong", ["rows", "a scalar", "the first load"])
def test_a_runner_gone_wrong_is_not(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = moe_runner("reference")
    right, first = runner.apply, {}

    def apply(layer: object, x: Tensor, *rest: object) -> Tensor:
        out: Tensor = right(layer, x, *rest)  # type: ignore[arg-type]
        if wrong == "the first load":
            out = first.setdefault((x.shape, float(x.sum())), out)
        return {"rows": out.flip(-1), "a scalar": out * 1.25}.get(wrong, out)

    monkeypatch.setattr(runner, "apply", apply)
    held = [v.held for v in verify.verify("reference", torch.device("cpu")) if v.tokens and "reloaded" in v.shape]
    assert held and not any(held)


@pytest.mark.parametrize("runner", [name for name in sorted(moe_runners()) if moe_runner(name).capabilities])
def test_a_runner_is_known_and_says_what_it_needs(runner: str) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in moe_runner(runner).capabilities:
        pytest.skip("it runs here")
    result = CliRunner().invoke(app, ["verify", "--moe", "--backend", runner])
    assert isinstance(result.exception, BackendError) and "compute capability" in str(result.exception)
