"""Regions, bands and scratch, ties, exposures, bulk loads, lossy steps, verdicts, threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aliasparam._convert as convert
from aliasparam import (
    Alias,
    Band,
    Derivation,
    InterleaveHalves,
    PadLast2,
    Reason,
    State,
    SwapHalves,
    TensorSpec,
    Transform,
    bulk_load,
    declare,
    explain,
    expose_for_writing,
    invalidate,
    memory_report,
    process,
    registry_of,
    reload,
)
from aliasparam._verdict import judge
from aliasparam.errors import AdoptionError, DeclarationError, PointerError, ReloadError, StaleKernelError, StateError
from aliasparam.testing import random_values
from aliasparam_nvfp4.layouts import ShuffleRows, Swizzle128x4

from .peak import peak_bytes


def layer_of(tensor: Tensor, transform: Transform, **kwargs: Any) -> Any:
    layer = nn.Module()
    layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    declare(layer, Alias("weight", "prepared", transform), **kwargs)
    return layer


def storage_of(layer: nn.Module, name: str = "weight") -> Any:
    registry = registry_of(layer)
    assert registry is not None
    return registry.sources[name].storage


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return random_values(TensorSpec(shape, torch.uint8), torch.Generator().manual_seed(seed))


# -- regions -------------------------------------------------------------------------------------------------------------


def test_law_6_writing_expert_7_of_384_converts_expert_7_alone(device: torch.device) -> None:
    values = bytes_of(384, 8, 6).to(device)
    layer = layer_of(values, SwapHalves().then(PadLast2(16, 8)))
    assert process(layer) == 384
    before = layer.prepared.clone()

    layer.weight[7].copy_(torch.full((8, 6), 3))

    states = storage_of(layer).states
    assert [i for i, s in enumerate(states) if s is not State.KERNEL] == [7]
    assert process(layer) == 1
    values[7] = 3
    cold = layer_of(values, SwapHalves().then(PadLast2(16, 8)))
    process(cold)
    assert torch.equal(layer.prepared, cold.prepared)
    assert torch.equal(layer.prepared[:7], before[:7]) and torch.equal(layer.prepared[8:], before[8:])


def test_law_6_a_selective_reload_gives_the_bytes_of_a_full_one() -> None:
    values = bytes_of(16, 8, 6)
    layer = layer_of(values, SwapHalves())
    process(layer)
    new = bytes_of(16, 8, 6, seed=1)

    with reload(layer, scope="partial") as session:
        session.update("weight", torch.cat([values[:3], new[3:5], values[5:]]))
    cold = layer_of(torch.cat([values[:3], new[3:5], values[5:]]), SwapHalves())
    process(cold)

    assert torch.equal(layer.prepared, cold.prepared)


# -- bands and scratch ---------------------------------------------------------------------------------------------------

LARGE: dict[str, tuple[Transform, tuple[int, int]]] = {
    "row panels": (Swizzle128x4(), (1280, 64)),
    "row panels, ragged": (Swizzle128x4(), (1219, 61)),
    "blocks of 32 rows": (ShuffleRows(128), (1024, 96)),
    "shuffled and swizzled": (ShuffleRows(128).then(Swizzle128x4()), (1024, 62)),
    "padded both ways": (PadLast2(32, 16), (1001, 75)),
    "padded and shuffled": (PadLast2(32, 1).then(ShuffleRows(128)), (1001, 75)),
    "columns": (SwapHalves(), (1024, 96)),
    "columns, interleaved": (InterleaveHalves(64), (1024, 95)),
    "whole": (SwapHalves().then(Swizzle128x4()), (1024, 96)),
}


@pytest.mark.parametrize("name", LARGE)
def test_law_1_a_region_converted_in_pieces_equals_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    transform, shape = LARGE[name]
    values = bytes_of(*shape).to(device)
    monkeypatch.setattr(convert, "_PIECE_BYTES", 20_000)
    layer = layer_of(values, transform)

    process(layer)
    assert torch.equal(layer.prepared, transform.forward(values))
    layer.weight[0, 0] = values[0, 0]  # back to checkpoint format
    assert storage_of(layer).state is State.CHECKPOINT
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, transform.forward(values)), "the padding was not zeroed again"


@pytest.mark.parametrize("name", [n for n in LARGE if n != "whole"])
def test_law_4_converting_takes_no_more_than_the_stated_scratch(name: str, device: torch.device) -> None:
    transform, (rows, columns) = LARGE[name]
    values = torch.zeros(rows * 8, columns * 96, dtype=torch.uint8, device=device)
    layer = layer_of(values, transform)
    del values
    assert storage_of(layer).plan.nbytes > 2 * convert.SCRATCH_BYTES

    forward = peak_bytes(lambda: process(layer), device)
    back = peak_bytes(lambda: layer.weight[0].zero_(), device)

    assert forward <= convert.SCRATCH_BYTES
    assert back <= convert.SCRATCH_BYTES


def test_law_4_scratch_of_an_uncuttable_region_is_told() -> None:
    layer = layer_of(torch.zeros(4096, 4096, dtype=torch.uint8), SwapHalves().then(Swizzle128x4()))

    assert "converts as a whole, scratch up to 64.00 MiB" in explain(layer)


@dataclass(frozen=True)
class WrongBand(SwapHalves):
    """Halves move across the whole, but it says that pairs of rows convert by themselves."""

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 2)


def test_a_band_that_does_not_convert_by_itself_is_refused_at_declaration() -> None:
    with pytest.raises(DeclarationError, match="does not convert by itself"):
        layer_of(bytes_of(8, 4), WrongBand())


@dataclass(frozen=True)
class MixesRegions(SwapHalves):
    """Says that leading dims are regions, and moves experts."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.roll(1, 0)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.roll(-1, 0)


