"""Errors about checkpoint folders."""

from __future__ import annotations

from aliasparam.errors import AliasError


class CheckpointError(AliasError):
    """A folder or a tensor in it cannot be used: absent, damaged, or not what the model needs."""


class UnsupportedFormatError(CheckpointError):
    """A checkpoint of a kind this package does not read."""
