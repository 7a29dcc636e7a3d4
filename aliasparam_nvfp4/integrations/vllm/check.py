"""Whether this package is really in place: vLLM only logs plugins that fail, and serves by its own methods then."""

from __future__ import annotations

from ..hooking import missing
from .plugin import hooks


def missing_seams() -> list[str]:
    """What :func:`register` should have replaced in vLLM and did not, or what somebody replaced after it."""
    return missing(hooks())
