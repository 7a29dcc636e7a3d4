"""Parameters of an engine's own class: its loaders, isinstance checks and attributes go on working on aliased memory."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedParameter, declare, process, registry_of

from .small import SWAP, kernel


class ShardedParameter(nn.Parameter):
    """In the manner of vLLM and SGLang: a Parameter subclass that knows how to load shards of itself."""

    def __new__(cls, data: Tensor, **kwargs: Any) -> ShardedParameter:
        return super().__new__(cls, data, requires_grad=False)  # type: ignore[return-value]

    def __init__(self, data: Tensor, *, output_dim: int, weight_loader: Callable[..., None]) -> None:
        self._output_dim, self._weight_loader = output_dim, weight_loader

    @property
    def output_dim(self) -> int:
        return self._output_dim

    @property
    def weight_loader(self) -> Callable[..., None]:
        return self._weight_loader

    def load_merged_column_weight(self, loaded_weight: Tensor, *, shard_offset: int, shard_size: int) -> None:
        target = self.data.narrow(self.output_dim, shard_offset, shard_size)
        assert target.shape == loaded_weight.shape
        target.copy_(loaded_weight)


VALUES = torch.arange(32, dtype=torch.uint8).view(8, 4)


def layer_with(parameter: nn.Parameter) -> Any:
    layer = nn.Module()
    layer.weight = parameter
    declare(layer, Alias("weight", "prepared", SWAP), loaded=False)
    return layer


@pytest.fixture
def layer() -> Any:
    return layer_with(ShardedParameter(torch.empty(8, 4, dtype=torch.uint8), output_dim=0, weight_loader=print))


def load_shards(parameter: Any, values: Tensor) -> None:
    parameter.load_merged_column_weight(values[:4].clone(), shard_offset=0, shard_size=4)
    parameter.load_merged_column_weight(values[4:].clone(), shard_offset=4, shard_size=4)


def test_law_9_its_own_loader_methods_load_and_reload(layer: Any) -> None:
    address = layer.weight.data_ptr()
    for add in (0, 100, 0):
        load_shards(layer.weight, VALUES + add)
        process(layer)
        assert torch.equal(layer.prepared, kernel(SWAP, VALUES + add))
        assert torch.equal(layer.weight, VALUES + add)
    assert layer.weight.data_ptr() == address


def test_it_is_of_both_classes_with_its_attributes(layer: Any) -> None:
    assert isinstance(layer.weight, ShardedParameter)
    assert isinstance(layer.weight, AliasedParameter)
    assert type(layer.weight).__name__ == "ShardedParameter"
    assert layer.weight.output_dim == 0
    assert layer.weight.weight_loader is print


def test_the_object_itself_becomes_aliased() -> None:
    """A loader that collected parameters before, and a tied module, hold the same object."""
    parameter = ShardedParameter(torch.empty(8, 4, dtype=torch.uint8), output_dim=0, weight_loader=print)
    tied = nn.Module()
    tied.weight = parameter

    layer = layer_with(parameter)

    assert layer.weight is parameter is tied.weight
    load_shards(parameter, VALUES)
    process(layer)
    assert torch.equal(tied.weight.clone(), VALUES)
    assert torch.equal(layer.prepared, kernel(SWAP, VALUES))


def test_copies_keep_the_class(layer: Any) -> None:
    load_shards(layer.weight, VALUES)
    process(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)

    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert isinstance(twin.weight, ShardedParameter) and isinstance(twin.weight, AliasedParameter)
        load_shards(twin.weight, VALUES + 1)
        process(twin)
        assert torch.equal(twin.prepared, kernel(SWAP, VALUES + 1))
        assert torch.equal(layer.weight, VALUES), "the original did not change"


def test_a_fresh_parameter_of_the_engines_class_is_adopted(layer: Any) -> None:
    load_shards(layer.weight, VALUES)
    process(layer)
    address = layer.prepared.data_ptr()

    layer.weight = ShardedParameter(VALUES + 5, output_dim=0, weight_loader=repr)
    process(layer)

    assert isinstance(layer.weight, AliasedParameter) and isinstance(layer.weight, ShardedParameter)
    assert layer.weight.weight_loader is repr
    assert layer.prepared.data_ptr() == address
    assert torch.equal(layer.prepared, kernel(SWAP, VALUES + 5))


def sglang(name: str) -> Any:
    pytest.importorskip("sglang")
    return getattr(importlib.import_module("sglang.srt.layers.parameter"), name)


def test_sglangs_weight_parameter_loads_qkv_shards_by_its_own_code() -> None:
    cls = sglang("ModelWeightParameter")
    layer = layer_with(cls(data=torch.empty(8, 4, dtype=torch.uint8), input_dim=1, output_dim=0, weight_loader=print))
    for add in (0, 100):
        for index, (offset, size) in {"q": (0, 4), "k": (4, 2), "v": (6, 2)}.items():
            layer.weight.load_qkv_weight(
                (VALUES + add)[offset : offset + size].clone(),
                shard_id=index,
                shard_offset=offset,
                shard_size=size,
                num_heads=1,
                tp_rank=0,
            )
        process(layer)
        assert torch.equal(layer.prepared, kernel(SWAP, VALUES + add))
    assert isinstance(layer.weight, cls)


def test_sglangs_per_tensor_scale_loads_one_slot_at_a_time() -> None:
    cls = sglang("PerTensorScaleParameter")
    layer = nn.Module()
    layer.scale = cls(data=torch.empty(3), weight_loader=print)
    declare(layer, Alias("scale", "scale_prepared"), loaded=False)

    for index, value in (("q", 1.0), ("k", 2.0), ("v", 3.0)):
        layer.scale.load_qkv_weight(loaded_weight=torch.tensor(value), shard_id=index, shard_offset=0, shard_size=1)
    process(layer)

    assert layer.scale_prepared.tolist() == [1.0, 2.0, 3.0]
    assert registry_of(layer) is not None
