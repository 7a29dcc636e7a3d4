"""What is put under declared names: other views, ties made later, moved kernel names, tensors that cannot be declared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from aliasparam import Alias, checkpoint_state_dict, declare, iterate_checkpoint, process
from aliasparam.errors import AdoptionError, DeclarationError, PointerError, StaleKernelError

from .small import SWAP, Layer, counting, is_ready, kernel, storage_of, the_registry

# -- ties and shards ---------------------------------------------------------------------------------------------------


def test_law_1_a_shard_put_under_another_name_of_its_storage_takes_its_values() -> None:
    fused, q, k = Layer((4, 4)), nn.Module(), nn.Module()
    registry, weight = the_registry(fused), fused.weight
    registry.show_shards("weight", [(q, "weight", weight[:2]), (k, "weight", weight[2:])])
    process(fused)
    expected = counting(4, 4)[2:]

    q.weight = nn.Parameter(k.weight.data, requires_grad=False)
    process(fused)

    assert torch.equal(q.weight, expected)
    assert torch.equal(k.weight, expected)
    assert torch.equal(fused.prepared, kernel(SWAP, torch.cat([expected, expected])))


def test_law_8_shards_that_change_places_open_their_module() -> None:
    fused, q, k = Layer((4, 4)), nn.Module(), nn.Module()
    weight, values = fused.weight, counting(4, 4)
    the_registry(fused).show_shards("weight", [(q, "weight", weight[:2]), (k, "weight", weight[2:])])
    process(fused)

    q.weight, k.weight = k.weight, q.weight

    with pytest.raises(StaleKernelError):
        fused()
    process(fused)
    assert torch.equal(fused(), kernel(SWAP, torch.cat([values[2:], values[:2]])))


class Attention(Layer):
    """A fused weight of (4, 4) whose halves two modules below it show, one of them further below."""

    q_proj: Any
    inner: Any

    def __init__(self) -> None:
        super().__init__((4, 4))
        self.q_proj, self.inner = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))
        shards = (self.q_proj, "weight", self.weight[:2]), (self.inner[0], "weight", self.weight[2:])
        the_registry(self).show_shards("weight", shards)
        process(self)


def hide(attention: Attention) -> None:
    attention.__dict__["q_proj"] = nn.Linear(4, 2)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "replace",
    [
        lambda a: setattr(a, "q_proj", nn.Linear(4, 2)),
        lambda a: setattr(a, "inner", nn.Sequential(nn.Linear(4, 2))),
        lambda a: a.inner.__setitem__(0, copy.deepcopy(a.inner[0])),
        lambda a: a._modules.update(q_proj=nn.Linear(4, 2)),
        lambda a: delattr(a, "q_proj"),
        hide,
    ],
)
def test_law_8_a_module_put_in_the_place_of_one_that_shows_a_shard_is_refused(replace: Any, copied: bool, used: bool) -> None:
    attention = Attention()
    if used:
        attention()
    attention = copy.deepcopy(attention) if copied else attention
    q_proj, inner, linear, values = attention.q_proj, attention.inner, attention.inner[0], attention().clone()

    replace(attention)

    with pytest.raises(StaleKernelError, match="weight"):
        attention()
    with pytest.raises(AdoptionError, match="part of a declared weight was replaced"):
        process(attention)
    the_registry(attention).rebind()  # of tensors, not of modules
    with pytest.raises(StaleKernelError, match="weight"):
        attention()
    attention.__dict__.pop("q_proj", None)
    attention.q_proj, attention.inner, inner[0] = q_proj, inner, linear
    assert torch.equal(attention(), values)
    process(attention)
    assert torch.equal(attention(), values)


def test_a_module_that_shows_a_shard_may_stand_elsewhere_below_or_not_below_at_all() -> None:
    attention, values = Attention(), kernel(SWAP, counting(4, 4))

    attention.q_proj, attention.inner = nn.Sequential(attention.q_proj), nn.Sequential(nn.Identity(), attention.inner[0])

    assert torch.equal(attention(), values)
    process(attention)
    first, second = attention.q_proj[0], attention.inner[1]
    attention.inner = nn.Identity()
    shards = (nn.Linear(4, 2), "weight", first.weight), (nn.Linear(4, 2), "weight", second.weight)
    the_registry(attention).show_shards("weight", shards)  # by others than before
    process(attention)
    assert torch.equal(attention(), values)


@pytest.mark.parametrize("shards", [False, True])
def test_modules_below_that_several_hold_or_that_hold_their_parent_are_looked_at_once(shards: bool) -> None:
    attention, values = Attention() if shards else Layer((4, 4)), kernel(SWAP, counting(4, 4))
    below = nn.Module()
    below._modules["parent"] = attention
    for _ in range(40):  # two ways to each, so 2 ** 40 to the last
        holder = nn.Module()
        holder.first = holder.second = below
        below = holder
    attention.below = below

    process(attention)
    assert torch.equal(attention(), values)
    if shards:
        attention.q_proj = nn.Linear(4, 2)
        with pytest.raises(StaleKernelError, match="weight"):
            attention()


def test_law_1_a_tie_made_after_declaring_stays_a_tie() -> None:
    embedding, head = nn.Embedding(4, 2), Layer((4, 2), dtype=torch.float32, loaded=False)
    embedding.weight.requires_grad_(False)
    values = embedding.weight.clone()
    address = head.prepared.data_ptr()

    head.weight = embedding.weight  # as transformers' tie_weights()
    process(head)
    assert torch.equal(head.weight, values)
    assert head.weight is embedding.weight

    embedding.weight.data.fill_(5.0)
    with pytest.raises(Exception, match="open"):
        head()
    assert process(head) == 1
    assert head().unique().tolist() == [5.0]
    assert head.prepared.data_ptr() == address
    assert torch.equal(embedding(torch.tensor([1])), torch.full((1, 2), 5.0))


def test_a_tie_of_two_declared_names_made_after_declaring_is_refused() -> None:
    a, b = Layer(), Layer()
    process(a)
    process(b)

    b.weight = a.weight
    with pytest.raises(AdoptionError, match="before declaring"):
        process(b)

    the_registry(b).rebind()
    assert process(b) == 0


class EngineParameter(nn.Parameter):
    """An engine's class with a loader."""

    def load_row(self, row: Any) -> None:
        self.data[0].copy_(row)


