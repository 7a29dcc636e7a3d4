"""How reloads of experts fail in the field, as tests: the second load, the partial load, the second processing.

SGLang 0.5.23's ``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading`` has each of the first eleven, see docs/nvfp4/moe.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam import checkpoint_state_dict, memory_report, process, registry_of, reload
from aliasparam.errors import ReloadError
from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.moe.activation import ExpertActivation
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.scales import SwigluNumbers
from aliasparam_nvfp4.quantize.block_scales import STEP_BYTES

from ..aliasparam.peak import peak_bytes
from .moe_experts import ACTIVATIONS, OAI, RUNNERS, Dims, Experts, pointers, rows_of, serving, stored
from .moe_layers import SHAPES, Checkpoint, load, names
from .ordered import ordered

ALIGNED, RAGGED = SHAPES[0], SHAPES[2]
every_runner = pytest.mark.parametrize("runner", RUNNERS)
every_kind = pytest.mark.parametrize("runner, kind", [(n, k) for k, a in ACTIVATIONS.items() for n in serving(a)])
both_dims = pytest.mark.parametrize("dims", [ALIGNED, RAGGED], ids=["aligned", "ragged"])


def loaded(runner: str, dims: Dims, seed: int = 0, **how: Any) -> Experts:
    layer = Experts(runner, dims, **how)
    load(layer, stored(dims, seed, activation=how.get("activation", ACTIVATIONS["swiglu"])))
    return layer


def only(tensors: Checkpoint, *suffixes: str) -> Checkpoint:
    return {key: tensor for key, tensor in tensors.items() if key[2] in suffixes}


@every_kind
@both_dims
def test_1_swizzled_scales_are_not_swizzled_again(runner: str, kind: str, dims: Dims) -> None:
    activation = ACTIVATIONS[kind]
    layer = loaded(runner, dims, activation=activation)
    first = names(layer)
    layer.method.process_weights_after_loading(layer)
    process(layer)
    assert names(layer) == first
    load(layer, only(stored(dims, 1, activation=activation), "weight"))  # scales stay, and are processed again
    load(layer, only(stored(dims, activation=activation), "weight"))
    assert names(layer) == first


@every_kind
@both_dims
def test_2_shuffled_weights_are_not_shuffled_again(runner: str, kind: str, dims: Dims) -> None:
    activation = ACTIVATIONS[kind]
    layer = loaded(runner, dims, activation=activation)
    load(layer, only(stored(dims, 1, activation=activation), "weight_scale", "weight_scale_2"))  # weights stay
    mixed = stored(dims, activation=activation) | only(stored(dims, 1, activation=activation), "weight_scale", "weight_scale_2")
    oracle = Experts(runner, dims, activation=activation)
    load(oracle, mixed)
    assert names(layer) == names(oracle)


@every_kind
@pytest.mark.parametrize("dims", [RAGGED, (3, 144, 112)], ids=str)
def test_3_padding_is_no_state_and_is_zero_again_after_raw_bytes_went_through_it(runner: str, kind: str, dims: Dims) -> None:
    activation = ACTIVATIONS[kind]
    layer = Experts(runner, dims, activation=activation)
    shapes = {n: p.shape for n, p in layer.named_parameters()}
    for seed in (0, 1, 0):
        load(layer, stored(dims, seed, activation=activation))
        assert {n: p.shape for n, p in layer.named_parameters()} == shapes
        for (kernel, order), source in ((v, k) for k, v in orders_of(layer).items()):
            expected = ordered(order, layer.get_parameter(source).detach().clone())
            assert torch.equal(layer.get_buffer(kernel).view(torch.uint8), expected.view(torch.uint8))
    shape = layer.nvfp4_moe_shape
    assert (shape.hidden, shape.intermediate) == dims[1:]  # type: ignore[union-attr]


def orders_of(layer: Experts) -> Any:
    """Checkpoint name to (kernel name, its order)."""
    return layer.nvfp4_moe_declared.formats(layer.nvfp4_runner)  # type: ignore[operator, union-attr]


@every_runner
def test_4_an_interleaved_checkpoint_is_taken_apart_at_every_load(runner: str) -> None:
    dims = SHAPES[1]
    layer = Experts(runner, dims, interleaved=True)
    before: set[str] | None = None
    for seed in (0, 1, 0):
        tensors = stored(dims, seed)
        for suffix in ("weight", "weight_scale"):
            param = layer.get_parameter(f"w13_{suffix}")
            for e in range(dims[0]):
                rows = rows_of(tensors, e, "w13", suffix)
                pairs = rows.view(2, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)
                param.weight_loader(param, pairs, "gate_up", "w13", e)  # type: ignore[operator]
        load(layer, {k: t for k, t in tensors.items() if k[1] == "w2" or k[2] not in ("weight", "weight_scale")})
        layer.method.process_weights_after_loading(layer)
        assert names(layer) == names(loaded(runner, dims, seed))
        before = before or set(layer.__dict__)
        assert set(layer.__dict__) == before, "nothing is remembered on the layer"


@every_runner
@both_dims
def test_5_no_name_is_ever_emptied(runner: str, dims: Dims) -> None:
    layer = Experts(runner, dims)
    for seed in (0, 1):
        load(layer, stored(dims, seed))
        every = [*layer.parameters(), *layer.buffers()]
        assert all(t.numel() and t.untyped_storage().nbytes() for t in every)


@pytest.mark.parametrize("runner", serving(OAI))
@both_dims
def test_6_a_clamp_limit_rescales_nothing(runner: str, dims: Dims) -> None:
    """SGLang multiplies e4m3 block scales in place where gate and up differ, rounding them anew at every call."""
    tensors, layer = stored(dims, activation=OAI), loaded(runner, dims, activation=OAI)
    first = names(layer)
    for _ in range(2):
        layer.method.process_weights_after_loading(layer)
        load(layer, tensors)
        assert names(layer) == first
    exported = checkpoint_state_dict(layer)["w13_weight_scale"].contiguous()
    for e in range(dims[0]):
        assert torch.equal(exported[e].view(torch.uint8), rows_of(tensors, e, "w13", "weight_scale").view(torch.uint8))
    untied = stored(dims, activation=OAI, untied=True)
    if moe_runner(runner).swiglu_numbers is SwigluNumbers.OF_RAW_SUMS:
        with pytest.raises(ScaleError, match=rf"(?s)one clamp limit|{runner}: w13_weight_scale_2, expert 0"):
            load(layer, untied)
    elif moe_runner(runner).separate_scales:
        load(layer, untied)
    else:
        with pytest.raises(ScaleError, match=rf"{runner}: w13_weight_scale_2, expert 0"):
            load(layer, untied)


@every_kind
def test_7_no_scale_is_deleted(runner: str, kind: str) -> None:
    activation = ACTIVATIONS[kind]
    layer = loaded(runner, RAGGED, activation=activation)
    sources = dict(layer.named_parameters())
    load(layer, only(stored(RAGGED, 1, activation=activation), "weight_scale_2", "input_scale"))
    mixed = stored(RAGGED, activation=activation) | only(
        stored(RAGGED, 1, activation=activation), "weight_scale_2", "input_scale"
    )
    oracle = Experts(runner, RAGGED, activation=activation)
    load(oracle, mixed)
    assert names(layer) == names(oracle)
    assert all(parameter is sources[n] for n, parameter in layer.named_parameters())


@every_kind
@both_dims
def test_8_nothing_a_captured_graph_remembers_moves(runner: str, kind: str, dims: Dims) -> None:
    """Addresses, shapes, strides and, whenever it may run, the tensor objects: weights, block scales and every derived scalar."""
    activation = ACTIVATIONS[kind]
    layer = Experts(runner, dims, activation=activation)
    before, objects = pointers(layer), dict[str, torch.Tensor]()
    for step in steps(layer, dims, activation):
        assert pointers(layer) == before, step
        if registry_of(layer).is_ready:
            assert all(buffer is objects.setdefault(n, buffer) for n, buffer in layer.named_buffers()), step
    fresh = loaded(runner, dims, 1, activation=activation)
    assert names(layer) == names(fresh)
    assert all(torch.equal(b.view(torch.uint8), fresh.get_buffer(n).view(torch.uint8)) for n, b in objects.items())


def steps(layer: Experts, dims: Dims, activation: ExpertActivation) -> Iterator[str]:
    a, b = stored(dims, activation=activation), stored(dims, 1, activation=activation)
    load(layer, a)
    yield "loaded"
    layer.method.process_weights_after_loading(layer)
    yield "processed twice"
    load(layer, {k: t for k, t in b.items() if k[0] == 1})
    yield "one expert"
    state = {n: t.clone() for n, t in checkpoint_state_dict(layer).items()}
    with pytest.raises(ReloadError), reload(layer) as session:
        session.update("w2_weight", state["w2_weight"])
    yield "a reload that failed"
    with reload(layer) as session:
        session.load(state)
    yield "a reload"
    load(layer, b)
    yield "loaded again"


#: More than the scratch which is stated.
LARGE = (2, 4096, 1536)


def large(seed: int) -> dict[str, Tensor]:
    e, h, i = LARGE
    random = torch.Generator().manual_seed(seed)

    def draw(*dims: int) -> Tensor:
        return torch.randint(0, 256, dims, generator=random, dtype=torch.uint8)

    return {
        "w13_weight": draw(e, 2 * i, h // 2),
        "w2_weight": draw(e, h, i // 2),
        "w13_weight_scale": (draw(e, 2 * i, h // 16) & 0x77).view(torch.float8_e4m3fn),
        "w2_weight_scale": (draw(e, h, i // 16) & 0x77).view(torch.float8_e4m3fn),
        "w13_weight_scale_2": torch.ones(e, 2),
        "w2_weight_scale_2": torch.ones(e),
        "w13_input_scale": torch.ones(e, 2),
        "w2_input_scale": torch.ones(e),
    }


@every_runner
def test_9_and_10_large_experts_land_in_kernel_order_within_the_stated_scratch(runner: str) -> None:
    tensors, layer = large(0), Experts(runner, LARGE)
    with reload(layer) as session:
        session.load(tensors)
    for seed in (1, 2):
        tensors = large(seed)

        def load_and_process(tensors: dict[str, Tensor] = tensors) -> None:
            for name, tensor in tensors.items():
                layer.get_parameter(name).data.copy_(tensor)
            process(layer)

        assert peak_bytes(load_and_process, torch.device("cpu")) <= STEP_BYTES
        for source, (kernel, order) in orders_of(layer).items():
            expected = ordered(order, tensors[source])
            assert torch.equal(layer.get_buffer(kernel).view(torch.uint8), expected.view(torch.uint8))
    state = checkpoint_state_dict(layer)
    assert all(torch.equal(state[n].contiguous().view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())


def test_10_scratch_does_not_grow_with_the_number_of_experts() -> None:
    peaks = []
    for experts in (8, 32):
        layer = loaded("flashinfer_trtllm_routed", (experts, 256, 256))
        load(layer, stored((experts, 256, 256), 1), process=False)
        peaks.append(peak_bytes(lambda layer=layer: process(layer), torch.device("cpu")))
    assert max(peaks) <= STEP_BYTES


@every_kind
@both_dims
def test_11_every_byte_is_accounted_for_and_no_placeholder_is_left(runner: str, kind: str, dims: Dims) -> None:
    layer = loaded(runner, dims, activation=ACTIVATIONS[kind])
    report = memory_report(layer)
    assert all(row.aliased for row in report.rows) and not report.fallbacks
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
    storages |= {p.data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters() if p.data_ptr() not in storages}
    assert sum(storages.values()) == report.allocated_bytes
    pairs = {row.source: row.derived for row in report.rows if row.derived}
    assert len(pairs) == 4
    assert all(layer.get_parameter(s).data_ptr() == layer.get_buffer(d or "").data_ptr() for s, d in pairs.items())
