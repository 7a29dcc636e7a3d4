"""Whether the plugin is in place. SGLang only logs a plugin or a hook that fails, and then serves with its own classes."""

from __future__ import annotations

import pkgutil

from ..plugins import SGLANG


def status() -> str:
    """One line: what SGLang would do here, and what is wrong. Loads SGLang's plugins, which ``doctor`` does not."""
    if (doubt := SGLANG.doubt()) is not None:
        return doubt
    try:
        missing = missing_hooks()
    except Exception as error:  # another engine's import may fail in any way
        return f"SGLang cannot be imported: {error}"
    if missing:
        return f"SGLang: the plugin is not in place at {', '.join(missing)}"
    return f"SGLang {SGLANG.installed()}: the plugin is in place"


def check_installed() -> None:
    """
    Raises:
        RuntimeError: the plugin is not in place everywhere.
    """
    if missing := missing_hooks():
        raise RuntimeError(f"this library's SGLang plugin is not in place at {', '.join(missing)}; SGLang's log says why")


def missing_hooks() -> list[str]:
    """Targets that do not lead to our hooks, after SGLang's plugins were loaded."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return unhooked()


def unhooked() -> list[str]:
    """The same as things are now."""
    from .plugin import hooks

    return [target for target in hooks() if not _is_hooked(target)]


def _is_hooked(target: str) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    try:
        found = pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return False
    return target in HookRegistry._patched and hasattr(found, "__wrapped__")
