"""What can be wrong with new weights before any of them is written, and with ranks that are to serve them."""

from __future__ import annotations

from ..errors import AliasError, ReloadError


class SourceError(ReloadError):
    """A checkpoint folder cannot be read, is no valid one, or changed while it was read."""


class DeltaError(SourceError):
    """A delta is malformed, does not apply to what is there, or does not give what its checksum promises."""


class StreamError(SourceError):
    """A stream of weights ended early, is malformed, came too late, or the other side refused it."""


class RanksError(AliasError):
    """The ranks did not agree in time on the generation to serve."""
