"""Reloading a serving model as one transaction: sources, the session, deltas, digests, many ranks."""

from __future__ import annotations

from .session import ReloadSession as ReloadSession
from .session import reload as reload
