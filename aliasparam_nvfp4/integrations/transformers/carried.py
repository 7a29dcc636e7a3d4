"""Tensors that nothing here computes with. They are loaded, reloaded and exported with the model.

Scales of a quantized KV cache: ModelOpt stores ``k_proj.k_scale``, ``v_proj.v_scale`` (and ``k_bias``, ``v_bias``) beside
projections of any kind; compressed-tensors ``self_attn.k_scale``, ``v_scale`` and ``q_scale``, in older files
``k_proj.output_scale``; the first ones ``self_attn.kv_scale`` (vLLM ``weight_utils.py``, ``maybe_remap_kv_scale_name``). Input
scales of modules whose activations are left as they are: exporters leave them behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...checkpoint import TensorEntry
from ...checkpoint.format import KV_SCALES
from .experts import Experts

#: Last parts of the names of activation scales.
INPUT_SCALES = ("input_scale", "input_global_scale")
#: Which of them, or of a fused module's, says that the files have scales of its activations.
TELLING = (*INPUT_SCALES, "gate_up_proj_input_scale")


def carry(model: nn.Module, stored: Mapping[str, TensorEntry]) -> list[str]:
    """Give modules a parameter (on meta) for each such tensor of the files which they have no place for; returns their names.

    Args:
        model: on the meta device, with quantized modules in their places.
        stored: the files' tensors by the model's names.
    """
    modules = dict(model.named_modules())
    carried = []
    for name, entry in stored.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in KV_SCALES and not leaf.endswith(INPUT_SCALES):  # gpt-oss: gate_up_proj_input_scale
            continue
        module = modules.get(path)
        if module is None and leaf in KV_SCALES and path.endswith(".attn") and path.removesuffix(".attn") in modules:
            module = modules[path] = nn.Module()  # vLLM's names
            modules[path.removesuffix(".attn")].add_module("attn", module)
        # Of experts apart each has its own.
        if module is not None and not isinstance(module, Experts) and not hasattr(module, leaf):
            value = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
            carried.append(name)
    return carried
