"""What every name must read as, computed from plain tensors: nothing is shared, kernel order is an index formula."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import AliasRegistry, Layout
from ..errors import LayoutError
from ..module.planning import InOrder, Source
from ._formula import kernel_tensor
from ._values import as_bytes, same_bytes


def expected_kernel_names(registry: AliasRegistry, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every kernel name as the declarations define it, from plain checkpoint tensors."""
    known = dict(checkpoint)
    for source in registry.sources.values():
        if source.derived:
            known[source.derived] = in_order(source.layout, source, checkpoint[source.name])
    for name, derived in registry.derived.items():
        declaration = derived.declaration
        values = [known[n].clone() for n in declaration.sources]
        known[name] = _copied(derived.layout, declaration.function, values)
    return {name: value for name, value in known.items() if name not in checkpoint}


def _copied(layout: object, function: object, values: list[Tensor]) -> Tensor:
    if isinstance(layout, Layout) and isinstance(function, InOrder) and layout.bits is None:
        kernel = function.plan.kernel
        return kernel_tensor(str(layout), values[0]).view(kernel.dtype).view(kernel.shape)
    return function(*values)  # type: ignore[operator, no-any-return]


def in_order(layout: object, source: Source, value: Tensor) -> Tensor:
    """``value`` under the kernel name of ``source``, whose layout is ``layout``."""
    plan = source.plan
    if layout is None:
        return value.clone().view(plan.kernel.dtype).view(plan.kernel.shape)
    if isinstance(layout, Layout) and layout.bits is None and not layout.lines[0].left.flat:
        found = kernel_tensor(str(layout), value)
    else:
        found = by_offsets(plan.bound, value)
    return found.to(value.device).view(plan.kernel.dtype).view(plan.kernel.shape)


def by_offsets(bound: object, value: Tensor) -> Tensor:
    """Kernel order where there is no line: a table of positions, or somebody's own function."""
    memory = torch.zeros(bound.capacity, value.element_size(), dtype=torch.uint8)  # type: ignore[attr-defined]
    try:
        positions = bound.offsets().reshape(-1)  # type: ignore[attr-defined]
        if positions.numel() != value.numel():
            raise LayoutError("positions of parts of elements")
        memory[positions] = as_bytes(value).cpu().view(-1, value.element_size())
        flat = memory.reshape(-1).view(value.dtype)
    except (LayoutError, NotImplementedError):
        flat = memory.reshape(-1).view(value.dtype)
        bound.write(flat, bound.whole, value.cpu())  # type: ignore[attr-defined]
    return flat.view(bound.kernel_shape)  # type: ignore[attr-defined]


def need_same(found: Tensor, expected: Tensor, what: str) -> None:
    if not same_bytes(found, expected):
        raise AssertionError(f"{what}: expected {expected.tolist()}, found {found.tolist()}")
