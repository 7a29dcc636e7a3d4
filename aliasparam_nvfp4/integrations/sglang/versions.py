"""The versions of SGLang whose seams this plugin was tried on."""

from __future__ import annotations

from .. import plugins

#: First version that is known to work, and the first that is not known to.
TRIED = ("0.5.23", "0.5.24")


def installed() -> str | None:
    """SGLang's version, or None."""
    return plugins.version_of("sglang")


def verdict() -> str:
    """Whether the plugin will be in place when SGLang starts here, or why not, without importing SGLang."""
    return plugins.verdict("SGLang", installed(), "sglang.srt.plugins", "SGLANG_PLUGINS", doubt())


def doubt() -> str | None:
    """One line where the installed version was not tried, or None."""
    version = installed()
    if version is None:
        return "SGLang is not installed"
    if TRIED[0] <= _key(version) < TRIED[1]:
        return None
    return f"SGLang {version} was not tried with this plugin, which knows {TRIED[0]}; its seams may have moved"


def _key(version: str) -> str:
    return version.split("+")[0]