def test_a_transform_that_mixes_its_regions_is_refused_at_declaration() -> None:
    with pytest.raises(DeclarationError, match="mixes its regions"):
        layer_of(bytes_of(4, 8, 4), MixesRegions())


# -- verdicts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec(Transform):
    """Only for verdicts."""

    pads: bool = False  # type: ignore[misc]
    lossless: bool = True  # type: ignore[misc]

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        raise NotImplementedError

    forward = inverse = output_spec  # type: ignore[assignment]


u8, i8, i16 = torch.uint8, torch.int8, torch.int16


@pytest.mark.parametrize(
    ("source", "derived", "transform", "reason"),
    [
        (((4, 6), u8), ((4, 6), u8), Spec(), Reason.SAME),
        (((4, 6), u8), ((2, 12), u8), Spec(), Reason.SAME_BYTES),
        (((4, 6), u8), ((4, 6), i8), Spec(), Reason.SAME_BYTES),
        (((4, 6), u8), ((8, 8), u8), Spec(pads=True), Reason.PADDED),
        (((1, 6), u8), ((8, 6), u8), Spec(pads=True), Reason.PADDED),
        (((1, 6), u8), ((8, 6), u8), Spec(), Reason.BROADCAST),
        (((1,), u8), ((3,), u8), Spec(), Reason.BROADCAST),
        (((3,), u8), ((1,), u8), Spec(), Reason.BROADCAST),
        (((4, 6), u8), ((4, 5), u8), Spec(), Reason.SMALLER),
        (((4, 6), u8), ((4, 6), i16), Spec(), Reason.ELEMENT_WIDTH),
        (((4, 6), u8), ((4, 6), u8), Spec(lossless=False), Reason.LOSSY),
    ],
)
def test_verdicts(source: Any, derived: Any, transform: Transform, reason: Reason) -> None:
    found = judge(TensorSpec(*source), TensorSpec(*derived), transform)

    assert found is reason
    assert found.aliases == (reason.code in ("same", "same-bytes", "padded"))


@dataclass(frozen=True)
class Halve(Transform):
    """A lossy step: the lowest bit is gone."""

    lossless = False

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor // 2

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        raise NotImplementedError


