"""Tensors of the files that the model has no place for, and needs none: each by a rule that is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

#: Parts of paths below which another modality is; a text model of such a folder does without.
_TOWERS = re.compile(
    r"(?:^|\.)(?:visual|vision_\w+|vit|image_\w+|audio_\w+|audio|video_\w+|sound_\w+|mm_projector|multi_modal_projector|"
    r"vision_tower|vision_model|vision_embed_tokens|embed_vision|embed_audio)\."
)
_MTP = re.compile(r"(?:^|\.)mtp\w*\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: Tensors that only a layer for multi-token prediction has (DeepSeek-V3, GLM).
_MTP_TENSORS = ("eh_proj", "enorm", "hnorm", "shared_head")


def dropping_rule(model: Any, names: dict[str, str]) -> Callable[[str, str], str | None]:
    """A function from (name in the files, name in the model) to the rule by which a tensor is dropped, or None.

    Args:
        model: the whole model, on meta or loaded.
        names: all names of the files, and what the model calls them.
    """
    ignored = _ignored_by_class(model)
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    beyond = _mtp_layers(list(names.values()), layers, getattr(text, "num_nextn_predict_layers", None) or 0)
    towers = {m.group() for path, _ in model.named_modules() for m in [_TOWERS.search(f"{path}.")] if m}

    def rule(theirs: str, ours: str) -> str | None:
        if ignored is not None and (ignored.search(theirs) or ignored.search(ours)):
            return f"{type(model).__name__} ignores them"
        layer = _LAYER.search(ours)
        if _MTP.search(theirs) or (layer is not None and int(layer[1]) in beyond):
            return "layers for multi-token prediction, which transformers does not run"
        if not towers and _TOWERS.search(theirs):
            return f"parts for other modalities, which {type(model).__name__} does not have"
        return None

    return rule


def _ignored_by_class(model: Any) -> re.Pattern[str] | None:
    """As transformers reads its own list (``modeling_utils.py``, ``_adjust_missing_and_unexpected_keys``)."""
    patterns = set(model.__dict__.get("_class_ignores", model._keys_to_ignore_on_load_unexpected) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


def _mtp_layers(names: list[str], layers: int | None, count: int) -> set[int]:
    if layers is None:
        return set()
    found = {int(m[1]) for name in names if any(f".{t}." in name for t in _MTP_TENSORS) for m in [_LAYER.search(name)] if m}
    return {number for number in found | set(range(layers, layers + count)) if number >= layers}
