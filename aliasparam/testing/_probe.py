"""What the functions of a declaration promise, asked of them directly: repack functions, re-encodings, derivations.

Each is called on stacks of 1, 2, 3 and 7, on contiguous, strided and offset input, and again after other values: the result must
be the same function of the values, of the declared shape and dtype, in memory of its own, and the input must be as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import AliasRegistry, Layout, Reencoding, TensorSpec
from ..module.declarations import AnyLayout
from ..module.planning import InOrder
from ..torch_private import shares_memory
from ._values import Values, as_bytes, same_bytes

_STACKS = (1, 2, 3, 7)


class Broken(Exception):
    """A promise that does not hold."""


@dataclass(frozen=True)
class _Asked:
    """One function: what to call it, what it is given, and what it must return (None: not known)."""

    title: str
    function: Callable[..., Any]
    inputs: tuple[tuple[str, TensorSpec], ...]
    output: TensorSpec | None


def probe(registry: AliasRegistry, values: Values, random: torch.Generator) -> None:
    """Raises Broken for the first function that does not keep a promise."""
    for asked in _functions(registry):
        inputs = [[values(name, spec, random) for name, spec in asked.inputs] for _ in range(4)]
        answers = [_ask(asked, each) for each in inputs]
        for each, (found, kept) in zip(inputs, answers, strict=True):
            if not same_bytes(found, kept):
                raise Broken(f"{asked.title} returned memory that it uses again in its next call")
            if not same_bytes(_call(asked, [t.clone() for t in each]), kept):
                raise Broken(f"{asked.title} depends on more than the values: called again after others it differs")
    _equal_layouts(registry, values, random)


def _functions(registry: AliasRegistry) -> Iterator[_Asked]:
    specs = {name: source.plan.source for name, source in registry.sources.items()}
    specs |= {n: TensorSpec(d.declaration.shape, d.declaration.dtype) for n, d in registry.derived.items()}
    for name, derived in registry.derived.items():
        declaration = derived.declaration
        if isinstance(derived.layout, Reencoding):
            source = specs[declaration.sources[0]]
            for spec in (source, *_stacked(source)):
                title = f"the re-encoding {name} of {spec}"
                yield _Asked(title, derived.layout.function, ((declaration.sources[0], spec),), derived.layout.output(spec))
        elif not isinstance(declaration.function, InOrder):
            inputs = tuple((n, specs[n]) for n in declaration.sources)
            yield _Asked(f"the derivation {name}", declaration.function, inputs, specs[name])
    for name, layout in _layouts(registry):
        encode, decode = getattr(layout, "encode", None), getattr(layout, "decode", None)
        if encode is None or decode is None:
            continue
        for spec in (specs[name], *_stacked(specs[name])):
            yield _Asked(f"encode of {name}, {spec}", encode, ((name, spec),), None)
            yield _Asked(f"decode of encode of {name}, {spec}", _Both(encode, decode), ((name, spec),), spec)


def _layouts(registry: AliasRegistry) -> Iterator[tuple[str, AnyLayout]]:
    for name, source in registry.sources.items():
        if source.layout is not None:
            yield name, source.layout
    for derived in registry.derived.values():
        if derived.layout is not None:
            yield derived.declaration.sources[0], derived.layout


@dataclass(frozen=True)
class _Both:
    """There and back, which must be the values."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[..., Tensor]

    def __call__(self, value: Tensor) -> Tensor:
        found = self.decode(self.encode(value.clone()))
        if not same_bytes(found.view(value.dtype).view(value.shape), value):
            raise Broken("does not give the values back")
        return found.clone()


def _stacked(spec: TensorSpec) -> Iterator[TensorSpec]:
    """The same tensor for other numbers of experts."""
    if len(spec.shape) > 2:
        yield from (TensorSpec((count, *spec.shape[1:]), spec.dtype) for count in _STACKS if count != spec.shape[0])


def _ask(asked: _Asked, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What was returned, and a copy of what it held then."""
    expected = _call(asked, [t.clone() for t in inputs])
    kept = expected.clone()
    if asked.output is not None and TensorSpec.of(expected) != asked.output:
        raise Broken(f"{asked.title} returns {TensorSpec.of(expected)}, declared is {asked.output}")
    for how in (torch.clone, _strided, _offset):
        found = _call(asked, [how(t) for t in inputs])
        if not same_bytes(found, kept):
            raise Broken(
                f"{asked.title} depends on more than the values: called again with {how.__name__.strip('_')} input it differs"
            )
    return expected, kept


def _call(asked: _Asked, given: list[Tensor]) -> Tensor:
    values = [as_bytes(t).clone() for t in given]
    try:
        found = asked.function(*given)
    except Broken as error:
        raise Broken(f"{asked.title} {error}") from None
    except Exception as error:
        raise Broken(f"{asked.title} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Tensor):
        raise Broken(f"{asked.title} returned {type(found).__name__}")
    if not all(torch.equal(as_bytes(t), v) for t, v in zip(given, values, strict=True)):
        raise Broken(f"{asked.title} is not pure: it changed its input")
    return found.clone() if any(shares_memory(found, t) for t in given) else found


def _strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, tensor], -1)[..., 0] if tensor.dim() else tensor.clone()


def _offset(tensor: Tensor) -> Tensor:
    """The same values behind others in one memory."""
    memory = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    memory.view(torch.uint8).fill_(0x11)
    return memory[8:].view(tensor.shape).copy_(tensor)


def _equal_layouts(registry: AliasRegistry, values: Values, random: torch.Generator) -> None:
    """Layouts that compare equal must do the same: the library keeps what it bound by equality."""
    found = list(_layouts(registry))
    for index, (name, layout) in enumerate(found):
        for other_name, other in found[:index]:
            if layout is other or isinstance(layout, (Layout, Reencoding)) or layout != other or hash(layout) != hash(other):
                continue
            spec = registry.sources[name].plan.source
            value = values(name, spec, random)
            encoded = [_kernel(each, value) for each in (layout, other)]
            if not same_bytes(*encoded):
                raise Broken(f"the layouts of {other_name} and {name} are equal and order {spec} differently")


def _kernel(layout: Any, value: Tensor) -> Tensor:
    if hasattr(layout, "encode"):
        return layout.encode(value.clone())  # type: ignore[no-any-return]
    table = getattr(layout, "table", None)
    return torch.empty(0) if table is None else torch.as_tensor(table)
