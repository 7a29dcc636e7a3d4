"""Reloading a serving model as one transaction."""

from __future__ import annotations

from .session import ReloadSession as ReloadSession
from .session import reload as reload
