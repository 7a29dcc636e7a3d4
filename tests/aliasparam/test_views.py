"""Law 1 for views: of other dtypes, overlapping themselves, over several regions and padding, and as sources of writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aliasparam._convert as convert
from aliasparam import, State, process

from .peak import peak_bytes

# -- another dtype over several regions --------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("element", range(6))
def test_law_1_a_wider_view_reads_elements_that_cross_regions(element: int, mixed: bool) -> None:
    layer, expected = Layer((4, 2, 3)), counting(4, 2, 3)
    process(layer)
    if mixed:
        layer.weight[1] = layer.weight[1].clone()

    found = layer.weight.view(24).view(torch.int32)[element:] + 0

    assert torch.equal(found, expected.view(24).view(torch.int32)[element:])


@pytest.mark.parametrize("element", range(6))
def test_law_1_a_wider_view_writes_elements_that_cross_regions(element: int) -> None:
    layer, expected = Layer((4, 2, 3)), counting(4, 2, 3)
    process(layer)

    for tensor in (layer.weight, expected):
        tensor.view(24).view(torch.int32)[element] = -1

    assert torch.equal(layer.weight, expected)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP, expected))


# -- what covers a region ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 4)])
def test_law_1_an_overlapping_view_does_not_cover_what_it_lists_twice(shape: tuple[int, ...]) -> None:
    layer, expected = Layer(shape), counting(*shape)
    process(layer)

    for tensor in (layer.weight, expected):
        tensor.flatten()[: tensor.numel() // 2 + 1].unfold(0, 2, 1).fill_(7)

    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w,
        lambda w: w.transpose(-1, -2),
        lambda w: w.view(torch.int8),
        lambda w: w.flatten(0, 1) if w.is_contiguous() else w,
        lambda w: w.unsqueeze(0),
    ],
)
@pytest.mark.parametrize("transform", [SWAP, SWAP_PAD8])
def test_a_view_of_everything_loads_an_empty_tensor(view: Callable[[Any], Any], transform: Any) -> None:
    layer = Layer((3, 4, 6), transform, loaded=False)
    written = view(layer.weight)
    values = torch.arange(written.numel()).view(written.shape).to(written.dtype)

    written.copy_(values)
    process(layer)

    assert torch.equal(view(layer.weight), values)
    assert torch.equal(layer.prepared, kernel(transform, layer.weight.clone()))


def test_writing_padding_does_not_count_as_loading() -> None:
    layer = Layer((2, 4, 6), PAD8, loaded=False)

    layer.weight.data.as_strided((2, 24), (64, 1), 24).fill_(1)

    assert storage_of(layer).state is not State.CHECKPOINT


# -- sources over the same memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda w, k: w.add_(k),
        lambda w, k: w.copy_(k),
        lambda w, k: w[:2].copy_(k[2:4]),
        lambda w, k: w.data[1].copy_(k[5]),
        lambda w, k: torch._foreach_add_([w], [k]),
        lambda w, k: torch.add(k, 1, out=w),
        lambda w, k: w.index_copy_(0, torch.tensor([1, 0]), k[3:5]),
    ],
)
def test_law_1_a_name_written_from_its_own_kernel_name(write: Callable[[Any, Tensor], Any]) -> None:
    layer, expected = Layer(), counting(6, 8)
    process(layer)
    kernel = layer.prepared.clone()

    write(layer.weight, layer.prepared)
    write(expected, kernel)

    assert torch.equal(layer.weight, expected)


# -- costs and copies --------------------------------------------------------------------------------------------------


def test_law_4_asking_whether_a_name_is_contiguous_converts_nothing(device: torch.device) -> None:
    layer = Layer((64, 1 << 18), device=device)
    process(layer)

    weight, storage = layer.weight, storage_of(layer)
    assert peak_bytes(weight.is_contiguous, device) < 1 << 20
    assert peak_bytes(lambda: storage.holds(storage.checkpoint), device) < 1 << 20
    assert not layer.weight.is_contiguous()


@pytest.mark.parametrize("transform", [SWAP, PadLast2(64, 64), INTERLEAVE])
def test_law_4_reading_a_few_elements_stays_within_the_scratch(transform: Any, device: torch.device) -> None:
    layer = Layer((1024, 64 << 10), transform, device=device)
    expected = layer.weight[5:7, 3:9].clone()
    process(layer)

    view = storage_of(layer).checkpoint[5:7, 3:9]

    assert peak_bytes(lambda: storage_of(layer).read(view), device) <= convert.SCRATCH_BYTES
    assert torch.equal(layer.weight[5:7, 3:9], expected)


def test_law_1_a_write_into_a_converted_copy_is_refused_not_lost() -> None:
    layer = Layer()
    process(layer)

    with pytest.raises(Exception, match="copy"):
        layer.weight.data.contiguous().fill_(5)
    with pytest.raises(Exception, match="copy"):
        layer.weight.contiguous()[0].fill_(5)

    assert is_ready(layer)
    assert torch.equal(layer.weight.contiguous() + 1, counting(6, 8) + 1)
    layer.weight[0, 0] = 0  # back in checkpoint format: contiguous() is the name itself
    layer.weight.data.contiguous().fill_(5)
    assert layer.weight.unique().tolist() == [5]


# -- any chain ---------------------------------------------------------------------------------------------------------


def chained(rng: random.Random, name: Any, oracle: Tensor) -> tuple[Any, Tensor, list[str]]:
    """The same random chain of views of both."""
    steps: list[str] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["slice", "select", "transpose", "dtype", "flat", "unfold", "diagonal"])
        dims = oracle.dim()
        if dims == 0:
            break
        d = rng.randrange(dims)
        n = oracle.shape[d]
        first = rng.randrange(n)
        index = (slice(None),) * d + (slice(first, rng.randint(first + 1, n), rng.choice([1, 1, 2])),)
        size, step, other = rng.randint(1, n), rng.randint(1, 2), rng.randrange(dims)
        dtype = rng.choice([torch.int8, torch.int16, torch.int32, torch.uint8])
        views: dict[str, Callable[[Any], Any]] = {
            "slice": lambda x, i=index: x[i],
            "select": lambda x, d=d, a=first: x.select(d, a),
            "transpose": lambda x, d=d, o=other: x.transpose(d, o),
            "dtype": lambda x, t=dtype: x.view(t),
            "flat": lambda x: x.view(-1),
            "unfold": lambda x, d=d, s=size, t=step: x.unfold(d, s, t),
            "diagonal": lambda x: x.diagonal(),
        }
        try:
            name, oracle = views[kind](name), views[kind](oracle)
        except (RuntimeError, IndexError):  # padding makes the name strided, and some views impossible
            continue
        steps.append(kind)
    return name, oracle, steps


@pytest.mark.parametrize("seed", range(300))
def test_law_1_any_chain_of_views_reads_and_writes_as_a_plain_tensor(seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice([(6, 8), (4, 2, 3), (3, 4, 4), (2, 2, 2, 8), (5, 4, 2)])
    transform: Any = rng.choice([SWAP, INTERLEAVE, SWAP_PAD8, PadLast2(4, 16)])
    layer = Layer(shape, transform)
    oracle = layer.weight.clone().contiguous()
    if rng.random() < 0.8:
        process(layer)
        if rng.random() < 0.5:
            layer.weight[0] = layer.weight[0].clone()

    view, plain, steps = chained(rng, layer.weight, oracle)
    if not plain.numel():
        return

    assert torch.equal(view + 0, plain + 0), steps
    if "unfold" not in steps and rng.random() < 0.7:
        values = torch.randint(0, 100, plain.shape).to(plain.dtype)
        view.copy_(values), plain.copy_(values)
    else:
        view.fill_(7), plain.fill_(7)
    assert torch.equal(layer.weight.contiguous(), oracle), steps
    process(layer)
    assert torch.equal(layer.prepared.contiguous(), kernel(transform, oracle)), steps


def test_law_1_a_name_replaced_by_another_view_of_itself_takes_its_values() -> None:
    layer, expected = Layer((4, 4)), counting(4, 4).t()
    process(layer)

    layer.weight = nn.Parameter(layer.weight.data.t(), requires_grad=False)
    process(layer)

    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.prepared, kernel(SWAP, expected))
