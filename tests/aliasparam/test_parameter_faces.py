"""What every face of a checkpoint name gives while the memory holds kernel format: right values, or a refusal."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedParameter, State, checkpoint_state_dict, declare, process, registry_of
from aliasparam.errors import AdoptionError, PointerError, StateError
from aliasparam.tensors.faces import loader_attributes

from .small import SWAP, SWAP_PAD8, is_ready, kernel, the_registry

VALUES = torch.arange(48, dtype=torch.uint8).view(6, 8)


@pytest.fixture
def layer(device: torch.device) -> nn.Module:
    """A layer in kernel format: halves swapped, rows padded."""
    layer = nn.Module()
    layer.weight = nn.Parameter(VALUES.to(device).clone(), requires_grad=False)
    layer.weight.weight_loader = print
    declare(layer, Alias("weight", "prepared", SWAP_PAD8))
    process(layer)
    return layer


def state_of(layer: nn.Module) -> State | None:
    registry = registry_of(layer)
    assert registry is not None
    storage = registry.sources["weight"].storage
    assert storage is not None
    return storage.state


READS: dict[str, Any] = {
    "clone": lambda w: w.clone(),
    "add": lambda w: w + 0,
    "slice": lambda w: w[1:4],
    "select": lambda w: w[2],
    "narrow": lambda w: w.narrow(1, 2, 3),
    "transpose": lambda w: w.t(),
    "view": lambda w: w.view(3, 16),
    "view as another dtype": lambda w: w.view(torch.int16),
    "chunk": lambda w: torch.stack(w.chunk(2)),
    "unbind": lambda w: torch.stack(w.unbind(0)),
    "flatten of a slice": lambda w: w[2:, 1:].flatten(),
    "masked": lambda w: w[w > 7],
    "cat of several names": lambda w: torch.cat([w, w.data, w[:1]]),
    "cast": lambda w: w.to(torch.float32),
    "half": lambda w: w.half(),
    "data": lambda w: w.data + 0,
    "detach": lambda w: w.detach() + 0,
    "contiguous": lambda w: w.contiguous(),
    "cpu": lambda w: w.cpu() + 0,
    "tolist": lambda w: torch.tensor(w.tolist()),
    "matmul": lambda w: w.float() @ w.float().t(),
    "foreach": lambda w: torch._foreach_add([w, w[:2]], 1)[0],
    "deepcopy": lambda w: copy.deepcopy(w) + 0,
    "sum": lambda w: w.sum(),
    "equal": lambda w: torch.tensor(torch.equal(w, VALUES.to(w.device))),
}


@pytest.mark.parametrize("read", READS)
def test_law_1_every_read_gives_checkpoint_values(layer: nn.Module, read: str) -> None:
    expected = READS[read](VALUES.to(layer.weight.device).clone())

    found = READS[read](layer.weight)

    assert torch.equal(found.cpu(), expected.cpu())
    assert is_ready(layer)  # reading leaves it so


WRITES: dict[str, Any] = {
    "copy_": lambda w: w.copy_(w.flip(0)),
    "copy_ of a scalar broadcast": lambda w: w.copy_(torch.tensor(3, dtype=torch.uint8)),
    "copy_ with a cast": lambda w: w.copy_(torch.full((6, 8), 7.0)),
    "copy_ from non-contiguous": lambda w: w.copy_(torch.arange(48, dtype=torch.uint8).view(8, 6).t()),
    "slice assignment": lambda w: w.__setitem__(slice(1, 3), 9),
    "data slice": lambda w: w.data[2:].fill_(1),
    "detach": lambda w: w.detach()[0].fill_(5),
    "narrow chain": lambda w: w.narrow(0, 1, 4).narrow(1, 2, 2).copy_(torch.tensor(1, dtype=torch.uint8)),
    "through a dtype view": lambda w: w.view(torch.int8)[0].fill_(-1),
    "through a transpose": lambda w: w.t()[0].fill_(8),
    "add_": lambda w: w.add_(1),
    "mul_ of a slice": lambda w: w[1:2].mul_(2),
    "index_put_": lambda w: w.__setitem__((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.tensor([7, 9], dtype=torch.uint8)),
    "masked_fill_": lambda w: w.masked_fill_(w.clone() > 20, 0),
    "foreach_copy_": lambda w: torch._foreach_copy_([w[:1], w[1:2]], [w[2:3].clone(), w[3:4].clone()]),
    "out=": lambda w: torch.add(w.clone(), 1, out=w),
    "zero_": lambda w: w.zero_(),
    "swap rows within": lambda w: w[0:2].copy_(w[2:4]),
}


@pytest.mark.parametrize("write", WRITES)
def test_law_1_every_write_lands_and_the_kernel_name_follows(layer: nn.Module, write: str) -> None:
    expected, address = VALUES.to(layer.weight.device).clone(), layer.weight.data_ptr()
    with torch.device(expected.device):
        WRITES[write](expected)
        WRITES[write](layer.weight)

    assert torch.equal(layer.weight, expected)
    assert not is_ready(layer)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD8, expected))
    assert layer.weight.data_ptr() == layer.prepared.data_ptr() == address


@pytest.mark.parametrize("move", ["resize_", "set_", "t_", "as_strided_"])
def test_law_3_operators_that_would_move_the_memory_refuse(layer: nn.Module, move: str) -> None:
    calls = {
        "resize_": lambda w: w.resize_(3),
        "set_": lambda w: w.set_(torch.zeros(6, 8, dtype=torch.uint8, device=w.device)),
        "t_": lambda w: w.t_(),
        "as_strided_": lambda w: w.as_strided_((2,), (1,)),
    }

    with pytest.raises(PointerError):
        calls[move](layer.weight)

    assert torch.equal(layer.weight.cpu(), VALUES)


def test_it_is_a_parameter_with_the_real_address(layer: nn.Module) -> None:
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, AliasedParameter)
    assert layer.weight.data_ptr() == layer.prepared.data_ptr() != 0
    assert layer.weight.weight_loader is print
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert list(layer.state_dict()) == ["weight"]


def test_numpy_is_a_read_only_copy(layer: nn.Module) -> None:
    if layer.weight.is_cuda:
        pytest.skip("numpy() is for the CPU")
    array = layer.weight.numpy()

    assert array.tolist() == VALUES.tolist()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_raw_memory_is_not_handed_out(layer: nn.Module) -> None:
    with pytest.raises(BufferError, match="DLPack"):
        torch.utils.dlpack.from_dlpack(layer.weight)
    assert not hasattr(layer.weight, "__cuda_array_interface__")
    with pytest.raises(AdoptionError, match="share_memory_"):
        layer.weight.share_memory_()


def test_safetensors_refuses_the_name_and_takes_the_export(layer: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.torch.save_file({"weight": layer.weight}, tmp_path / "raw.safetensors")

    safetensors.torch.save_file(checkpoint_state_dict(layer), tmp_path / "good.safetensors")

    assert torch.equal(safetensors.torch.load_file(tmp_path / "good.safetensors")["weight"], VALUES)


def test_a_saved_state_dict_is_plain_checkpoint_values(layer: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)

    loaded = torch.load(file, weights_only=True)

    assert type(loaded["weight"]) is Tensor
    assert torch.equal(loaded["weight"].cpu(), VALUES)


def test_a_cast_of_the_module_is_refused_and_undone(device: torch.device) -> None:
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.ones(3, device=device), requires_grad=False)
    declare(layer, Alias("scale", "prepared"))
    process(layer)

    with pytest.raises(AdoptionError, match="geometry"):
        layer.half()

    assert process(layer) == 0
    assert torch.equal(layer.prepared, torch.ones(3, device=device))


def test_a_replacement_that_does_not_fit_is_refused_and_can_be_undone(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(AdoptionError) as error:
        process(layer)

    assert "uint8[6, 8]" in str(error.value)
    assert "uint8[5, 8]" in str(error.value)
    registry = registry_of(layer)
    assert registry is not None
    registry.rebind()
    assert torch.equal(layer.weight.cpu(), VALUES)


def test_a_replacement_is_adopted_with_its_loader(layer: nn.Module) -> None:
    address = layer.weight.data_ptr()
    layer.weight = nn.Parameter(VALUES.to(layer.weight.device) + 1, requires_grad=False)
    layer.weight.output_dim = 0

    process(layer)

    assert isinstance(layer.weight, AliasedParameter)
    assert layer.weight.data_ptr() == address
    assert layer.weight.output_dim == 0
    assert layer.weight.weight_loader is print
    assert torch.equal(layer.weight.cpu(), VALUES + 1)


def test_a_deleted_name_comes_back(layer: nn.Module) -> None:
    del layer.weight

    process(layer)

    assert torch.equal(layer.weight.cpu(), VALUES)


@pytest.mark.parametrize(
    "put", [lambda m, t: setattr(m, "weight", t), lambda m, t: m.register_buffer("weight", t)], ids=["attribute", "buffer"]
)
def test_law_8_a_plain_tensor_in_the_place_of_a_deleted_name_is_taken_in(layer: nn.Module, put: Any) -> None:
    """As an attribute it hides the Parameter, as a buffer it is what the state dict has: pruning, engines' own processing."""
    other = (VALUES + 9).to(layer.prepared.device)
    del layer.weight
    put(layer, other.clone())

    assert not is_ready(layer)
    process(layer)

    assert isinstance(layer.weight, AliasedParameter) and torch.equal(layer.weight, other)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD8, other))
    assert list(layer.state_dict()) == ["weight"] and torch.equal(checkpoint_state_dict(layer)["weight"], other)


