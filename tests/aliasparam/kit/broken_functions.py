"""Declarations whose functions do not keep what a declaration promises. Each is right on its first call with a fresh tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, Reencoding, TensorSpec, declare

SHAPE = (2, 4, 6)


def same(spec: TensorSpec) -> TensorSpec:
    return spec


def layer(*declarations: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(SHAPE, dtype=torch.uint8), requires_grad=False)
        module.scale = nn.Parameter(torch.zeros(3), requires_grad=False)
        made = [d() if isinstance(d, type) or getattr(d, "__name__", "") == "<lambda>" else d for d in declarations]
        declare(module, *made, loaded=False)
        return module

    return make


def encoded(function: Callable[[], Callable[[Tensor], Tensor]], output: Any = same) -> Any:
    """A re-encoding of ``weight`` by what ``function`` returns: made anew for every module, as closures with state are."""
    return lambda: Alias("weight", "prepared", Reencoding(function(), output))


def derived(function: Callable[[], Callable[[Tensor], Tensor]]) -> Any:
    return lambda: Derivation("alpha", ("scale",), function(), (1,), torch.float32)


def clamps_in_place() -> Callable[[Tensor], Tensor]:
    return lambda w: w.clamp_(max=9)


def counts_its_calls() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def function(w: Tensor) -> Tensor:
        calls.append(1)
        return w // 2 + (len(calls) > 1)

    return function


def reads_raw_memory() -> Callable[[Tensor], Tensor]:
    """Offset ignored: right for a tensor that begins where its memory does."""
    return lambda w: w.as_strided(w.shape, w.stride(), 0).clone() // 2


def assumes_contiguous() -> Callable[[Tensor], Tensor]:
    return lambda w: w.as_strided(w.shape, torch.empty(w.shape).stride(), w.storage_offset()).clone() // 2


def works_on_pairs() -> Callable[[Tensor], Tensor]:
    return lambda w: w.view(-1, 2, *w.shape[1:]).flatten(0, 1) // 2


def keeps_a_buffer() -> Callable[[Tensor], Tensor]:
    kept: dict[Any, Tensor] = {}

    def function(w: Tensor) -> Tensor:
        return kept.setdefault(w.shape, torch.empty_like(w)).copy_(w // 2)

    return function


def caches_by_shape() -> Callable[[Tensor], Tensor]:
    cache: dict[Any, Tensor] = {}
    return lambda w: cache.setdefault(w.shape, w // 2).clone()


def of_two_experts(spec: TensorSpec) -> TensorSpec:
    return TensorSpec((2, *spec.shape[1:]), spec.dtype)


def scales_in_place() -> Callable[[Tensor], Tensor]:
    return lambda s: s.mul_(2).max().reshape(1)


def keeps_the_largest() -> Callable[[Tensor], Tensor]:
    seen: list[Tensor] = []

    def function(s: Tensor) -> Tensor:
        seen.append(s.max().reshape(1))
        return torch.stack(seen).max().reshape(1)

    return function


def keeps_its_result() -> Callable[[Tensor], Tensor]:
    result = torch.zeros(1)
    return lambda s: result.copy_(s.max())


def first_of_memory() -> Callable[[Tensor], Tensor]:
    return lambda s: s.as_strided((1,), (1,), 0).clone()


def halves(w: Tensor) -> Tensor:
    return w // 2


def of_another_dtype(w: Tensor) -> Tensor:
    return (w // 2).to(torch.int16)


#: Title to (what makes the layer, what the kit says).
BROKEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a re-encoding that writes its input": (layer(encoded(clamps_in_place)), "not pure"),
    "a re-encoding that counts its calls": (layer(encoded(counts_its_calls)), "depends on more than the values"),
    "a re-encoding that ignores the offset": (layer(encoded(reads_raw_memory)), "offset input"),
    "a re-encoding that ignores strides": (layer(encoded(assumes_contiguous)), "strided input"),
    "a re-encoding for even stacks": (layer(encoded(works_on_pairs)), "raised RuntimeError"),
    "a re-encoding that uses its result again": (layer(encoded(keeps_a_buffer)), "uses again"),
    "a re-encoding that caches by shape": (layer(encoded(caches_by_shape)), "breaks law 9"),
    "a re-encoding declared for two experts": (layer(encoded(lambda: halves, of_two_experts)), "declared is"),
    "a re-encoding of another dtype": (layer(encoded(lambda: of_another_dtype)), "declared is"),
    "a derivation that writes its input": (layer(derived(scales_in_place)), "not pure"),
    "a derivation that keeps the largest": (layer(derived(keeps_the_largest)), "depends on more than the values"),
    "a derivation that keeps its result": (layer(derived(keeps_its_result)), "uses again"),
    "a derivation that ignores the offset": (layer(derived(first_of_memory)), "offset input"),
}
