"""The laws on every example, and what its declaration may take."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import TensorSpec, memory_report, process
from aliasparam.errors import LayoutError
from aliasparam.testing import check_method, machine_for, random_values
from examples import bf16_w13, fp8_ue8m0, marlin_int4, mxfp4_gpt_oss

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bf16 w13": bf16_w13.make_layer,
    "awq": marlin_int4.make_layer,
    "gptq": lambda: marlin_int4.make_layer(awq=False),
    "mxfp4": mxfp4_gpt_oss.make_layer,
    "fp8, UE8M0 bytes": fp8_ue8m0.make_layer,
    "fp8, f32 block scales": lambda: fp8_ue8m0.make_layer(scale_bytes=False),
}


def values(name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
    """f32 block scales must be powers of two; everything else may be anything."""
    if spec.dtype is torch.float32:
        return torch.randint(1, 250, spec.shape, generator=random).to(torch.int32).bitwise_left_shift(23).view(torch.float32)
    return random_values(spec, random)


def loaded(make: Callable[[], nn.Module], seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    layer, random = make(), torch.Generator().manual_seed(seed)
    checkpoint = {n: values(n, TensorSpec.of(p), random) for n, p in layer.named_parameters()}
    layer.load_state_dict({n: v.clone() for n, v in checkpoint.items()})
    process(layer)
    return layer, checkpoint


@pytest.mark.parametrize("name", LAYERS)
def test_laws_1_to_9_hold(name: str) -> None:
    report = check_method(LAYERS[name], values=values, name=name, examples=8)

    assert report.broken is None


class TestMarlinMachine_laws_1_to_9(
    machine_for(make=lambda device, aliasing: marlin_int4.make_layer(16, 64, 16).to(device), arithmetic=False)
):
    pass


def test_law_4_only_lossy_f32_scales_keep_a_copy() -> None:
    fallbacks = {name: [row.reason.code for row in memory_report(make()).fallbacks] for name, make in LAYERS.items()}

    assert {name: codes for name, codes in fallbacks.items() if codes} == {"fp8, f32 block scales": ["lossy"]}


def test_a_scale_that_is_no_power_of_two_is_refused() -> None:
    layer = fp8_ue8m0.make_layer(scale_bytes=False)
    layer.weight.copy_(torch.zeros(200, 256))
    layer.weight_scale_inv.fill_(0.3)

    with pytest.raises(LayoutError, match="no power of two"):
        process(layer)


def test_dims_that_marlin_cannot_tile_are_refused_at_declaration() -> None:
    with pytest.raises(LayoutError, match="N % 64"):
        marlin_int4.make_layer(64, 96)


@pytest.mark.parametrize("example", [bf16_w13, fp8_ue8m0, marlin_int4, mxfp4_gpt_oss], ids=lambda module: module.__name__)
def test_a_family_is_declared_in_sixty_lines(example: types.ModuleType) -> None:
    lines = declaration(Path(str(example.__file__)))

    assert len(lines) <= 60, "\n".join(lines)


def declaration(path: Path) -> list[str]:
    """The lines of an example but blank ones, its first docstring, and ``make_layer``, which stands for the engine's layer."""
    text = path.read_text()
    tree = ast.parse(text)
    engine = [tree.body[0], *(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "make_layer")]
    left_out = {line for node in engine for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in left_out]
