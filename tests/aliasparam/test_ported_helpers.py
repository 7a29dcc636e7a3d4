"""A process_weights_after_loading written for SGLang's two helpers keeps working, with what was wrong mended."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import (
    Alias,
    AliasedStorage,
    Declaration,
    Derivation,
    Keep,
    accept_kernel_bytes,
    alias_or_bind_derived_param,
    copy_or_rebind_param,
    declare,
    expose_for_writing,
    invalidate,
    memory_report,
    process,
    reload,
)
from aliasparam.errors import DeclarationError, PointerError, StaleKernelError, StateError
from aliasparam.module.registry import registry_of
from aliasparam.reload.observe import Hooks

from .small import SWAP, storage_of
from .test_law_10_atomicity import lines_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_scale = nn.Parameter(torch.arange(12, dtype=torch.uint8).view(4, 3), requires_grad=False)
        self.weight_scale_2 = nn.Parameter(torch.tensor([1.0, 1.0, 2.0]), requires_grad=False)

    def process(self) -> None:
        alias_or_bind_derived_param(self, "weight_scale", "weight_scale_interleaved", self.weight_scale.flip(0))
        copy_or_rebind_param(self, "alpha", self.weight_scale_2.max())

    def forward(self) -> Tensor:
        return self.get_buffer("weight_scale_interleaved").clone()


def test_same_shape_shares_memory_and_a_second_load_keeps_every_address() -> None:
    layer = Layer()
    layer.process()
    addresses = [t.data_ptr() for t in (layer.weight_scale, layer.weight_scale_interleaved, layer.alpha)]
    assert addresses[0] == addresses[1]

    layer.weight_scale.copy_(torch.arange(12, 24, dtype=torch.uint8).view(4, 3))
    with pytest.raises(StaleKernelError):
        layer()
    layer.process()

    assert torch.equal(layer(), torch.arange(12, 24, dtype=torch.uint8).view(4, 3).flip(0))
    assert addresses == [t.data_ptr() for t in (layer.weight_scale, layer.weight_scale_interleaved, layer.alpha)]
    assert memory_report(layer).allocated_bytes == 12


def test_the_source_name_does_not_show_kernel_bytes() -> None:
    layer = Layer()
    layer.process()

    with pytest.raises(StateError, match="order was not declared"):
        layer.weight_scale.clone()
    with pytest.raises(StateError, match="order was not declared"):
        layer.process()  # a second pass without a load would swizzle swizzled bytes


def test_a_reload_is_whole_tensor() -> None:
    layer = Layer()
    layer.process()

    layer.weight_scale[:2] = 1
    with pytest.raises(StateError, match="partly written"):
        layer.weight_scale.clone()
    layer.weight_scale[2:] = 1

    assert torch.equal(layer.weight_scale, torch.ones(4, 3, dtype=torch.uint8))


def test_a_scalar_is_not_broadcast_into_the_partitions_of_fused_qkv() -> None:
    layer = Layer()

    alias_or_bind_derived_param(layer, "weight_scale_2", "alpha", torch.tensor(2.0))

    assert layer.alpha.shape == ()
    assert torch.equal(layer.weight_scale_2, torch.tensor([1.0, 1.0, 2.0]))


def test_another_shape_gets_memory_of_its_own_and_never_moves() -> None:
    layer = Layer()
    alias_or_bind_derived_param(layer, "weight_scale", "padded", torch.zeros(8, 3, dtype=torch.uint8))
    address = layer.padded.data_ptr()
    alias_or_bind_derived_param(layer, "weight_scale", "padded", torch.ones(8, 3, dtype=torch.uint8))

    assert layer.padded.data_ptr() == address
    assert torch.equal(layer.weight_scale, torch.arange(12, dtype=torch.uint8).view(4, 3))
    with pytest.raises(PointerError):
        copy_or_rebind_param(layer, "padded", torch.ones(16, 3, dtype=torch.uint8))


def test_the_value_is_copied_not_adopted() -> None:
    layer, value = Layer(), torch.tensor([1.0])
    copy_or_rebind_param(layer, "new", value)
    value.zero_()

    assert layer.new.item() == 1.0


def test_a_view_of_the_source_itself_is_taken_as_a_value() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.arange(16, dtype=torch.uint8).view(4, 4), requires_grad=False)
    for first in (0, 100):
        module.w.copy_(torch.arange(first, first + 16, dtype=torch.uint8).view(4, 4))
        alias_or_bind_derived_param(module, "w", "transposed", module.w.t())

        assert torch.equal(module.transposed, torch.arange(first, first + 16, dtype=torch.uint8).view(4, 4).t())
        assert module.transposed.data_ptr() == module.w.data_ptr()
    alias_or_bind_derived_param(module, "w", "transposed", module.transposed.t())
    assert torch.equal(module.transposed, torch.arange(100, 116, dtype=torch.uint8).view(4, 4))


@pytest.mark.parametrize("declaration", [Keep("w"), Derivation("k", ("w",), lambda w: w.sum().reshape(1), (1,), torch.int64)])
def test_a_source_declared_without_a_kernel_name_says_so(declaration: Declaration) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    declare(module, declaration)

    with pytest.raises(DeclarationError, match="without a kernel name"):
        alias_or_bind_derived_param(module, "w", "d", torch.ones(4, 4, dtype=torch.uint8))
    assert torch.equal(module.w, torch.zeros(4, 4, dtype=torch.uint8))


def test_a_pair_declared_with_a_transform_says_so() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    declare(module, Alias("w", "d", SWAP))

    with pytest.raises(DeclarationError, match="declared with a layout"):
        alias_or_bind_derived_param(module, "w", "d", torch.ones(4, 4, dtype=torch.uint8))


def test_law_3_a_name_with_memory_of_its_own_keeps_it_when_a_value_fits_the_source() -> None:
    layer = Layer()
    alias_or_bind_derived_param(layer, "weight_scale", "prepared", torch.zeros(8, 3, dtype=torch.uint8))
    address = layer.prepared.data_ptr()

    with pytest.raises(PointerError):
        alias_or_bind_derived_param(layer, "weight_scale", "prepared", torch.ones(4, 3, dtype=torch.uint8))

    assert layer.prepared.data_ptr() == address
    assert torch.equal(layer.weight_scale, torch.arange(12, dtype=torch.uint8).view(4, 3))
    assert memory_report(layer).allocated_bytes == 12 + 24

    layer.other = nn.Parameter(torch.zeros(4, 3, dtype=torch.uint8), requires_grad=False)
    address = layer.other.data_ptr()
    alias_or_bind_derived_param(layer, "weight_scale", "other", torch.ones(4, 3, dtype=torch.uint8))
    assert layer.other.data_ptr() == address
    assert layer.other.unique().tolist() == [1]
    assert {row.derived: row.reason.code for row in memory_report(layer).rows if row.reason} == {
        "prepared": "undeclared-shape",
        "other": "own-memory",
    }


@pytest.mark.parametrize("loaded_before", [False, True])
def test_law_10_a_value_that_torch_cannot_copy_leaves_the_weights(loaded_before: bool) -> None:
    layer = Layer()
    expected = layer.weight_scale.clone()
    if loaded_before:
        layer.process()
        layer.weight_scale.copy_(expected)

    with pytest.raises(RuntimeError, match="sparse"):
        alias_or_bind_derived_param(layer, "weight_scale", "weight_scale_interleaved", expected.to_sparse())

    assert torch.equal(layer.weight_scale.clone(), expected)
    layer.process()
    assert torch.equal(layer(), expected.flip(0))


def test_law_10_the_first_kernel_bytes_beside_a_name_of_its_own_are_whole_or_refuse() -> None:
    """A value that torch cannot copy, or an interrupt, serves no checkpoint values under the new kernel name."""
    value = torch.arange(12, dtype=torch.uint8).view(4, 3)

    def made() -> Script:
        layer = Script("padded")
        layer.process()
        return layer

    def again(layer: Script) -> None:
        alias_or_bind_derived_param(layer, "w", "flipped", value.flip(0))

    layer = made()
    with pytest.raises(RuntimeError, match="sparse"):
        alias_or_bind_derived_param(layer, "w", "flipped", value.to_sparse())
    need_derived(layer, value)
    assert not hasattr(layer, "flipped") and torch.equal(layer.w, value)

    again(made())  # what is kept between calls is there
    lines = lines_of(partial(again, made()))
    for at in sorted({lines.index(line) for line in lines}):
        layer = made()
        lines_of(partial(again, layer), at)
        for verb in (layer, partial(process, layer)):
            try:
                verb()
                assert not hasattr(layer, "flipped") or torch.equal(layer.flipped, value.flip(0)), lines[at]
            except (StateError, StaleKernelError):
                pass
        again(layer)
        alias_or_bind_derived_param(layer, "w", "padded", DERIVED["padded"](value))
        layer.names = ("padded", "flipped")
        need_derived(layer, value)


def test_undeclared_code_gives_kernel_bytes_to_a_source_that_is_shown_as_shards() -> None:
    layer, value = Script("flipped"), torch.arange(12, dtype=torch.uint8).view(4, 3)
    layer.process()
    layer.halves = nn.ParameterDict()
    registry = registry_of(layer)
    assert registry is not None
    registry.show_shards("w", [(layer.halves, "top", layer.w[:2]), (layer.halves, "bottom", layer.w[2:])])
    layer.halves.top.data.copy_(value[2:])
    layer.halves.bottom.data.copy_(value[:2])
    alias_or_bind_derived_param(layer, "w", "flipped", value)
    assert torch.equal(layer()["flipped"], value)


def test_law_8_kernel_bytes_of_undeclared_code_are_brought_into_no_other_order() -> None:
    layer = Script("flipped")
    layer.process()
    with pytest.raises(DeclarationError, match="kernel bytes of undeclared code are in no known order"):
        registry_of(layer).retarget({"w": SWAP})  # type: ignore[union-attr]
    need_derived(layer, torch.arange(12, dtype=torch.uint8).view(4, 3))


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("value", [None, 3, "alpha", torch.max])
def test_a_value_that_is_no_tensor_is_refused(value: object, bound: bool) -> None:
    layer = Layer()
    if bound:
        layer.process()

    with pytest.raises(DeclarationError, match="alpha: this value is no tensor"):
        copy_or_rebind_param(layer, "alpha", value)  # type: ignore[arg-type]

    assert not bound or torch.equal(layer.get_parameter("alpha"), torch.tensor(2.0))


def written(layer: Layer) -> Layer:
    layer.weight_scale.copy_(torch.arange(12, 24, dtype=torch.uint8).view(4, 3))
    return layer


def test_law_8_what_undeclared_code_has_not_converted_since_a_load_is_not_served() -> None:
    """Checkpoint values are no kernel bytes, whoever processes: a verb, a reload, or that of a copy."""
    layer = Layer()
    layer.process()
    for one in (written(layer), copy.deepcopy(layer)):
        with pytest.raises(StateError, match="nobody declared what makes kernel bytes"):
            process(one)
        with pytest.raises(StaleKernelError):
            one()
    with pytest.raises(StateError, match="nobody declared"), reload(layer, scope="partial") as session:
        session.load({"weight_scale": torch.zeros(4, 3, dtype=torch.uint8)})
    with pytest.raises(StaleKernelError):
        layer()

    written(layer).process()
    process(layer)
    assert torch.equal(layer(), torch.arange(12, 24, dtype=torch.uint8).view(4, 3).flip(0))


def test_law_10_an_interrupt_before_the_first_bytes_of_undeclared_code_leaves_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    layer = Layer()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AliasedStorage, "put_foreign", interrupted)
        layer.process()
    with pytest.raises(StateError, match="nobody declared"):
        process(layer)

    layer.process()
    assert torch.equal(layer(), torch.arange(12, dtype=torch.uint8).view(4, 3).flip(0))


def test_law_8_kernel_bytes_of_undeclared_code_that_are_put_back_are_no_checkpoint_values() -> None:
    layer = Layer()
    layer.process()
    saved = layer().clone()

    def wake() -> None:
        invalidate(layer)
        storage_of(layer, "weight_scale").buffer.copy_(saved.view(-1))
        accept_kernel_bytes(layer)

    def lend() -> None:
        with expose_for_writing(layer, "weight_scale", order="kernel") as exposure:
            exposure.memory.copy_(saved)

    for put_back in (wake, lend):
        put_back()
        process(layer)
        assert torch.equal(layer(), saved)
        with pytest.raises(StateError, match="order was not declared"):
            layer.weight_scale.clone()
        assert layer.weight_scale.untyped_storage().device.type == "meta"


def test_a_tensor_without_elements_is_never_waited_for() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(0, 4), requires_grad=False)
    alias_or_bind_derived_param(module, "w", "k", torch.zeros(0, 4))

    assert process(module) == 0


def test_law_8_undeclared_code_of_a_tied_module_makes_no_bytes_for_a_declared_name() -> None:
    declared, ported = nn.Module(), nn.Module()
    declared.w = ported.w = nn.Parameter(torch.arange(8.0), requires_grad=False)
    declare(declared, Alias("w", "k"))
    process(declared)

    alias_or_bind_derived_param(ported, "w", "k", torch.arange(8.0).flip(0))
    with pytest.raises(StateError, match="order was not declared"):
        process(declared)

    ported.w.copy_(torch.ones(8))
    process(declared)
    assert torch.equal(declared.k, torch.ones(8))
    with pytest.raises(StateError, match="nobody declared"):
        process(ported)


def test_undeclared_code_of_a_module_that_is_gone_waits_for_nobody() -> None:
    declared, ported = nn.Module(), nn.Module()
    declared.w = ported.w = nn.Parameter(torch.arange(8.0), requires_grad=False)
    declare(declared, Alias("w", "k"))
    alias_or_bind_derived_param(ported, "w", "k", torch.arange(8.0).flip(0))
    accept_kernel_bytes(declared)
    with pytest.raises(StateError, match="order was not declared"):
        process(declared)

    del ported
    gc.collect()
    accept_kernel_bytes(declared)
    process(declared)
    assert torch.equal(declared.k, torch.arange(8.0).flip(0)) and torch.equal(declared.w, declared.k)


#: What undeclared code derives from the source: in its memory, and in memory of its own for three reasons.
DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda w: w.flip(0),
    "padded": lambda w: torch.nn.functional.pad(w, (0, 0, 0, 4)),
    "largest": lambda w: w.max(),
    "wide": lambda w: w.int(),
}


class Script(nn.Module):
    """Undeclared code that derives some names, in this order, from one source."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(12, dtype=torch.uint8).view(4, 3), requires_grad=False)
        self.names = names

    def process(self) -> None:
        values = {name: DERIVED[name](self.w) for name in self.names}
        for name, value in values.items():
            alias_or_bind_derived_param(self, "w", name, value)

    def forward(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name).clone() for name in self.names}


