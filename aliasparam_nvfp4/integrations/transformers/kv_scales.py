"""Scales of a quantized KV cache. Attention does not use them here; they are loaded, reloaded and exported with the model.

ModelOpt stores ``k_proj.k_scale`` and ``v_proj.v_scale`` beside projections of any kind, NVFP4 or not; compressed-tensors stores
``self_attn.k_scale``, ``v_scale`` and ``q_scale`` (``kv_cache_scheme``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...checkpoint import TensorEntry

#: Last parts of their names.
KV_SCALES = ("k_scale", "v_scale", "q_scale")


def carry_kv_scales(model: nn.Module, stored: Mapping[str, TensorEntry]) -> None:
    """Give modules a parameter (on meta) for each such tensor of the files which they have no place for.

    Args:
        model: on the meta device.
        stored: the files' tensors by the model's names.
    """
    modules = dict(model.named_modules())
    for name, entry in stored.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if leaf in KV_SCALES and module is not None and not hasattr(module, leaf):
            value = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
