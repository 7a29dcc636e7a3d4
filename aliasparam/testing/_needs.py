"""Says which extra is missing, before another import fails for it."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hypothesis") is None:
    raise ModuleNotFoundError("aliasparam.testing needs hypothesis: pip install 'aliasparam[testing]'", name="hypothesis")
