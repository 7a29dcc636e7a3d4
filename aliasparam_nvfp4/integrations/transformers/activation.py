"""What a class of transformers' fused experts computes, asked from the class itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from aliasparam.host import HOST

from ...moe import ExpertActivation

_KINDS = (ExpertActivation(), ExpertActivation("geglu"))
#: What classes call the bound of gate and up, and alpha.
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


def expert_activation(module: nn.Module) -> ExpertActivation | None:
    """The activation of ``module``, or None for experts which are not computed as :class:`ExpertActivation` says: with a norm of
    their own, or with another function. Of experts with biases, by columns and with neighbouring gate and up, all three or none.

    The class's own function (``_apply_gate``, or ``act_fn`` without a gate; see transformers' ``integrations/moe.py``) is run on
    a few values and compared: a class which holds its sums below a limit has the same ``act_fn`` as one that does not.
    """
    odd = {getattr(module, "has_bias", False), getattr(module, "is_transposed", False), not _halves(module)}
    if not hasattr(type(module), "_apply_gate") or len(odd) > 1 or getattr(module, "has_post_expert_norm", False):
        return None
    far = torch.logspace(1.6, 6, 45, dtype=torch.float64, device=HOST)  # no class bounds its sums beyond
    x = torch.cat([torch.linspace(-40, 40, 641, dtype=torch.float64, device=HOST), far, -far])
    gate, up = x, x.flip(0) * 0.7 + 1
    with torch.no_grad(), HOST, suppress(Exception):
        if "up_proj" in module._parameters:
            relu2 = ExpertActivation("relu2")
            return relu2 if torch.allclose(module.act_fn(x), relu2(x, None)) else None  # type: ignore[operator]
        both = torch.cat([gate, up]) if _halves(module) else torch.stack([gate, up], -1).flatten()
        theirs = module._apply_gate(both.unsqueeze(0))[0]  # type: ignore[operator]
        return next((kind for kind in _candidates(module) if torch.allclose(theirs, kind(gate, up), rtol=1e-9)), None)
    return None


def by_columns(module: nn.Module) -> bool:
    """Whether experts have biases, matrices by columns, and gate and up as neighbours (gpt-oss)."""
    return bool(getattr(module, "is_transposed", False))


def _halves(module: nn.Module) -> bool:
    return bool(getattr(module, "is_concatenated", True))


def _candidates(module: nn.Module) -> Iterator[ExpertActivation]:
    yield from _KINDS
    limit = next((float(getattr(module, n)) for n in _LIMITS if getattr(module, n, None)), None)
    alpha = next((float(getattr(module, n)) for n in _ALPHAS if getattr(module, n, None)), 1.0)
    for beta in (0.0, 1.0):
        yield ExpertActivation("swiglu", alpha=alpha, beta=beta, limit=limit)
