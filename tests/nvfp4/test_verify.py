"""The acceptance command, on the backends that run here; and that it would see a kernel which misreads its bytes."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.errors import BackendError
from aliasparam_nvfp4.linear import verify
from aliasparam_nvfp4.linear.backends import linear_backends


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SHAPES", (("small", (64, 32), 128), ("ragged", (40,), 48)))


def test_the_reference_backend_is_accepted() -> None:
    run = CliRunner().invoke(app, ["verify", "--backend", "reference"])

    assert run.exit_code == 0, run.output
    assert "WRONG" not in run.output
    assert "ragged, reloaded" in run.output


def test_a_backend_that_misreads_its_bytes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = linear_backends()["reference"]
    right = backend.apply
    monkeypatch.setattr(backend, "apply", lambda layer, x, shape: right(layer, x, shape).flip(-1))

    verdicts = list(verify.verify("reference", torch.device("cpu")))

    assert not any(v.held for v in verdicts if v.tokens)


def test_a_backend_without_its_gpu_says_so() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("it runs here")
    with pytest.raises(BackendError, match="cannot run here"):
        list(verify.verify("flashinfer_cutlass", torch.device("cuda" if torch.cuda.is_available() else "cpu")))
