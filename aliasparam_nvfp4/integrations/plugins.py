"""Whether this package's plugin will be in place when an engine starts, without importing the engine."""

from __future__ import annotations

import os
from importlib import metadata

#: The name of our entry points.
PLUGIN = "aliasparam_nvfp4"


def version_of(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def verdict(engine: str, version: str | None, group: str, allow: str, doubt: str | None) -> str:
    """One line. ``group``: of entry points; ``allow``: an environment variable that lists plugins; ``doubt``: of the version."""
    if version is None:
        return "not installed"
    if doubt is not None:
        return doubt
    if not any(point.name == PLUGIN for point in metadata.entry_points(group=group)):
        return (
            f"{engine} {version}: the plugin is not registered (install this package; running from a source tree is not enough)"
        )
    allowed = os.environ.get(allow)
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"{engine} {version}: {allow}={allowed} leaves the plugin {PLUGIN} out"
    return f"{engine} {version}: NVFP4 is served and reloaded by this package"
