"""Strategies and laws for authors of quantization methods. Needs hypothesis (``pip install 'aliasparam[testing]'``)."""

from __future__ import annotations

from ._machine import AliasMachine as AliasMachine
from ._machine import machine_for as machine_for
from ._strategies import layers as layers
from ._strategies import transforms as transforms
