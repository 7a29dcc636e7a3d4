"""Reloading a serving model as one transaction: sources, the session, deltas, digests, many ranks."""

from __future__ import annotations

from .live_digest import CheckpointDigest as CheckpointDigest
from .live_digest import checkpoint_digest as checkpoint_digest
from .live_digest import digest_of_folder as digest_of_folder
from .session import ReloadSession as ReloadSession
from .session import reload as reload
