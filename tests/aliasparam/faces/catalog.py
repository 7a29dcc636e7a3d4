"""Every face: one function each, done to a declared layer and to a plain one. The order here is that of the docs."""

from __future__ import annotations

from . import reads, writes, memory, modules, forwards, distributed, experts  # isort: skip  # noqa: F401
from .titled import FACES as FACES
from .titled import INVALIDATES as INVALIDATES
from .titled import KINDS as KINDS
from .titled import PREPARED as PREPARED
from .titled import UNSEEN as UNSEEN
from .titled import Face as Face
