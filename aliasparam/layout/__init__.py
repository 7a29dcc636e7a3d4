"""Layouts: where a kernel has the elements of a checkpoint tensor, as one line. Pure; knows no module and no Parameter."""

from __future__ import annotations

from ..errors import InferenceError as InferenceError
from ..errors import LayoutError as LayoutError
from .bound import BoundLayout as BoundLayout
from .boxes import Box as Box
from .index import IndexLayout as IndexLayout
from .layout import Layout as Layout
from .opaque import OpaqueLayout as OpaqueLayout