def test_an_adopted_parameter_keeps_the_loader_attributes_and_class_of_the_one_it_replaces() -> None:
    module: Any = nn.Module()
    module.weight = EngineParameter(counting(4, 2), requires_grad=False)
    module.weight.weight_loader = "ours"
    declare(module, Alias("weight", "prepared", SWAP))
    replacement = nn.Parameter(counting(4, 2) + 1, requires_grad=False)
    replacement.tag = "theirs"

    module.weight = replacement
    process(module)

    assert isinstance(module.weight, EngineParameter)
    assert (module.weight.weight_loader, module.weight.tag) == ("ours", "theirs")
    module.weight.load_row(torch.zeros(2, dtype=torch.uint8))
    process(module)
    assert module.prepared[2].tolist() == [0, 0]


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 20])
def test_law_3_an_out_argument_of_another_shape_is_refused(rows: int) -> None:
    layer = Layer()
    process(layer)
    addresses = layer.weight.data_ptr(), layer.prepared.data_ptr()

    with pytest.raises(PointerError, match="shape"):
        torch.add(torch.ones(rows, 8, dtype=torch.uint8), 1, out=layer.weight)

    assert is_ready(layer)
    assert (layer.weight.data_ptr(), layer.prepared.data_ptr()) == addresses
    assert layer.weight.shape == (6, 8)
    assert torch.equal(layer.weight, counting(6, 8))


