"""Every linear backend has every proof that can be had of it without its GPU, and the docs say no more than that."""

from __future__ import annotations

import pytest

from aliasparam_nvfp4.linear.backends import LinearBackend, linear_backends

from . import proofs
from .proof_table import DOCS, LINEAR_RAN, proofs_of, render

pytest.importorskip("transformers")
pytest.importorskip("modelopt")
BACKENDS = list(linear_backends().values())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_no_backend_lacks_a_proof(backend: LinearBackend) -> None:
    found = proofs_of(backend)

    needed = {"bytes", "emulator", "call" if backend.name.startswith("flashinfer_") else "runs"}
    assert {kind for kind, tests in found.items() if tests} >= needed
    assert "test_an_emulator_of_the_kernel_reads_the_reference_result" in found["emulator"]
    assert "test_edge_bytes_are_read_right_and_exported_bit_for_bit" in found["emulator"]


def test_a_backend_without_proofs_has_an_empty_row(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs_of(BACKENDS[0])  # imports the tests
    monkeypatch.setitem(proofs.PROOFS, "bytes", {n: t for n, t in proofs.PROOFS["bytes"].items() if n != "flashinfer_cutlass"})

    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `")}

    assert "| yes | yes | yes |" in rows["flashinfer_trtllm"]
    assert "|  | yes | yes |" in rows["flashinfer_cutlass"]


def test_what_ran_is_a_backend_and_has_a_page() -> None:
    assert LINEAR_RAN.keys() <= linear_backends().keys()
    page = (DOCS.parents[1] / "gpu.md").read_text()
    assert all(f"`{name}`" in page for name, where in LINEAR_RAN.items() if where.startswith("ran"))