def loaded(first: int) -> tuple[Tensor, Callable[[Script], None]]:
    value = torch.arange(first, first + 12, dtype=torch.uint8).view(4, 3)
    return value, lambda one: one.load_state_dict({"w": value}) and None


def need_derived(layer: Script, value: Tensor) -> None:
    found = layer()
    assert all(torch.equal(found[name], DERIVED[name](value)) for name in layer.names), found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "names", [order for n in (1, 2, 3) for order in itertools.permutations(["flipped", "padded", "wide"], n)]
)
def test_laws_3_and_8_any_names_of_one_source_are_served_in_any_order_and_refuse_from_a_load_on(
    names: tuple[str, ...], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    layer = Script(*names)
    with mode():
        layer.process()
    addresses = [getattr(layer, name).data_ptr() for name in names]
    assert "flipped" not in names or addresses[names.index("flipped")] == layer.w.data_ptr()
    need_derived(layer, torch.arange(12, dtype=torch.uint8).view(4, 3))
    assert process(layer) == 0

    for first in (20, 40):
        value, load = loaded(first)
        load(layer)
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            for name in names:
                with pytest.raises(StaleKernelError):
                    getattr(one, name).clone()
            with pytest.raises(StateError, match=rf"({'|'.join(names)}): cannot process: nobody declared(.|\n)*Call it"):
                process(one)
            with pytest.raises(StaleKernelError):
                one()
        layer.process()
        need_derived(layer, value)
        need_derived(copy.deepcopy(layer), value)
        assert process(layer) == 0
        assert addresses == [getattr(layer, name).data_ptr() for name in names]
    assert set(layer.state_dict()) == {"w"}


def test_law_8_one_name_that_was_not_derived_again_keeps_the_module_from_running() -> None:
    layer = Script("padded", "flipped", "wide")
    layer.process()
    for left in layer.names:
        value, load = loaded(50)
        load(layer)
        for name in set(layer.names) - {left}:
            alias_or_bind_derived_param(layer, "w", name, DERIVED[name](value))
        with pytest.raises(StateError, match=f"{left}: cannot process: nobody declared"):
            process(layer)
        with pytest.raises(StaleKernelError):
            layer()
        alias_or_bind_derived_param(layer, "w", left, DERIVED[left](value))
        need_derived(layer, value)


@pytest.mark.parametrize("policy", ["staged", "staged-journal"])
def test_law_8_a_reload_ends_where_its_script_derives_names_of_their_own(policy: Any) -> None:
    layer = Script("padded", "largest")
    layer.process()
    value, _ = loaded(20)
    with pytest.raises(StateError, match="padded: cannot process: nobody declared"), reload(layer, policy=policy) as session:
        session.load({"w": value})
    if policy == "staged":
        with pytest.raises(StaleKernelError):
            layer()
    else:
        need_derived(layer, torch.arange(12, dtype=torch.uint8).view(4, 3))
    with reload(layer, policy=policy, hooks=Hooks(on_commit=[lambda *_: layer.process()])) as session:
        session.load({"w": value})
    need_derived(layer, value)


class Failed(Exception):
    pass


def failing(layer: Script, *, runs: bool = False) -> Any:
    def fail(*_: object) -> None:
        if runs:
            layer.process()
        raise Failed

    return Hooks(on_commit=[fail])


@pytest.mark.parametrize("policy", ["journal", "staged-journal"])
@pytest.mark.parametrize("names", [("padded",), ("flipped",), ("flipped", "wide"), ("padded", "flipped")])
@pytest.mark.parametrize("rows", [4, 1])
def test_law_10_an_abort_gives_back_what_undeclared_code_derived(names: tuple[str, ...], policy: Any, rows: int) -> None:
    """Kernel bytes that it put in the source's memory, and names of their own, without its script; those of a tied module too."""
    layer, tied = Script(*names), Script("padded")
    tied.w = layer.w
    layer.process()
    tied_ready = "flipped" not in names  # else there are no checkpoint values to derive from
    if tied_ready:
        tied.process()
    old, addresses = layer(), [getattr(layer, name).data_ptr() for name in names]
    for _ in range(2):
        with pytest.raises(Failed), reload(layer, policy=policy, scope="partial", hooks=failing(layer)) as session:
            session.update("w", torch.zeros(rows, 3, dtype=torch.uint8), first_row=0)
            if rows < 4:
                session.update("w", torch.ones(3, 3, dtype=torch.uint8), first_row=1)
        for found in (layer(), copy.deepcopy(layer)()):
            assert all(torch.equal(found[name], old[name]) for name in names)
        assert process(layer) == 0
        assert not tied_ready or torch.equal(tied()["padded"], old["padded"])
    assert addresses == [getattr(layer, name).data_ptr() for name in names]
    value, load = loaded(20)
    load(layer)
    layer.process()
    need_derived(layer, value)


def test_law_8_an_abort_gives_back_checkpoint_values_that_undeclared_code_has_not_seen() -> None:
    layer, (value, load) = Script("flipped"), loaded(20)
    layer.process()
    load(layer)
    with pytest.raises(Failed), reload(layer, policy="journal", hooks=failing(layer)) as session:
        session.load({"w": torch.zeros(4, 3, dtype=torch.uint8)})

    assert torch.equal(layer.w, value)
    with pytest.raises(StaleKernelError):
        layer()
    layer.process()
    need_derived(layer, value)


@pytest.mark.parametrize("names", [("padded",), ("flipped",)])
def test_law_8_an_abort_after_the_script_ran_again_leaves_a_refusal(names: tuple[str, ...]) -> None:
    layer = Script(*names)
    layer.process()
    with pytest.raises(Failed), reload(layer, policy="journal", hooks=failing(layer, runs=True)) as session:
        session.load({"w": torch.zeros(4, 3, dtype=torch.uint8)})
    with pytest.raises(StaleKernelError):
        layer()


def test_law_8_an_own_name_that_other_code_wrote_is_not_served() -> None:
    layer = Script("padded")
    layer.process()
    layer.padded.zero_()
    with pytest.raises(StateError, match="padded: cannot process"):
        process(layer)
    layer.process()
    need_derived(layer, layer.w.clone())


def test_accepted_kernel_bytes_are_those_of_own_names_too() -> None:
    """Of a tied module too."""
    layer, tied = Script("padded"), Script("largest")
    tied.w = layer.w
    layer.process()
    tied.process()
    model, saved = nn.ModuleList([layer, tied]), layer()["padded"]
    invalidate(model)
    registry_of(layer).derived["padded"].kernel.memory.copy_(saved)  # type: ignore[union-attr]
    accept_kernel_bytes(model)
    process(model)
    assert torch.equal(layer()["padded"], saved) and tied()["largest"] == 11


@pytest.mark.parametrize("shape", [(4, 3), (8, 3)])
def test_law_10_an_interrupt_of_undeclared_code_leaves_old_new_or_a_refusal(shape: tuple[int, int]) -> None:
    old, new = torch.ones(shape, dtype=torch.uint8), torch.full(shape, 2, dtype=torch.uint8)

    def made() -> Script:
        layer = Script("k")
        alias_or_bind_derived_param(layer, "w", "k", old)
        layer.load_state_dict({"w": torch.zeros(4, 3, dtype=torch.uint8)})
        return layer

    def again(layer: Script) -> None:
        alias_or_bind_derived_param(layer, "w", "k", new)

    again(made())  # what is kept between calls is there
    lines = lines_of(partial(again, made()))
    for at in sorted({lines.index(line) for line in lines}):
        layer = made()
        lines_of(partial(again, layer), at)
        try:
            process(layer)
            assert torch.equal(layer()["k"], new), lines[at]
        except (StateError, StaleKernelError):
            again(layer)
            assert torch.equal(layer()["k"], new), lines[at]


@pytest.mark.parametrize("name", ["w", "tied", "view"])
def test_a_name_that_shows_the_source_is_no_derived_name(name: str) -> None:
    layer = Script()
    layer.tied = layer.w
    layer.register_buffer("view", layer.w.data)
    before = layer.w.clone()

    with pytest.raises(DeclarationError, match="declared twice"):
        alias_or_bind_derived_param(layer, "w", name, torch.ones(4, 3, dtype=torch.uint8))
    assert torch.equal(layer.w, before)


def test_a_name_that_is_declared_otherwise_is_no_derived_name() -> None:
    layer = Script()
    declare(layer, Derivation("largest", ("w",), DERIVED["largest"], (), torch.uint8))
    process(layer)

    with pytest.raises(DeclarationError, match="declared twice"):
        alias_or_bind_derived_param(layer, "w", "largest", torch.tensor(1, dtype=torch.uint8))
    need_derived(layer, layer.w.clone())


def test_what_is_declared_beside_own_names_is_processed() -> None:
    """A derivation from a name of its own too; and processing sees a source that only the helper was called for."""
    layer, seen = Script("padded"), list[object]()
    declare(layer, Alias("w", "k", SWAP), on_processed=[seen.append])
    layer.process()
    assert seen == []
    with pytest.raises(StaleKernelError):
        layer()
    declare(layer, Derivation("total", ("padded",), lambda p: p.sum().reshape(1), (1,), torch.int64))
    process(layer)
    for first in (20, 40):
        value, load = loaded(first)
        load(layer)
        layer.process()
        with pytest.raises(StaleKernelError):
            layer()
        count = len(seen)
        assert process(layer) > 0 and len(seen) == count + 1
        assert layer.get_buffer("total").item() == value.sum().item()
        layer.process()  # without a load
        process(layer)
        need_derived(layer, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_own_names_go_where_their_source_goes() -> None:
    layer = Script("padded", "wide")
    layer.process()

    layer.cuda()
    process(layer)

    assert all(getattr(layer, name).is_cuda for name in layer.names)
    found = {name: value.cpu() for name, value in layer().items()}
    assert all(torch.equal(found[name], DERIVED[name](torch.arange(12, dtype=torch.uint8).view(4, 3))) for name in found)
