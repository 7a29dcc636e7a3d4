"""Law 4: peak extra memory stays within the stated scratch, bookkeeping included."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aliasparam import AliasedStorage, process
from aliasparam.storage.storage import SCRATCH_BYTES
from aliasparam.storage.transaction import STAGING_BYTES

from .peak import peak_bytes
from .small import INTERLEAVE, PAD8, SWAP, Layer, kernel, layer_of, storage_of, the_registry

#: 64 MiB, four times the stated scratch.
LARGE = (1024, 64 << 10)


@pytest.fixture(scope="module")
def large() -> Layer:
    layer = Layer(LARGE)
    process(layer)
    return layer


WITHIN: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "a write of the same dtype": (1 << 16, lambda w, v: w.copy_(v)),
    "a write of strided values": (1 << 16, lambda w, v: w.copy_(v.expand(LARGE).transpose(0, 1).transpose(0, 1))),
    "a shard": (1 << 16, lambda w, v: w[5:700, 3:9000].copy_(v[5:700, 3:9000])),
    "values of another dtype": (STAGING_BYTES, lambda w, v: w.copy_(v.view(torch.int8))),
    "asking whether it is contiguous": (1 << 10, lambda w, v: w.is_contiguous()),
    "reading a few elements": (1 << 10, lambda w, v: w[5:7, 3:9].clone()),
    "writing every second row of four": (1 << 20, lambda w, v: w[:4:2].copy_(v[:4:2])),
}


@pytest.mark.parametrize("what", WITHIN)
def test_law_4_what_a_write_needs_beside_its_values(what: str, large: Layer) -> None:
    limit, do = WITHIN[what]
    value = torch.ones(LARGE, dtype=torch.uint8).flip(0)
    do(large.weight, value)

    assert peak_bytes(lambda: do(large.weight, value), torch.device("cpu")) <= limit


def test_law_4_a_clone_is_what_was_gathered_and_no_copy_of_it(large: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    read, found = AliasedStorage.gather, []
    monkeypatch.setattr(AliasedStorage, "gather", lambda storage, box: found.append(read(storage, box)) or found[-1])

    assert large.weight.clone().data_ptr() == found[-1].data_ptr()


def test_law_4_another_layout_needs_the_scratch_that_is_stated(large: Layer) -> None:
    before = large.weight.clone()

    def there_and_back() -> None:
        for line in (INTERLEAVE, SWAP):
            the_registry(large).retarget({"weight": line})

    assert peak_bytes(there_and_back, torch.device("cpu")) <= SCRATCH_BYTES + (1 << 12)
    assert torch.equal(large.weight, before)


def test_law_4_loaded_experts_are_brought_into_order_in_the_scratch_that_is_stated() -> None:
    values, layers = torch.randint(256, (8, 64, 128 << 10), dtype=torch.uint8), list[Any]()

    def declared() -> None:
        layers.append(layer_of(values, SWAP))

    assert peak_bytes(declared, torch.device("cpu")) - values.nbytes <= SCRATCH_BYTES + (1 << 12)
    process(layers[0])
    assert torch.equal(layers[0].prepared, kernel(SWAP, values))


def test_law_4_bookkeeping_does_not_grow_with_the_bytes() -> None:
    """A first load by rows, half of them and then the others."""
    layer = Layer((256, 16 << 10), PAD8, loaded=False)
    row = torch.zeros(16 << 10, dtype=torch.uint8)
    layer.weight[0].copy_(row)
    tracemalloc.start()
    for start in (2, 1):
        for index in range(start, 256, 2):
            layer.weight[index].copy_(row)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2 << 20 and held < 1 << 20, "4 MiB of weights"
    process(layer)
    assert not storage_of(layer).states.missing
    assert torch.equal(layer.prepared, kernel(PAD8, layer.weight.clone()))
