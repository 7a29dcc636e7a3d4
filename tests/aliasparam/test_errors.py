"""Every bad input is a named error that says where, what was expected, what was found, and what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import (
    Alias,
    AliasedStorage,
    Derivation,
    Keep,
    Reencoding,
    State,
    TensorSpec,
    accept_kernel_bytes,
    alias_or_bind_derived_param,
    apply_delta,
    checkpoint_digest,
    checkpoint_state_dict,
    copy_or_rebind_param,
    declare,
    explain,
    expose_for_writing,
    invalidate,
    memory_report,
    process,
    registry_of,
    reload,
)
from aliasparam.errors import (
    AdoptionError,
    AliasError,
    DeclarationError,
    DerivationError,
    LayoutError,
    MemoryFreedError,
    PointerError,
    ReloadError,
    StaleKernelError,
    StateError,
)
from aliasparam.reload import prepare_delta

from .small import PAD8, SWAP

U, F32 = torch.uint8, torch.float32
Do = Callable[[], Any]


def module(**parameters: Tensor) -> nn.Module:
    made = nn.Module()
    for name, value in parameters.items():
        made.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return made


class Layer(nn.Module):
    def __init__(self, *, loaded: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(48, dtype=U).view(6, 8), requires_grad=False)
        declare(self, Alias("weight", "prepared", SWAP), loaded=loaded)
        if loaded:
            process(self)

    def forward(self) -> Tensor:
        return self.get_buffer("prepared").clone()


def after(*steps: Callable[[Layer], Any], loaded: bool = True) -> Do:
    """The last step is the bad one."""

    def run() -> None:
        layer = Layer(loaded=loaded)
        for step in steps:
            step(layer)

    return run


def largest(s: Tensor) -> Tensor:
    return s.max().reshape(1)


def raises(tensor: Tensor) -> Tensor:
    raise LayoutError("these values have no such format")


REFUSES = Reencoding(raises, lambda spec: spec)


def declaring(*declarations: Any, **parameters: Tensor) -> Do:
    return lambda: declare(module(**(parameters or {"a": torch.zeros(4, 2)})), *declarations)


def declaring_later(first: Any, second: Any) -> Do:
    def run() -> None:
        made = module(a=torch.zeros(4, 2))
        declare(made, first)
        declare(made, second)

    return run


def processing(declaration: Any, value: Tensor) -> Do:
    def run() -> None:
        made = module(a=value)
        declare(made, declaration)
        process(made)

    return run


def overlapping(*names: str) -> Do:
    memory = torch.zeros(8, 2)
    return declaring(*(Alias(n, f"{n}_k") for n in names), a=memory[:5], c=memory[3:])


def uninitialized() -> None:
    lazy = nn.LazyLinear(4)
    declare(lazy, Alias("weight", "k"))


def unequal(layout: Any, **options: Any) -> Alias:
    return Alias("a", "x", layout, **options)


def reloading(*steps: Callable[[Any], Any]) -> Callable[[Layer], None]:
    def run(layer: Layer) -> None:
        with reload(layer) as session:
            for step in steps:
                step(session)

    return run


def replace(layer: Layer) -> None:
    layer.weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def free(layer: Layer) -> None:
    layer.get_buffer("prepared").untyped_storage().resize_(0)


def show(layer: Layer, shard: Tensor) -> None:
    registry = registry_of(layer)
    assert registry is not None
    registry.show_shards("weight", [(nn.Module(), "q", shard)])


cycle = (Derivation("x", ("y",), largest, (1,), F32), Derivation("y", ("x",), largest, (1,), F32))
zeros = torch.zeros(6, 8, dtype=U)

DECLARING: dict[str, tuple[type[AliasError], Do]] = {
    "a source declared twice": (DeclarationError, declaring(Alias("a", "c"), Alias("a", "d"))),
    "a derived name declared twice": (
        DeclarationError,
        declaring(Alias("a", "c"), Alias("b", "c"), a=torch.zeros(4, 2), b=torch.zeros(4, 2)),
    ),
    "a conflict in a second declare": (DeclarationError, declaring_later(Alias("a", "c"), Alias("a", "d", SWAP))),
    "a cycle of derivations": (DeclarationError, declaring(*cycle)),
    "a cycle of aliases": (DeclarationError, declaring(Alias("a", "b"), Alias("b", "a"))),
    "sources that overlap": (DeclarationError, overlapping("a", "c")),
    "another Parameter that overlaps": (DeclarationError, overlapping("a")),
    "a source that overlaps itself": (DeclarationError, declaring(Alias("a", "x"), a=torch.zeros(1, 2).expand(4, 2))),
    "an unknown source": (DeclarationError, declaring(Alias("b", "c"))),
    "an unknown source of a derivation": (DeclarationError, declaring(Derivation("x", ("b",), largest, (1,), F32))),
    "a sparse source": (DeclarationError, declaring(Alias("a", "x"), a=torch.eye(4).to_sparse())),
    "a Parameter without a shape": (DeclarationError, uninitialized),
    "an unknown policy": (DeclarationError, declaring(Alias("a", "x", on_mismatch="nonsense"))),  # type: ignore[arg-type]
    "a layout that is none": (DeclarationError, declaring(unequal(3))),
    "a pair that may not be copied": (DeclarationError, declaring(unequal(REFUSES, on_mismatch="error"))),
    "a line that does not parse": (LayoutError, declaring(unequal("(a b -> a b"))),
    "an odd number of rows": (LayoutError, declaring(unequal(SWAP), a=torch.zeros(3, 2))),
    "too few dims": (LayoutError, declaring(unequal(PAD8), a=torch.zeros(3))),
    "another element width": (DeclarationError, declaring(Alias("a", "x", dtype=torch.int8))),
    "kernel bytes for a kept source": (
        DeclarationError,
        lambda: (lambda m: (declare(m, Keep("a")), alias_or_bind_derived_param(m, "a", "x", m.a + 1)))(module(a=torch.zeros(4))),
    ),
    "kernel bytes for no Parameter": (DeclarationError, lambda: alias_or_bind_derived_param(nn.Module(), "a", "x", zeros)),
    "kernel bytes for a declared pair": (
        DeclarationError,
        after(lambda m: alias_or_bind_derived_param(m, "weight", "prepared", zeros)),
    ),
    "a value of another shape for a name": (
        PointerError,
        lambda: copy_or_rebind_param(module(a=torch.zeros(4)), "a", torch.zeros(5)),
    ),
    "a format without room": (PointerError, after(lambda m: registry_of(m).retarget({"weight": "(g r) k -> g r k, r=64"}))),  # type: ignore[union-attr]
    "shards that leave rows out": (DeclarationError, after(lambda m: show(m, m.weight[:2]))),
    "a shard that is no view": (DeclarationError, after(lambda m: show(m, zeros))),
    "a format for no source": (DeclarationError, after(lambda m: registry_of(m).retarget({"w": SWAP}))),  # type: ignore[union-attr]
}
USING: dict[str, tuple[type[AliasError], Do]] = {
    "processed before it is loaded": (StateError, after(process, loaded=False)),
    "read before it is loaded": (StateError, after(lambda m: m.weight + 0, loaded=False)),
    "called before it is loaded": (StaleKernelError, after(lambda m: m(), loaded=False)),
    "called while stale": (StaleKernelError, after(lambda m: m.weight.zero_(), lambda m: m())),
    "read after sleep": (StateError, after(invalidate, lambda m: m.weight + 0)),
    "processed after sleep": (StateError, after(invalidate, process)),
    "called after sleep": (StaleKernelError, after(invalidate, lambda m: m())),
    "read after its memory was freed": (MemoryFreedError, after(free, lambda m: m.weight + 0)),
    "written after its memory was freed": (MemoryFreedError, after(free, lambda m: m.weight.zero_())),
    "processed after its memory was freed": (MemoryFreedError, after(free, process)),
    "called with a tensor in its place": (StaleKernelError, after(replace, lambda m: m())),
    "processed with a tensor in its place": (AdoptionError, after(replace, process)),
    "a derivation of another dtype": (
        StateError,
        processing(Derivation("x", ("a",), lambda a: a.max(), (1,), F32), torch.ones(3)),
    ),
    "a derivation that raises": (
        DerivationError,
        processing(Derivation("x", ("a",), lambda a: a.view(7), (1,), F32), torch.ones(3)),
    ),
    "a re-encoding that refuses": (LayoutError, processing(unequal(REFUSES), torch.ones(3, 2))),
    "`resize_`": (PointerError, after(lambda m: m.weight.resize_(3))),
    "`set_`": (PointerError, after(lambda m: m.weight.set_(torch.zeros(1, dtype=U)))),
    "`set_` of another dtype": (PointerError, after(lambda m: m.weight.set_(torch.zeros(1)))),
    "`out=` of another shape": (PointerError, after(lambda m: torch.add(torch.ones(20, 8, dtype=U), 1, out=m.weight))),
    "`.data =` of another shape": (AdoptionError, after(lambda m: setattr(m.weight, "data", torch.zeros(3)))),
    "`.data =` on no device": (AdoptionError, after(lambda m: setattr(m.weight, "data", zeros.to("meta")))),
    "`share_memory_`": (AdoptionError, after(lambda m: m.weight.share_memory_())),
    "`requires_grad_`": (AdoptionError, after(lambda m: m.weight.requires_grad_())),
    "a reload of an unknown name": (ReloadError, after(reloading(lambda r: r.update("nope", zeros)))),
    "a reload of another shape": (ReloadError, after(reloading(lambda r: r.update("weight", zeros[:3])))),
    "a reload that sends rows twice": (
        ReloadError,
        after(reloading(lambda r: r.update("weight", zeros), lambda r: r.update("weight", zeros))),
    ),
    "a reload that sends nothing": (ReloadError, after(reloading())),
    "exposing an unknown name": (ReloadError, after(lambda m: expose_for_writing(m, "nope"))),
    "exposing a name of an unknown module": (ReloadError, after(lambda m: expose_for_writing(m, "a.b.weight"))),
    "exposing twice": (
        StateError,
        after(lambda m: [expose_for_writing(m, "weight", order="kernel"), expose_for_writing(m, "weight", order="kernel")]),
    ),
    "exposing some rows in kernel order": (
        ReloadError,
        after(lambda m: expose_for_writing(m, "weight", slice(2), order="kernel")),
    ),
    "reading what is exposed": (
        StateError,
        after(lambda m: expose_for_writing(m, "weight", order="kernel"), lambda m: m.weight + 0),
    ),
    "a storage on a part of an allocation": (
        DeclarationError,
        lambda: AliasedStorage("layer.weight", TensorSpec((4,), U), None, torch.zeros(8, dtype=U)[4:], State.EMPTY),
    ),
    "closing an exposure twice": (
        ReloadError,
        after(lambda m: (lambda e: (e.written(), e.written()))(expose_for_writing(m, "weight"))),
    ),
}


@pytest.mark.parametrize("case", [*DECLARING, *USING])
def test_an_error_says_where_what_and_what_to_do(case: str) -> None:
    kind, do = {**DECLARING, **USING}[case]

    with pytest.raises(AliasError) as caught:
        do()

    error = caught.value
    assert type(error) is kind, error
    fields = {field: getattr(error, field) for field in ("module", "name", "expected", "found", "remedy")}
    assert [field for field, value in fields.items() if value in (None, "")] == [], error
    assert str(error.expected) != str(error.found), error
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_keeps_what_it_knows_and_takes_the_rest_from_its_caller() -> None:
    error = LayoutError("no such format", expected="even rows")

    located = error.located(module="layers.0", name="weight", expected="anything", remedy="Pad it.")

    assert type(located) is LayoutError
    assert (located.module, located.name, located.expected, located.remedy) == ("layers.0", "weight", "even rows", "Pad it.")


VERBS: list[Callable[[Any], object]] = [process, invalidate, accept_kernel_bytes, checkpoint_state_dict, checkpoint_digest]
VERBS += [explain, memory_report, lambda model: reload(model).begin(), lambda model: expose_for_writing(model, "weight")]
VERBS += [lambda model: apply_delta(model, "nowhere"), lambda model: prepare_delta(model, "nowhere")]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("other", [{}, None, "model", nn.Linear])
def test_what_is_no_model_is_named(verb: Callable[[Any], object], other: object) -> None:
    with pytest.raises(DeclarationError, match="this is no model"):
        verb(other)


NO_NAMES = (5, 1.5, None, [], "", "a.b")
NO_ROWS = (5, 1.5, "a", [1], slice("a"), slice(1.5, 3), slice(0, 8, 0), slice(None, None, "a"))
NO_BOXES = (((0, 9), (0, 4)), ((0, 2),), ((0, 1.5), (0, 4)), ((0.0, 2.0), (0, 4)), ((0, 2), 4), ((2, 0), (0, 4)), 5, None, "ab")


def test_an_argument_of_another_kind_is_named_and_changes_nothing() -> None:
    layer: Any = nn.Module()
    layer.w = nn.Parameter(torch.arange(32.0).view(8, 4), requires_grad=False)
    layer.u = nn.Parameter(torch.arange(4.0), requires_grad=False)
    registry = declare(layer, Alias("w", "k", "(a b) k -> b a k, b=2"))
    registry.process()
    value, storage = torch.zeros(3), layer.w._alias_storage
    calls: list[Callable[[], object]] = [partial(expose_for_writing, layer, name) for name in NO_NAMES]
    calls += [partial(expose_for_writing, layer, "w", rows, order=o) for rows in NO_ROWS for o in ("checkpoint", "kernel")]  # type: ignore[arg-type]
    calls += [partial(expose_for_writing(layer, "w").written, rows) for rows in NO_ROWS]  # type: ignore[arg-type]
    calls += [partial(alias_or_bind_derived_param, layer, name, "d", value) for name in NO_NAMES]  # type: ignore[arg-type]
    calls += [partial(alias_or_bind_derived_param, layer, "u", name, value) for name in NO_NAMES]  # type: ignore[arg-type]
    calls += [partial(copy_or_rebind_param, layer, name, value) for name in NO_NAMES]  # type: ignore[arg-type]
    calls += [partial(registry.show_shards, name, []) for name in (*NO_NAMES, "w")]  # type: ignore[arg-type]
    calls += [partial(registry.show_shards, "w", shards) for shards in (5, [5], [(5, "q", layer.w)])]  # type: ignore[arg-type]
    calls += [partial(registry.retarget, layouts) for layouts in (5, ["w"], {5: None})]  # type: ignore[arg-type]
    calls += [partial(registry.rederive, given) for given in (5, None, [5], ["w"], [Alias("w", "k")])]  # type: ignore[arg-type]
    calls += [partial(storage.write, box, torch.zeros(2, 4)) for box in NO_BOXES]  # type: ignore[arg-type]
    calls += [partial(storage.read, box) for box in NO_BOXES]  # type: ignore[arg-type]

    for call in calls:
        with pytest.raises(AliasError):
            call()
        assert registry.is_untouched, call
    assert set(layer.state_dict()) == {"w", "u"}
