"""The generated Triton copy: its bytes in the interpreter, its code for a GPU that is not here, and on a GPU that is."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from aliasparam.layout import Layout, triton_copy, triton_sum
from aliasparam.layout.boxes import pieces
from aliasparam.layout.execute import Copy, plan
from aliasparam.layout.strided import TRITON, StridedLayout

pytest.importorskip("triton")

SWIZZLE = "(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4"


def test_its_bytes_are_those_of_torchs_copy() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.aliasparam.triton_copy_cases"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "6 lines\n"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("shape", [(4096, 448), (7168, 16)])
@pytest.mark.parametrize("write", [True, False])
def test_it_moves_sixteen_bytes_at_a_time_on_both_sides(shape: tuple[int, int], write: bool) -> None:
    """Block scales of 384 experts, wide and narrow: units of 4 bytes, one launch, and whole vectors through shared memory, those
    of neighbours side by side in kernel memory."""
    copy = scales_of_experts(*shape)
    _, constants = triton_copy.launch(copy, write=write)
    assert constants["T_ROWS" if write else "S_ROWS"] == (128, 1), "a tile's rows are a run in kernel memory"
    ptx = compiled(triton_copy._copy, constants)

    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert "ld.global.b32" not in ptx and "st.global.b32" not in ptx


def test_weights_are_copied_along_their_rows() -> None:
    bound = Layout("(h i) k -> ~h i k, h=2").bind((384, 1024, 3584), torch.uint8)
    assert isinstance(bound, StridedLayout)
    ((copy, ours),) = bound.copies(bound.whole[1:], bound.shape, bound.strides, torch.uint8, 16, TRITON)
    _, constants = triton_copy.launch(copy, write=True)

    assert ours and copy.dtype is torch.int64
    assert constants["TILE"][3] == 128, "1 KiB of a row in each row of a tile"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_sums_take_four_bytes_with_one_instruction() -> None:
    _, constants = triton_sum._planned(scales_of_experts(), True)
    ptx = compiled(triton_sum._sums, constants)

    assert "dp4a.u32.u32" in ptx and "ld.global.v4.b32" in ptx


def scales_of_experts(rows: int = 4096, columns: int = 448) -> Copy:
    bound = Layout(SWIZZLE).bind((384, rows, columns), torch.uint8)
    assert isinstance(bound, StridedLayout)
    strides = torch.empty(bound.shape, device="meta").stride()
    (copy,) = plan(pieces(bound.lines, bound.shape, bound.whole, strides), 1, 16)
    assert copy.dtype is torch.int32
    return copy


def compiled(kernel: Any, constants: dict[str, Any]) -> str:
    """PTX for Hopper of a kernel of two pointers, the last to words."""
    compiler: Any = pytest.importorskip("triton.backends.compiler")
    triton: Any = pytest.importorskip("triton")
    names = kernel.arg_names
    pointers = {names[0]: "*i64" if names[0] == "sums" else "*i32", names[1]: "*i32"}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
    )
    return str(triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_it_is_used_and_can_be_captured() -> None:
    bound = Layout(SWIZZLE).bind((8, 512, 448), torch.uint8)
    value = torch.randint(0, 255, bound.shape, dtype=torch.uint8, device="cuda")
    memory = torch.zeros(bound.regions * bound.region_capacity, dtype=torch.uint8, device="cuda")
    expected = torch.zeros(memory.shape, dtype=torch.uint8)
    bound.write(expected, bound.whole, value.cpu())
    bound.write(memory, bound.whole, value)  # compiles
    memory.zero_()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.write(memory, bound.whole, value)
    graph.replay()

    assert torch.equal(memory.cpu(), expected)
    assert torch.equal(bound.read(memory, bound.whole), value)
