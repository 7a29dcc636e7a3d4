"""Calling a derivation's function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._convert import SCRATCH_BYTES
from .errors import AliasError, DerivationError

if TYPE_CHECKING:
    from ._planning import Derived


def compute(label: str, derived: Derived, values: list[Tensor]) -> Tensor:
    """The derived value, from ``values`` which the function cannot change: it gets copies.

    Only a transform gets a tensor of more than the scratch bound itself: it is pure by its law.

    Raises:
        DerivationError: the function raised something of its own, or returned no tensor.
    """
    spec = derived.declaration
    given = [v.clone() if derived.fallback is None or v.nbytes <= SCRATCH_BYTES else v for v in values]
    try:
        value = spec.function(*given)
    except AliasError as error:
        raise error.located(
            module=label,
            name=spec.name,
            expected="sources that can be derived from",
            found=_found(spec.sources, values),
            remedy="Load other values, or mend the function of this derivation.",
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise DerivationError(
            "the function of this derivation failed",
            module=label,
            name=spec.name,
            expected=f"a tensor from {_found(spec.sources, values)}",
            found=f"{type(error).__name__}: {error}",
            remedy="Mend the function; until then the module refuses to run.",
        ) from error
    if not isinstance(value, Tensor):
        raise DerivationError(
            "the function of this derivation returned no tensor",
            module=label,
            name=spec.name,
            expected="a tensor",
            found=repr(value),
            remedy="Return a tensor of the declared shape and dtype.",
        )
    return value


def _found(sources: tuple[str, ...], values: list[Tensor]) -> str:
    return ", ".join(f"{n} {str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for n, v in zip(sources, values, strict=True))