@pytest.mark.parametrize("like", [torch.empty_like, lambda w: torch.empty_like(w.data), lambda w: w.new_empty(w.shape)])
@pytest.mark.parametrize("written", [True, False])
def test_law_1_memory_made_like_a_name_holds_weights_once_it_is_written(
    layer: nn.Module, like: Callable[[Tensor], Tensor], written: bool
) -> None:
    """Unwritten it is what ``Module.to_empty()`` assigns."""
    other = like(layer.weight)
    if written:
        other.copy_(VALUES + 9)
    layer.weight.data = other

    assert state_of(layer) is (State.LOADED if written else State.INVALID)
    assert not written or torch.equal(layer.weight.cpu(), VALUES + 9)


def test_what_becomes_a_name_has_no_marks_of_ours(layer: nn.Module) -> None:
    made = torch.empty_like(layer.weight).copy_(layer.weight)
    made.weight_loader = print  # type: ignore[attr-defined]
    assert set(loader_attributes(made)) == {"weight_loader"} and "_alias_uninitialized" in vars(made)


def test_what_is_no_tensor_in_the_place_of_a_deleted_name_is_refused(layer: nn.Module) -> None:
    del layer.weight
    layer.weight = "w"
    with pytest.raises(AdoptionError, match="found:    str"):
        process(layer)
    the_registry(layer).rebind()
    process(layer)
    assert torch.equal(layer.weight.cpu(), VALUES)


def test_law_1_the_data_of_a_name_is_not_swapped(layer: nn.Module) -> None:
    """Writes through it would be lost."""
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(layer.weight.data, torch.zeros_like(VALUES))
    layer.weight.data.fill_(3)
    assert bool((layer.weight == 3).all())


def test_reading_what_was_never_loaded_refuses(device: torch.device) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(6, 8, dtype=torch.uint8, device=device), requires_grad=False)
    declare(layer, Alias("weight", "prepared", SWAP), loaded=False)

    with pytest.raises(StateError, match="hold no weights"):
        layer.weight.clone()
    layer.weight[:2] = 1
    with pytest.raises(StateError, match="partly written"):
        process(layer)
    assert layer.weight[:2].sum() == 16  # what was written can be read
    layer.weight[2:] = 1
    assert process(layer) == 1
