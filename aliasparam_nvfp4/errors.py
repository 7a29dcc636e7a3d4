"""Errors of the NVFP4 package; all are :class:`aliasparam.errors.AliasError`."""

from __future__ import annotations

from aliasparam.errors import AliasError


class ScaleError(AliasError):
    """Scales which the kernel format cannot express, or which are not scales."""


class BackendError(AliasError):
    """An unknown backend, or one that cannot run here."""


class ShapeError(AliasError):
    """Dimensions which NVFP4 or a backend cannot take."""
