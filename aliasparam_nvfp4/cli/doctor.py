"""``doctor``: what is installed here, what runs, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from .options import AsJson
from .output import say, say_json, table

#: Distribution names, and the extra that brings each.
PACKAGES = {
    "aliasparam": "", "torch": "", "triton": "triton", "transformers": "transformers", "accelerate": "transformers",
    "flashinfer-python": "flashinfer", "nvidia-modelopt": "quantize", "gguf": "demo", "fastapi": "serve", "uvicorn": "serve",
    "openai": "serve", "matplotlib": "pictures", "hypothesis": "testing", "vllm": "", "sglang": "",
}  # fmt: skip


def doctor(json: AsJson = False) -> None:
    """What this machine can run, and why not the rest."""
    found = findings()
    if json:
        say_json(found)
        return
    device = found["device"]
    where = f"{device['name']}, compute capability {device['capability']}" if device["capability"] else device["name"]
    say(f"python {found['python']} on {found['system']}; {where}")
    table(("package", "version", "extra"), ((p["name"], p["version"] or "not installed", p["extra"]) for p in found["packages"]))
    table(("engine", "here"), found["engines"].items())
    for title, key in (("linear backend", "linear_backends"), ("MoE runner", "moe_runners")):
        auto = found["auto"][key]
        here = {name: "auto takes it" if name == auto else "runs here" for name in found[key]}
        table((title, "here"), ((name, lacks or here[name]) for name, lacks in found[key].items()))


def findings() -> dict[str, Any]:
    """Versions, the device, and engines, and for every backend and runner what it lacks here (None where it runs)."""
    import torch

    from ..integrations.plugins import ENGINES
    from ..linear.backends import linear_backend, linear_backends
    from ..moe.runners import moe_runner, moe_runners

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if cuda else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": {"name": torch.cuda.get_device_name() if cuda else "no CUDA device", "capability": capability},
        "cuda": torch.version.cuda,
        "packages": [{"name": name, "version": version(name), "extra": extra} for name, extra in PACKAGES.items()],
        "engines": {name: engine.verdict() for name, engine in ENGINES.items()},
        "auto": {"linear_backends": linear_backend("auto", device).name, "moe_runners": moe_runner("auto", device).name},
        "linear_backends": _lacks(linear_backends().values(), device),
        "moe_runners": _lacks(moe_runners().values(), device),
    }


def version(distribution: str) -> str | None:
    """The installed version, or None; of this package also where it runs from a source tree."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "aliasparam":
            return None
        from aliasparam import __version__

        return __version__


def _lacks(known: Iterable[Any], device: Any) -> dict[str, str | None]:
    return {each.name: _all_it_lacks(each, device) for each in sorted(known, key=lambda each: -each.rank)}


def _all_it_lacks(each: Any, device: Any) -> str | None:
    """What the backend itself says, which is the first reason, and packages that are missing besides."""
    reason: str | None = each.unavailable(device)
    missing = [p for p in each.packages if find_spec(p) is None and p not in (reason or "")]
    return f"{reason}; {', '.join(missing)} is not installed" if reason and missing else reason
