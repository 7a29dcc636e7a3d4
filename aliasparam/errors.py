"""Every error of the library, each with the facts a user needs as fields and as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch


class AliasError(Exception):
    """Base of all errors raised by this package.

    Attributes:
        module: dotted path or class name of the module concerned, if known.
        name: the parameter, tensor or file concerned, if known.
        expected: what the library needed.
        found: what it got.
        remedy: what the caller can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        module: str | None = None,
        name: str | None = None,
        label: str | None = None,
        expected: Any = None,
        found: Any = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        if label is not None:  # what storages call themselves: the module and the name in one
            where, _, leaf = label.rpartition(".")
            module, name = module or where or None, name or leaf
        self.module = module
        self.name = name
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._render())

    def _render(self) -> str:
        where = ".".join(str(part) for part in (self.module, self.name) if part)
        lines = [f"{where}: {self.message}" if where else self.message]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.found is not None:
            lines.append(f"  found:    {self.found}")
        if self.remedy is not None:
            lines.append(f"  {self.remedy}")
        return "\n".join(lines)

    def located(self, **facts: Any) -> Self:
        """The same error with the fields it lacks: code that raises often knows less than its caller."""
        return type(self)(self.message, **{**facts, **self._known()})

    def _known(self) -> dict[str, Any]:
        fields = ("module", "name", "expected", "found", "remedy")
        return {field: getattr(self, field) for field in fields if getattr(self, field) is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process boundaries (torch.distributed, multiprocessing) with their fields.
        return partial(type(self), **self._known()), (self.message,)


@contextmanager
def located(**facts: Any) -> Iterator[None]:
    """Errors of the library that are raised inside say this too, where they know no better."""
    try:
        yield
    except AliasError as error:
        raise error.located(**facts).with_traceback(error.__traceback__) from error.__cause__


@contextmanager
def foreign_code(failed: str, kind: type[AliasError], **facts: Any) -> Iterator[None]:
    """Functions that a user declared are called inside: what they raise of their own becomes an error of ``kind``."""
    try:
        with located(**facts):
            yield
    except (AliasError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(failed, **facts | {"found": f"{type(error).__name__}: {error}"}) from error


class DeclarationError(AliasError):
    """A declaration contradicts itself, the module, or an earlier declaration."""


class LayoutError(AliasError):
    """A layout does not parse, or its digits do not fit the shape."""


class InferenceError(LayoutError):
    """A function that was to give a layout is no permutation of the elements; subclasses say in which way."""


class ValuesChangeError(InferenceError):
    """The function computes new values (a re-encoding): keep the source and derive the kernel name from it."""


class ElementsLostError(InferenceError):
    """Some elements are in the result not at all, or more than once."""


class DependsOnValuesError(InferenceError):
    """Other values take another order."""


class NotDeterministicError(InferenceError):
    """The same input gave two results."""


class FunctionFailedError(InferenceError):
    """The function raised, or returned no tensor."""


class DerivationError(AliasError):
    """The function of a derivation failed, or returned something else than it declared."""


class StateError(AliasError):
    """The storage is in a state in which this operation would give or keep wrong bytes."""


class StaleKernelError(StateError):
    """A module was called while a kernel-format name is older than its checkpoint-format source."""


class MemoryFreedError(StateError):
    """The memory under a declared name was given back to the allocator by other code."""


class PointerError(AliasError):
    """The operation would move an address which a CUDA graph or a kernel object may hold."""


class AdoptionError(AliasError):
    """A tensor was put in the place of a declared name and cannot be taken into its storage."""


class ReloadError(AliasError):
    """New weights do not fit the model: a tensor is missing, unexpected, duplicate or of another shape or dtype."""


class MissingExtra(AliasError):
    """An optional package that this needs is not installed; the remedy names the extra which brings it."""
