"""Moving a loaded layer between kernel formats, in place."""

from __future__ import annotations

import pytest
import torch

from aliasparam import explain, memory_report
from aliasparam.errors import PointerError
from aliasparam_nvfp4 import retarget
from aliasparam_nvfp4.errors import BackendError, ShapeError
from aliasparam_nvfp4.linear.backends import linear_backends

from .backend_cases import BACKENDS, made

MOVABLE = [b for b in BACKENDS if b.layout.name != "fragments"]


@pytest.mark.parametrize(("partitions", "k"), [((128, 128), 128), ((576, 192, 192), 576), ((300,), 176)])
def test_retarget_moves_a_loaded_layer_between_all_formats_in_place(partitions: tuple[int, ...], k: int) -> None:
    names = tuple(b.name for b in MOVABLE)
    layer = made(linear_backends()["flashinfer_cutlass"], partitions, k, retarget_to=names)
    addresses = {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())}
    allocated = memory_report(layer).allocated_bytes

    for name in (*names, "flashinfer_trtllm", "flashinfer_cudnn_w4a16", "flashinfer_cutlass"):
        retarget(layer, name)
        cold = made(linear_backends()[name], partitions, k)
        assert layer.nvfp4_backend.name == name
        for kernel_name in ("weight_prepared", "weight_scale_interleaved"):
            warm = getattr(layer, kernel_name)
            assert torch.equal(warm.view(torch.uint8), getattr(cold, kernel_name).view(torch.uint8)), (name, kernel_name)
        assert {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())} == addresses
    assert memory_report(layer).allocated_bytes == allocated
    retarget(layer, "reference")
    x = torch.randn(2, k)
    assert torch.equal(layer(x), made(linear_backends()["reference"], partitions, k)(x))


def test_retarget_refuses_what_has_no_room_and_changes_nothing() -> None:
    layer = made(linear_backends()["flashinfer_cutlass"], (40,), 48)
    before = {n: t.clone() for n, t in layer.named_buffers()}

    with pytest.raises(PointerError, match="Plan room"):
        retarget(layer, "flashinfer_trtllm")

    assert layer.nvfp4_backend.name == "flashinfer_cutlass"
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in layer.named_buffers())


@pytest.mark.parametrize(
    ("start", "target"), [("flashinfer_b12x", "flashinfer_cutedsl_w4a16_sm12x"), ("flashinfer_cutedsl_w4a16_sm12x", "reference")]
)
def test_retarget_to_or_from_a_format_that_re_encodes_says_that(start: str, target: str) -> None:
    layer = made(linear_backends()[start], (64,), 64)

    with pytest.raises(BackendError, match="re-encodes values") as error:
        retarget(layer, target)

    assert "weight_scale_interleaved" in str(error.value.found)
    assert layer.nvfp4_backend.name == start


def test_retarget_moves_no_layer_if_one_cannot_be_moved() -> None:
    plain, names = linear_backends()["flashinfer_cutlass"], ("flashinfer_trtllm",)
    model = torch.nn.ModuleList([made(plain, (40,), 48, retarget_to=names), made(plain, (40,), 48)])
    kept = [{n: t.clone() for n, t in layer.named_buffers()} for layer in model]

    with pytest.raises(PointerError, match=r"1\.weight"):
        retarget(model, "flashinfer_trtllm")

    for layer, before in zip(model, kept, strict=True):
        assert layer.nvfp4_backend is plain
        assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in layer.named_buffers())


def test_retarget_refuses_dims_that_the_backend_cannot_take() -> None:
    with pytest.raises(ShapeError, match="does not take these dims"):
        retarget(made(linear_backends()["flashinfer_cudnn_w4a16"], (40,), 48), "flashinfer_blackwell_tiled_w4a16")


def test_explain_says_where_a_layer_was_moved() -> None:
    layer = made(linear_backends()["flashinfer_cutlass"], (64,), 64)
    assert "flashinfer_cutlass: asked for by name" in explain(layer)
    retarget(layer, "reference")
    assert "reference: moved by retarget" in explain(layer)
