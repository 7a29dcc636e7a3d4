"""Compiled code around layers of this package: it is compiled once, whatever is asked, loaded or run elsewhere."""

from __future__ import annotations

import pytest
import torch

from aliasparam import reload
from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.errors import BackendError
from aliasparam_nvfp4.kernels import base

from .test_linear import Layer, tensors


def loaded(backend: str, seed: int = 0) -> Layer:
    layer = Layer(NvFp4LinearMethod(backend), (32, 16), 48)
    with reload(layer) as session:
        session.load(tensors((32, 16), 48, seed=seed))
    return layer


def test_what_another_kernel_lacks_outdates_no_compiled_code() -> None:
    """The first forward of a process is the one that is compiled; then another kernel is asked for the first time."""
    base._found_out.cache_clear()
    layer, x = loaded("reference"), torch.randn(3, 48, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    expected = layer(x)
    base._found_out.cache_clear()
    assert torch.equal(compiled(x), expected)

    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)
        with pytest.raises(BackendError, match="flashinfer_cutlass"):
            loaded("flashinfer_cutlass")(x)
        assert torch.equal(compiled(x), expected)
        with reload(layer) as session:
            session.load(tensors((32, 16), 48, seed=1))
        assert torch.equal(compiled(x), loaded("reference", 1)(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a GPU for it")
def test_a_kernel_that_cannot_run_here_says_so_in_compiled_code() -> None:
    compiled = torch.compile(loaded("flashinfer_cutlass"), backend="eager")
    with pytest.raises(BackendError, match="needs a GPU"):
        compiled(torch.randn(3, 48, dtype=torch.bfloat16))
