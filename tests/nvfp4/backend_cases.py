"""Linear layers of every backend, on the dims of real models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from aliasparam import reload
from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.linear.backends import LinearBackend, linear_backends

from .test_linear import Layer, tensors

BACKENDS = list(linear_backends().values())
#: SmolLM2's, Kimi-K2.5's and Qwen3's (narrowed), and a prime x 16: (partitions, K).
REAL_SHAPES = [
    ((576, 192, 192), 576),
    ((1536, 1536), 576),
    ((576,), 1536),
    ((512,), 7168),
    ((256, 128), 2048),
    ((64,), 17 * 16),
]
SHAPES = [*REAL_SHAPES, ((128,), 13 * 16)]
RAGGED = [((40,), 48), ((17, 5), 16), ((300,), 11 * 16), ((7,), 64)]


def flashinfer(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, exc_type=ImportError)


def made(backend: LinearBackend, partitions: tuple[int, ...], k: int, device: Any = "cpu", **options: Any) -> Any:
    """A loaded layer; ``source`` are its checkpoint tensors if not the usual ones."""
    source = options.pop("source", None) or tensors(partitions, k)
    layer = Layer(NvFp4LinearMethod(backend.name, **options), partitions, k, device)
    with reload(layer) as session:
        session.load({n: t.to(device) for n, t in source.items()})
    return layer


def takes(backend: LinearBackend, n: int) -> bool:
    return backend.layout.name != "fragments" or n % 64 == 0


#: One backend of each format on all dims; the others, whose bytes are the same, on two (one ragged where they allow it).
FIRST = {b.layout.name: b for b in reversed(BACKENDS)}
FEW = [((64,), 17 * 16), ((17, 5), 16)]
CASES = [(b, p, k) for b in BACKENDS for p, k in ([*SHAPES, *RAGGED] if FIRST[b.layout.name] is b else FEW) if takes(b, sum(p))]
