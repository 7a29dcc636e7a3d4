"""The GPU kernels compile without a GPU, for each architecture they are meant for, and keep everything in registers."""

from __future__ import annotations

from typing import Any

import pytest

compiler = pytest.importorskip("triton.backends.compiler")
gluon = pytest.importorskip("triton.experimental.gluon._runtime")
pytest.importorskip("aliasparam_nvfp4.kernels.decode")


def compiled(constants: dict[str, Any], capability: int) -> Any:
    import triton

    from aliasparam_nvfp4.kernels.decode import decode_linear

    pointers = {"x_ptr": "*i32", "weight_ptr": "*i32", "scale_ptr": "*i32", "alpha_ptr": "*fp32", "out_ptr": "*fp32"}
    options = {"num_warps": constants.pop("num_warps")}
    names = decode_linear.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "*i32" if n == "plan_ptr" else "i32") for n in names}
    aligned = {n for n in names if n.endswith(("_ptr", "_stride", "_columns")) or n in ("half_k", "n_size")}
    source = gluon.GluonASTSource(
        fn=decode_linear,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
    )
    return triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_decode_kernel_compiles_without_shared_memory(capability: int, grouped: bool) -> None:
    from aliasparam_nvfp4.kernels import decode
    from aliasparam_nvfp4.kernels.cut import cut_for

    shape = cut_for(1, 4096, 2048, 1, 132)
    constants = {**decode.constants(8, shape, native_e4m3=capability >= 89), "GROUPED": grouped, "SHUFFLED": False}
    kernel = compiled(constants, capability)
    assert kernel.metadata.shared == 0, "a fragment was moved between lanes"
    assert "mma.sync" in kernel.asm["ptx"] and "ld.local" not in kernel.asm["ptx"]
    assert ("e4m3x2" in kernel.asm["ptx"]) == (capability >= 89)
