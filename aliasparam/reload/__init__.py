"""Reloading a serving model as one transaction: sources, the session, deltas, digests, many ranks."""

from __future__ import annotations

from .delta_apply import apply_delta as apply_delta
from .delta_apply import prepare_delta as prepare_delta
from .live_digest import CheckpointDigest as CheckpointDigest
from .live_digest import checkpoint_digest as checkpoint_digest
from .live_digest import digest_of_folder as digest_of_folder
from .live_digest import digest_of_tensors as digest_of_tensors
from .observe import Hooks as Hooks
from .opening import reload as reload
from .session import ReloadSession as ReloadSession
from .stream import WeightStream as WeightStream
from .stream import send_weights as send_weights
