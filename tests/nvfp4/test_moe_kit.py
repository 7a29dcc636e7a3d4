"""All laws by the kit, on every set of declarations that a runner makes."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from aliasparam import TensorSpec
from aliasparam.testing import check_method
from aliasparam_nvfp4.moe.activation import ExpertActivation
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.scales import SwigluNumbers

from .moe_experts import ACTIVATIONS, Dims, Experts, serving

RAGGED, ALIGNED = (2, 80, 48), (2, 128, 128)


def declared(runner: str, activation: ExpertActivation) -> Hashable:
    """What the kit can see of a runner: layouts, and which scalars it derives how. Those that agree are one case."""
    chosen = moe_runner(runner)
    derives = activation.has_numbers and chosen.swiglu_numbers is not SwigluNumbers.AS_FLOATS
    numbers = chosen.swiglu_numbers if derives else None
    return chosen.layout.of(activation), chosen.input_scales, chosen.separate_scales, numbers


DIFFERENT = {declared(runner, a): (runner, kind) for kind, a in ACTIVATIONS.items() for runner in serving(a)}
#: With padding everywhere; without any, of one layout that keeps the checkpoint's order and of the one furthest from it.
CASES = [(*case, RAGGED) for case in DIFFERENT.values()]
CASES += [("reference", "swiglu", ALIGNED), ("flashinfer_trtllm_routed", "swiglu", ALIGNED)]


def legal(name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
    if spec.dtype is torch.bfloat16:
        return torch.randn(spec.shape, generator=random).bfloat16()
    if spec.dtype is torch.float32:  # one value for all: gate and up are tied then
        return torch.full(spec.shape, 1.0 / int(torch.randint(1, 2688, (), generator=random)))
    raw = torch.randint(0, 256, spec.shape, generator=random, dtype=torch.uint8)
    return raw if spec.dtype is torch.uint8 else (raw & 0x77).view(spec.dtype)


@pytest.mark.parametrize("runner", ["flashinfer_cutlass", "flashinfer_trtllm_routed"])
def test_all_laws_by_the_kit_with_biases(runner: str) -> None:
    """In the order of rows and padded; and derived, in memory of their own."""
    check_method(lambda: Experts(runner, RAGGED, activation=ACTIVATIONS["oai"], bias=True), values=legal, examples=6)


@pytest.mark.parametrize("runner, kind, dims", CASES, ids=str)
def test_all_laws_by_the_kit(runner: str, kind: str, dims: Dims) -> None:
    check_method(lambda: Experts(runner, dims, activation=ACTIVATIONS[kind]), values=legal, examples=6)
