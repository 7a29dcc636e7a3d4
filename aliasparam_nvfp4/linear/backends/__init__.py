"""Backends by name. Every file of this folder which does not start with an underscore defines one ``BACKEND``."""

from __future__ import annotations

import torch

from ...errors import BackendError, ShapeError
from ...kernels.base import kernels_in
from ...kernels.choice import choose
from ._base import KernelNames as KernelNames
from ._base import LinearBackend as LinearBackend
from ._base import LinearLayout as LinearLayout
from ._base import LinearShape as LinearShape


def linear_backends() -> dict[str, LinearBackend]:
    """All linear backends by public name."""
    return kernels_in(LinearBackend.folder, LinearBackend.constant)


def linear_backend(
    name: str, device: torch.device | None = None, *, input_scale: bool = True, dynamic: bool = False
) -> LinearBackend:
    """The backend called ``name``; ``auto`` picks the best that runs on ``device`` (default: what this process has), and that
    does without activation scales where there are none, or computes them at run time where it is ``dynamic``.

    Raises:
        BackendError: no such backend.
    """
    return chosen(name, device, input_scale=input_scale, dynamic=dynamic)[0]


def chosen(
    name: str,
    device: torch.device | None = None,
    *,
    input_scale: bool = True,
    dynamic: bool = False,
    shape: LinearShape | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LinearBackend, str]:
    """(backend, why it is that one). ``auto`` takes the highest rank that runs on ``device`` and takes the dims and the dtype.

    Raises:
        BackendError: no such backend.
    """
    return choose("linear backend", linear_backends(), name, device, lambda b: _misfit(b, input_scale, dynamic, shape, dtype))


def _misfit(
    backend: LinearBackend, input_scale: bool, dynamic: bool, shape: LinearShape | None, dtype: torch.dtype | None
) -> str | None:
    """Why a backend that runs here cannot serve this layer, or None where it can."""
    try:
        backend.check_scales(input_scale=input_scale, dynamic=dynamic)
        if shape is not None:
            backend.check_shape(shape)
        if dtype is not None:
            backend.check_dtype(dtype)
    except BackendError as error:
        return error.message
    except ShapeError as error:
        return f"expects {error.expected}, found {error.found}"
    return None
