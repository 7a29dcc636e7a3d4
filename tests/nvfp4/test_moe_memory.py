"""One copy on every runner: pairs that share memory, padded capacities, and what real models save."""

from __future__ import annotations

import pytest
import torch

from aliasparam import MemoryReport, memory_report
from aliasparam_nvfp4.demo.large_models import MODELS, MoEModel
from aliasparam_nvfp4.layouts import swizzle
from aliasparam_nvfp4.moe.runners import moe_runner

from .moe_experts import ACTIVATIONS, RUNNERS, Dims, Experts, serving

SAVED = dict(zip([m.name for m in MODELS], (14.77, 4.76, 3.30, 0.42), strict=True))


def declared(runner: str, dims: Dims, **how: object) -> MemoryReport:
    with torch.device("meta"):
        return memory_report(Experts(runner, dims, **how))


def fits(runner: str, model: MoEModel) -> bool:
    """Whether the runner wants this model's dims as they are, and its block scales in another order."""
    layout = moe_runner(runner).layout
    aligned = model.hidden % layout.hidden == 0 and model.intermediate_per_rank % layout.intermediate == 0
    return aligned and layout.w2_scale.lines[-1] == swizzle().lines[0]


@pytest.mark.parametrize("runner, model", [(n, m) for n in RUNNERS for m in MODELS if fits(n, m)], ids=str)
def test_block_scales_of_real_models_are_kept_once(runner: str, model: MoEModel) -> None:
    rows = declared(runner, (model.experts, model.hidden, model.intermediate_per_rank)).rows
    pairs = [row for row in rows if row.source in ("w13_weight_scale", "w2_weight_scale")]
    total = sum(row.two_copies_bytes - row.allocated_bytes for row in pairs) * model.layers
    assert round(total / 2**30, 2) == SAVED[model.name]


@pytest.mark.parametrize("runner, kind", [(n, k) for k, a in ACTIVATIONS.items() for n in serving(a)])
@pytest.mark.parametrize("dims", [(2, 128, 128), (2, 128, 192), (2, 576, 80), (3, 80, 48)], ids=str)
def test_every_pair_shares_one_storage_whatever_has_to_be_padded(runner: str, kind: str, dims: Dims) -> None:
    activation = ACTIVATIONS[kind]
    report = declared(runner, dims, activation=activation, retarget_to=serving(activation)[:1])
    pairs = {row.derived: row for row in report.rows if row.derived}
    assert set(pairs) == {"w13_weight_prepared", "w2_weight_prepared", "w13_blockscale_swizzled", "w2_blockscale_swizzled"}
    assert not report.fallbacks and all(row.aliased for row in report.rows)
    alone = {row.derived: row for row in declared(runner, dims, activation=activation).rows if row.derived}
    for row in alone.values():
        assert row.allocated_bytes == max(row.checkpoint_bytes, row.kernel_bytes)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_intermediate_size_is_padded_as_the_kernel_wants_and_not_further(runner: str) -> None:
    layout = moe_runner(runner).layout
    with torch.device("meta"):
        shape = Experts(runner, (2, 80, 48)).nvfp4_moe_shape
    h, i = shape.padded(layout)  # type: ignore[operator, union-attr]
    assert (h, i) == tuple(-(-n // m) * m for n, m in ((80, layout.hidden), (48, layout.intermediate)))