def test_a_lossy_step_keeps_its_source_and_never_drifts() -> None:
    values = bytes_of(4, 6)
    layer = layer_of(values, Halve())
    for _ in range(3):
        layer.weight[0, 0] = values[0, 0]
        process(layer)
        assert torch.equal(layer.prepared, values // 2)
        assert torch.equal(layer.weight, values)
    assert "[lossy]" in explain(layer)
    with pytest.raises(DeclarationError, match="loses information"):
        module = nn.Module()
        module.weight = nn.Parameter(values, requires_grad=False)
        declare(module, Alias("weight", "prepared", Halve(), on_mismatch="error"))


# -- memory that cannot be declared --------------------------------------------------------------------------------------


def test_overlapping_expanded_and_scattered_sources_are_refused() -> None:
    base = torch.zeros(8, 4)
    module = nn.Module()
    module.a, module.b = nn.Parameter(base[:5], requires_grad=False), nn.Parameter(base[4:], requires_grad=False)
    with pytest.raises(DeclarationError, match="overlap in memory"):
        declare(module, Alias("a", "a_"), Alias("b", "b_"))
    module.c = nn.Parameter(torch.zeros(1, 4).expand(3, 4), requires_grad=False)
    with pytest.raises(DeclarationError, match="share memory"):
        declare(module, Alias("c", "c_"))
    assert type(module.a) is nn.Parameter
    assert registry_of(module) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_names_on_several_devices_are_refused() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.zeros(4), requires_grad=False)
    module.b = nn.Parameter(torch.zeros(4, device="cuda"), requires_grad=False)

    with pytest.raises(DeclarationError, match="several devices"):
        declare(module, Alias("a", "a_"), Alias("b", "b_"))

    assert registry_of(module) is None


def test_a_declared_module_is_not_sent_to_another_process_and_does_not_move() -> None:
    """torch would move its memory into a shared segment, under every captured address."""
    layer = layer_of(bytes_of(4, 6), SwapHalves())
    process(layer)
    address = layer.weight.data_ptr()

    with pytest.raises(AdoptionError, match="another process"):
        ForkingPickler.dumps(layer)

    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, bytes_of(4, 6))


def test_a_transposed_source_gets_contiguous_memory_of_its_own() -> None:
    base = bytes_of(4, 6)
    layer = nn.Module()
    layer.weight = nn.Parameter(base.t(), requires_grad=False)
    declare(layer, Alias("weight", "prepared", SwapHalves()))
    process(layer)

    assert torch.equal(layer.prepared, SwapHalves().forward(base.t()))
    assert torch.equal(base, bytes_of(4, 6)), "the memory of others was not touched"


def test_memory_that_somebody_else_looks_at_is_not_taken_over() -> None:
    values = bytes_of(4, 6)
    parameter = nn.Parameter(values.clone(), requires_grad=False)
    held = parameter.data
    layer = nn.Module()
    layer.weight = parameter
    declare(layer, Alias("weight", "prepared", SwapHalves()))
    process(layer)

    assert torch.equal(held, values), "the other holder sees no kernel bytes"


# -- ties ----------------------------------------------------------------------------------------------------------------


def test_tied_weights_of_two_modules_share_one_storage() -> None:
    a, b = nn.Module(), nn.Module()
    a.weight = b.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    model = nn.ModuleDict({"a": a, "b": b})
    declare(a, Alias("weight", "prepared", SwapHalves()))
    declare(b, Alias("weight", "prepared", SwapHalves()))
    process(model)

    assert a.weight is b.weight
    assert a.prepared.data_ptr() == b.prepared.data_ptr() == a.weight.data_ptr()
    assert memory_report(model).allocated_bytes == 24
    assert list(dict(model.named_parameters())) == ["a.weight"]
    b.weight.copy_(bytes_of(4, 6, seed=2))
    for module in (a, b):
        with pytest.raises(StaleKernelError):
            module()
    process(model)
    assert torch.equal(a.prepared, SwapHalves().forward(bytes_of(4, 6, seed=2)))
    with pytest.raises(NotImplementedError):  # nn.Module's own: it would run
        a()