def test_law_1_an_out_argument_of_its_own_shape_is_written() -> None:
    layer = Layer()
    process(layer)

    result = torch.add(layer.weight, 1, out=layer.weight)
    torch.max(torch.ones(2, 8, 3, dtype=torch.uint8), 2, out=(layer.weight[1:3], torch.zeros(2, 8, dtype=torch.long)))

    expected = counting(6, 8) + 1
    expected[1:3] = 1
    assert result is layer.weight
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("name", ["prepared", "alpha"])
def test_law_3_a_kernel_name_moved_by_data_assignment_is_put_back(name: str) -> None:
    layer = Layer(scale=True)
    process(layer)
    kernel = layer.get_buffer(name)
    address, values = kernel.data_ptr(), kernel.clone()

    kernel.data = torch.full_like(values, 5)
    assert name in the_registry(layer).stale_names()
    process(layer)

    assert layer.get_buffer(name).data_ptr() == address
    assert torch.equal(layer.get_buffer(name), values)
    assert torch.equal(layer.weight, counting(6, 8))


@pytest.mark.parametrize("name", ["prepared", "alpha"])
def test_law_3_a_kernel_name_is_not_swapped(name: str) -> None:
    layer = Layer(scale=True)
    process(layer)
    kernel = layer.get_buffer(name)

    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(kernel, torch.full_like(kernel, 5))  # type: ignore[no-untyped-call]


# -- exports -----------------------------------------------------------------------------------------------------------


def test_law_5_an_exported_state_dict_stays_what_was_loaded() -> None:
    layer = Layer()
    exported, iterated = checkpoint_state_dict(layer), dict(iterate_checkpoint(layer))

    process(layer)
    layer.weight.fill_(0)

    assert torch.equal(exported["weight"], counting(6, 8))
    assert torch.equal(iterated["weight"], counting(6, 8))


# -- odd sources -------------------------------------------------------------------------------------------------------


def test_a_rank_without_experts_becomes_ready() -> None:
    layer = Layer((0, 4, 4))

    process(layer)

    assert is_ready(layer)
    assert layer().shape == (0, 4, 4)
    layer.weight.copy_(torch.zeros(0, 4, 4, dtype=torch.uint8))
    process(layer)
    assert is_ready(layer)


def test_a_module_declared_in_inference_mode_is_loaded_outside_it() -> None:
    with torch.inference_mode():
        layer = Layer(scale=True)
        padded = Layer((2, 4, 6), f"{SWAP} | {SWAP}", scale=True)
        process(layer)

    layer.weight[1] = 3
    layer.scale.fill_(2)
    padded.weight[0] = 1
    process(layer)
    process(padded)

    assert layer.alpha.item() == 2
    assert torch.equal(layer.prepared, kernel(SWAP, layer.weight.clone()))


def test_a_distributed_tensor_is_refused_by_name() -> None:
    from torch.distributed.tensor import DTensor

    class Sharded(DTensor):  # stands for one, without a mesh
        @staticmethod
        def __new__(cls) -> Sharded:
            return torch.Tensor._make_wrapper_subclass(cls, (4, 2), dtype=torch.uint8)  # type: ignore[return-value]

        def __init__(self) -> None: ...

    module = nn.Module()
    module._parameters["weight"] = Sharded()  # type: ignore[assignment]

    with pytest.raises(DeclarationError, match="DTensor") as refusal:
        declare(module, Alias("weight", "prepared", SWAP))

    assert refusal.value.name == "weight"
    assert refusal.value.remedy


def test_copy_takes_its_argument_by_torchs_name_and_ignores_its_gradient() -> None:
    layer = Layer(dtype=torch.float32)
    trained = nn.Parameter(torch.ones(6, 8))

    layer.weight.copy_(other=trained)
    layer.weight[0].copy_(trained[0] * 2)

    assert not layer.weight.requires_grad and not storage_of(layer).geometry.requires_grad
    assert layer.weight[:2, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_reads_a_checkpoint_name_leaves_the_graph_or_refuses(backend: str) -> None:
    torch._dynamo.reset()
    layer, x = Layer(), torch.ones(1, dtype=torch.uint8)

    def read(x: torch.Tensor) -> torch.Tensor:
        return layer.weight + x

    compiled = torch.compile(read, backend=backend)
    for step in (lambda layer: None, process, lambda layer: layer.weight[0].fill_(7), process):
        step(layer)
        assert torch.equal(compiled(x), layer.weight + 1)
    with pytest.raises(Exception, match="AliasedParameter"):
        torch.compile(lambda x: layer.weight + x, fullgraph=True, backend=backend)(x)
