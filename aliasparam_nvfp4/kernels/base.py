"""What linear backends and MoE runners have in common: how they are found, and where and on what their kernel runs."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC
from functools import cache
from typing import Any, ClassVar

import torch

from ..errors import ShapeError


class Kernel(ABC):
    """One path to compute a layer. A file of :attr:`folder` defines one, as :attr:`constant`."""

    #: What messages call it.
    what: ClassVar[str]
    #: The package that holds a file for each.
    folder: ClassVar[str]
    #: What such a file calls the one that it defines.
    constant: ClassVar[str]

    #: Public name, see the fixed list in the docs.
    name: str
    #: Whether it quantizes activations with scales that are computed at run time, where asked for.
    dynamic_scales: bool = False
    #: Compute capabilities it runs on; empty for any device.
    capabilities: frozenset[tuple[int, int]] = frozenset()
    #: Dtypes of activations.
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    #: Packages it needs, besides torch.
    packages: tuple[str, ...] = ()
    #: ``auto`` takes the highest rank that runs on a device and fits.
    rank: int = 0
    #: The function it calls, for the tables in the docs.
    call: str = ""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or None where it can."""
        if self.capabilities:
            wanted = ", ".join(f"{major}.{minor}" for major, minor in sorted(self.capabilities))
            if device.type != "cuda":
                return f"needs a GPU of compute capability {wanted}"
            found = torch.cuda.get_device_capability(device)
            if found not in self.capabilities:
                return f"needs a GPU of compute capability {wanted}; this one has {found[0]}.{found[1]}"
        missing = [p for p in self.packages if not _is_installed(p)]
        return f"{', '.join(missing)} is not installed" if missing else None

    def lacks(self, device: torch.device) -> str | None:
        """The same, found out once, because every forward asks. In compiled code a constant, whatever other kernels are asked."""
        reason: str | None = _lacks(self.folder, self.constant, self.name, device)
        return reason

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ShapeError for activations the kernel cannot take."""
        if dtype not in self.dtypes:
            raise ShapeError(
                f"this {self.what} does not take activations of this dtype",
                name=self.name,
                expected=" or ".join(str(d).removeprefix("torch.") for d in self.dtypes),
                found=dtype,
                remedy=f"Cast the activations, or use another {self.what}.",
            )

    def __reduce__(self) -> Any:
        """By name: a layer that is copied or saved names the same kernel."""
        return _called, (self.folder, self.constant, self.name)


@cache
def kernels_in(folder: str, constant: str) -> dict[str, Any]:
    """By public name, what the files of a package define as ``constant``; those that start with an underscore define none."""
    path = importlib.import_module(folder).__path__
    names = sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))
    found = [getattr(importlib.import_module(f"{folder}.{name}"), constant) for name in names]
    return {kernel.name: kernel for kernel in found}


def _called(folder: str, constant: str, name: str) -> Kernel:
    kernel: Kernel = kernels_in(folder, constant)[name]
    return kernel


@torch.compiler.assume_constant_result
def _lacks(folder: str, constant: str, name: str, device: torch.device) -> str | None:
    return _found_out(folder, constant, name, device)


@cache
def _found_out(folder: str, constant: str, name: str, device: torch.device) -> str | None:
    return _called(folder, constant, name).unavailable(device)


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
