"""Strategies and laws for authors of quantization methods. Needs hypothesis (``pip install 'aliasparam[testing]'``)."""

from __future__ import annotations

from ..module.verdict import without_aliasing as without_aliasing
from . import _needs as _needs
from ._check import check_method as check_method
from ._engine import kernel_names as kernel_names
from ._formula import kernel_tensor as kernel_tensor
from ._laws import LAWS as LAWS
from ._laws import LawBroken as LawBroken
from ._laws import Report as Report
from ._machine import AliasMachine as AliasMachine
from ._machine import machine_for as machine_for
from ._oracle import expected_kernel_names as expected_kernel_names
from ._strategies import LayerPlan as LayerPlan
from ._strategies import dtypes as dtypes
from ._strategies import layers as layers
from ._strategies import lines as lines
from ._strategies import shapes as shapes
from ._values import random_values as random_values
from ._values import same_bytes as same_bytes
