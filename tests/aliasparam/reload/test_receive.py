"""While a receiver is open, what loaders write to declared names arrives in the session."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, checkpoint_digest, declare, process, reload
from aliasparam.errors import ReloadError, StaleKernelError
from aliasparam.reload.receive import Receiver

LINE = "(g b a) k -> g a b k, a=4 b=8"


class Layer(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(64, 6, generator=generator), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
        declare(
            self,
            Alias("weight", "weight_shuffled", LINE),
            Derivation("largest", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32),
        )
        process(self)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight_shuffled.T * self.largest


def write_as_engines_do(layer: Layer, new: Layer, *, rows: int = 64) -> None:
    """By shards through ``.data``, by elements, and by an operator that lands in one transaction."""
    layer.weight.data.narrow(0, 0, 20).copy_(new.weight[:20])
    layer.weight.data[20:rows].copy_(new.weight[20:rows].double())
    layer.scale.data[0] = new.scale[0]
    torch._foreach_copy_([layer.scale.data[1:2], layer.scale.data[2:]], [new.scale[1:2].clone(), new.scale[2:].clone()])


@pytest.mark.parametrize("policy", ["write-through", "journal", "staged", "staged-journal"])
def test_law_9_what_loaders_write_is_a_reload(policy: str) -> None:
    layer, new, x = Layer(0), Layer(1), torch.randn(2, 6)
    old, address = layer(x), layer.weight_shuffled.data_ptr()

    with reload(layer, policy=policy) as session, Receiver(session) as receiver:
        write_as_engines_do(layer, new)
        assert receiver.begun == {"weight", "scale"}
        if policy.startswith("staged"):
            assert torch.equal(layer(x), old)
        else:
            with pytest.raises(StaleKernelError):
                layer(x)

    assert checkpoint_digest(layer) == checkpoint_digest(new) and torch.equal(layer(x), new(x))
    assert layer.weight_shuffled.data_ptr() == address
    layer.scale.data[0] = 7.0  # and afterwards a write is a write
    assert layer.scale[0] == 7.0


@pytest.mark.parametrize("policy", ["journal", "staged"])
def test_law_10_a_loader_that_stops_leaves_the_old_weights(policy: str) -> None:
    layer, new, x = Layer(0), Layer(1), torch.randn(2, 6)
    old = layer(x)

    with pytest.raises(ReloadError, match=r"without \[50:64"), reload(layer, policy=policy) as session, Receiver(session):
        write_as_engines_do(layer, new, rows=50)

    assert torch.equal(layer(x), old)


def test_rows_that_come_twice_are_refused_and_counted_by_place_not_by_number() -> None:
    layer, new = Layer(0), Layer(1)
    with pytest.raises(ReloadError, match="twice"), reload(layer, policy="staged") as session, Receiver(session):
        layer.weight.data[:32].copy_(new.weight[:32])
        layer.weight.data[:32].copy_(new.weight[:32])


def test_one_receiver_at_a_time() -> None:
    layer = Layer()
    session = reload(layer, policy="staged")
    session.begin()
    with Receiver(session), pytest.raises(ReloadError, match="another session"):
        Receiver(session)
    session.abort()