def test_a_tie_to_two_formats_is_refused() -> None:
    a, b = nn.Module(), nn.Module()
    a.weight = b.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    declare(a, Alias("weight", "prepared", SwapHalves()))

    with pytest.raises(DeclarationError, match="two different kernel formats"):
        declare(b, Alias("weight", "prepared", PadLast2(8, 8)))


# -- exposures -----------------------------------------------------------------------------------------------------------


def test_an_exposure_names_the_bytes_and_nothing_reads_meanwhile(device: torch.device) -> None:
    values = bytes_of(4, 8, 6).to(device)
    layer = layer_of(values, SwapHalves().then(PadLast2(16, 8)))
    process(layer)

    exposure = expose_for_writing(layer, "weight", slice(1, 3), writer="RDMA")
    assert exposure.address == exposure.memory.data_ptr()
    for action in (lambda: layer.weight.clone(), lambda: layer.weight[0].zero_(), lambda: process(layer)):
        with pytest.raises(StateError, match="exposed to RDMA"):
            action()
    with pytest.raises(StaleKernelError):
        layer()
    exposure.memory[1].fill_(9)  # as a remote writer would, past every operator
    exposure.written(slice(1, 2))
    with pytest.raises(ReloadError, match="closed already"):
        exposure.written()

    values[2] = 9
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, SwapHalves().then(PadLast2(16, 8)).forward(values))


def test_what_was_never_loaded_is_loaded_by_what_was_written_and_no_more() -> None:
    values = bytes_of(4, 8, 6)
    layer = layer_of(torch.zeros_like(values), SwapHalves(), loaded=False)
    exposure = expose_for_writing(layer, "weight")
    exposure.memory.copy_(values)
    exposure.written(slice(0, 3))

    with pytest.raises(StateError, match=r"partly written|empty"):
        process(layer)
    with expose_for_writing(layer, "weight", slice(3, 4)) as last:
        last.memory.copy_(values[3:])
    process(layer)
    assert torch.equal(layer.prepared, SwapHalves().forward(values))


def test_an_abandoned_exposure_leaves_a_refusal() -> None:
    layer = layer_of(bytes_of(4, 8, 6), SwapHalves())
    process(layer)
    with pytest.raises(RuntimeError, match="link down"), expose_for_writing(layer, "weight", slice(2, 3)):
        raise RuntimeError("link down")

    with pytest.raises(StateError, match="invalid"):
        process(layer)
    layer.weight[2].copy_(torch.zeros(8, 6))
    assert process(layer) >= 1
    with pytest.raises(ReloadError, match="only declared checkpoint names"):
        expose_for_writing(layer, "prepared")


# -- bulk loads ----------------------------------------------------------------------------------------------------------


def test_law_8_a_bulk_load_that_fails_leaves_a_refusal() -> None:
    layer = layer_of(bytes_of(4, 6), SwapHalves())
    process(layer)
    with pytest.raises(RuntimeError, match="disk"), bulk_load(layer):
        layer.weight.data[0] = 1
        raise RuntimeError("disk")

    with pytest.raises(StaleKernelError):
        layer()
    with pytest.raises(StateError, match="invalid"):
        layer.weight.clone()


def test_a_name_from_before_a_bulk_load_refuses_inside_it() -> None:
    layer = layer_of(bytes_of(4, 6), SwapHalves())
    before = layer.weight
    with bulk_load(layer):
        assert type(layer.weight) is nn.Parameter
        with pytest.raises(StateError, match="a bulk load"):
            before.copy_(torch.zeros(4, 6))
        with pytest.raises(StateError, match="exposed"), bulk_load(layer):
            pass
        layer.weight = replacement = nn.Parameter(bytes_of(4, 6, seed=3), requires_grad=False)  # loaders replace, too
    process(layer)

    assert layer.weight is replacement and layer.weight.data_ptr() == before.data_ptr()
    assert torch.equal(before, layer.weight)
    assert torch.equal(layer.prepared, SwapHalves().forward(bytes_of(4, 6, seed=3)))


# -- sleep ---------------------------------------------------------------------------------------------------------------


