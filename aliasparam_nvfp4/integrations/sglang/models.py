"""Which models this plugin updates, and what SGLang does with them after a load."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .linear import AliasedFp4LinearMethod
from .moe import AliasedModelOptNvFp4FusedMoEMethod

_OURS = (AliasedFp4LinearMethod, AliasedModelOptNvFp4FusedMoEMethod)
#: Methods that leave weights as they were loaded, by name, because what they are imported from varies.
_PLAIN = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "ModelOptFp8KVCacheMethod", "BaseKVCacheMethod"})
_logger = logging.getLogger(__name__)
_said: set[str] = set()


def is_ours(model: nn.Module) -> bool:
    """Whether all weights of the model are ours or as they were loaded. Where other methods convert some (FP8 beside NVFP4),
    SGLang's own update runs: our layers are right in it too, but it is no transaction."""
    methods = [method for method in (getattr(m, "quant_method", None) for m in model.modules()) if method is not None]
    if not any(isinstance(method, _OURS) for method in methods):
        return False
    others = {type(m).__name__ for m in methods if not isinstance(m, _OURS)} - _PLAIN
    if others and not others <= _said:
        _said.update(others)
        _logger.warning("updates are SGLang's own, and no transactions, beside %s", ", ".join(sorted(others)))
    return not others


def finish(model: Any) -> None:
    """What SGLang does after ``load_weights``, but for our layers: methods of others, and what the model derives by itself
    (``DefaultModelLoader.postprocess_weights`` and ``post_load_weights`` in ``sglang/srt/model_loader/loader.py``)."""
    from sglang.srt.model_loader import loader

    with torch.no_grad():
        for module, method in loader._modules_with_quant_method(model):
            if not isinstance(method, _OURS):
                method.process_weights_after_loading(module)
        loader.post_load_weights(model)