def test_law_8_after_sleep_nothing_reads_until_it_is_loaded_whole() -> None:
    layer = layer_of(bytes_of(4, 6), SwapHalves())
    process(layer)
    address = layer.prepared.data_ptr()
    invalidate(layer)

    for action in (lambda: layer.weight.clone(), lambda: process(layer), lambda: layer.weight.add_(1)):
        with pytest.raises(StateError, match="invalid"):
            action()
    with pytest.raises(StaleKernelError):
        layer()
    layer.weight.copy_(bytes_of(4, 6))
    process(layer)
    assert layer.prepared.data_ptr() == address


# -- threads -------------------------------------------------------------------------------------------------------------


def test_law_1_eight_threads_load_and_process_at_once() -> None:
    layer = layer_of(bytes_of(8, 64, 32), SwapHalves().then(PadLast2(128, 64)))
    process(layer)
    failures: list[BaseException] = []

    def work(expert: int) -> None:
        try:
            for step in range(30):
                layer.weight[expert].copy_(torch.full((64, 32), step, dtype=torch.uint8))
                if step % 7 == expert % 7:
                    process(layer)
                found = layer.weight[expert].clone()
                assert bool((found == step).all()), found
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(e,)) for e in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    process(layer)
    assert bool((layer.weight == 29).all())
    assert torch.equal(
        layer.prepared, SwapHalves().then(PadLast2(128, 64)).forward(torch.full((8, 64, 32), 29, dtype=torch.uint8))
    )


# -- derivations ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_derivations_refreshes_in_order_and_keeps_addresses() -> None:
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.tensor([1.0, 4.0]), requires_grad=False)
    declare(
        layer,
        Derivation("c", ("b",), torch.sqrt, (1,), torch.float32),
        Derivation("b", ("a",), torch.reciprocal, (1,), torch.float32),
        Derivation("a", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32),
    )
    process(layer)
    addresses = [layer.get_buffer(n).data_ptr() for n in "abc"]
    layer.scale[1] = 16.0
    assert process(layer) == 3

    assert layer.c.item() == 0.25
    assert [layer.get_buffer(n).data_ptr() for n in "abc"] == addresses
    assert process(layer) == 0


# -- retarget ------------------------------------------------------------------------------------------------------------


def test_retarget_changes_the_kernel_format_in_place_and_back() -> None:
    values = bytes_of(3, 8, 6)
    padded = SwapHalves().then(PadLast2(16, 8))
    layer = nn.Module()
    layer.weight = nn.Parameter(values.clone(), requires_grad=False)
    registry = declare(layer, Alias("weight", "prepared", SwapHalves(), room_for=(padded,)))
    process(layer)
    address = layer.prepared.data_ptr()

    for transform in (padded, SwapHalves(), InterleaveHalves(2), padded):
        registry.retarget({"weight": transform})
        with pytest.raises(StaleKernelError):
            layer()
        process(layer)
        assert torch.equal(layer.prepared, transform.forward(values))
        assert torch.equal(layer.weight, values)
        assert layer.prepared.data_ptr() == address


def test_retarget_refuses_what_does_not_fit() -> None:
    layer = layer_of(bytes_of(3, 8, 6), SwapHalves())
    registry = registry_of(layer)
    assert registry is not None
    with pytest.raises(PointerError, match="Plan room"):
        registry.retarget({"weight": PadLast2(16, 8)})
    with pytest.raises(DeclarationError, match="only a source with an aliased kernel name"):
        registry.retarget({"prepared": SwapHalves()})
    other = nn.Module()
    other.weight = layer.weight
    declare(other, Alias("weight", "prepared", SwapHalves()))
    with pytest.raises(DeclarationError, match="tied"):
        registry.retarget({"weight": InterleaveHalves(2)})
    assert process(layer) == 3


def test_a_hook_runs_after_something_was_converted_and_only_then() -> None:
    layer = layer_of(bytes_of(8, 6), SwapHalves())
    registry = registry_of(layer)
    assert registry is not None
    seen: list[object] = []
    registry.on_processed.append(seen.append)

    process(layer)
    process(layer)
    layer.weight[0] = 1
    process(layer)

    assert seen == [registry, registry]
