"""Whether a model that is being served can take the weights of a folder, by their configurations."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint import CheckpointError, QuantConfig
from ...checkpoint.scheme import Scheme
from .carried import TELLING
from .config import model_config
from .experts import Experts
from .unwrap import plain_name

#: Entries that say how a model came here or is served, not what it is.
_CHOSEN = {
    "_name_or_path", "name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version",
}  # fmt: skip
#: Entries which do not change what a loaded model computes.
_FREE = {
    "_name_or_path", "name_or_path", "transformers_version", "quantization_config", "torch_dtype", "dtype", "architectures",
    "auto_map", "use_cache", "return_dict", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "finetuning_task", "tokenizer_class", "chunk_size_feed_forward", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "initializer_range", "initializer_factor", "router_aux_loss_coef",
    "aux_loss_alpha", "seq_aux", "output_router_logits", "output_attentions", "output_hidden_states",
    "num_nextn_predict_layers", "mtp_layers_block_type", "use_mamba_kernels", "pretraining_tp", "rescale_prenorm_residual",
    "rescale_every", "moe_shared_expert_overlap", "mamba_ssm_cache_dtype", "time_step_max", "time_step_floor",
}  # fmt: skip
_DROPOUT = re.compile(r"drop(?:out)?(?:_|$|\w*_rate)|_pdrop$|jitter_noise$")


def check_config(model: Any, folder: Path, *, strict: bool = False) -> QuantConfig:
    """The folder's quantization, where its config.json describes the model that is served.

    Entries which differ and do not change what the model computes are named in a warning.

    Args:
        model: unwrapped.
        folder: that is to be loaded.
        strict: refuse any difference.

    Raises:
        CheckpointError: another model, or tensors of another format.
    """
    parsed = QuantConfig.from_folder(folder)
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    if held is None:
        raise CheckpointError(
            "this is no model that was loaded from an NVFP4 folder",
            module=type(model).__name__,
            expected="a transformers model with a quantization_config, or a module that holds one",
        )
    before = held.parsed if hasattr(held, "parsed") else QuantConfig.from_dict(held)
    if parsed.tensors != before.tensors:
        raise _another_way(folder, f"as {before.tensors.name} stores it", f"as {parsed.tensors.name} stores it")
    found = model_config(folder)
    if type(found) is not type(model.config):  # the language model of a folder with other modalities
        found = found.get_text_config(decoder=True)
    differing = dict(_differing(model.config, found))
    needed = {key: pair for key, pair in differing.items() if strict or not _is_free(key, model.config)}
    if needed:
        shown = list(needed.items())[:5]
        raise CheckpointError(
            "the folder's config.json describes another model",
            name=str(folder),
            expected={key: old for key, (old, _) in shown},
            found={key: new for key, (_, new) in shown},
            remedy="Start the model cold from this folder instead.",
        )
    if differing:
        text = ", ".join(f"{key}: {old!r} to {new!r}" for key, (old, new) in list(differing.items())[:8])
        warnings.warn(f"{folder}: config.json differs in entries which do not change the forward: {text}", stacklevel=3)
    return parsed


def check_schemes(
    model: nn.Module, files: Mapping[str, str], config: QuantConfig, tensors: Collection[str], folder: str | Path
) -> None:
    """Refuse a folder in which a module is quantized otherwise.

    Args:
        model: unwrapped.
        files: path of each quantized module, but of experts apart, to its name in the files.
        config: the folder's.
        tensors: names of its tensors.
        folder: for messages.

    Raises:
        CheckpointError: names the first such module.
    """
    for path, module in model.named_modules():
        modules = {files[path]: plain_name(path)} if path in files else {}
        if isinstance(module, Experts):  # served as one
            parts = dict.fromkeys(name.rpartition(".")[0] for name in module.names.values())
            modules = {part: f"{plain_name(path)}{part.removeprefix(module.layer)}" for part in parts}
        stored = any(f"{theirs}.{leaf}" in tensors for theirs in modules for leaf in TELLING)
        for theirs, ours in modules.items():
            found = config.scheme_of(theirs, ours, fp4=module.scheme.is_fp4, stored=stored)
            if found != module.scheme:
                raise _another_way(folder, f"{_said(module.scheme)} of {theirs}", _said(found))


def _said(scheme: Scheme | None) -> str:
    if scheme is None:
        return "none"
    blocks = f" in blocks of {scheme.block[0]} x {scheme.block[1]}" if scheme.block else ""
    return f"{scheme.algo}{blocks}, activations {scheme.inputs or 'as they are'}"


def _another_way(folder: str | Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "the folder is quantized in another way",
        name=str(folder),
        expected=expected,
        found=found,
        remedy="Start the model cold from this folder instead.",
    )


def _differing(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    before, after = (c if isinstance(c, dict) else c.to_dict() for c in (old, new))
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if key.endswith("_config") and isinstance(a, dict) and isinstance(b, dict) and key != "quantization_config":
            yield from _differing(a, b, f"{prefix}{key}.")
        elif a != b and key not in _CHOSEN:
            yield f"{prefix}{key}", (a, b)


def _is_free(key: str, config: Any) -> bool:
    """Whether an entry changes nothing: known not to, or not an entry that the model's configuration has."""
    *path, leaf = key.split(".")
    for part in path:
        config = getattr(config, part, None)
    if leaf in _FREE or _DROPOUT.search(leaf):
        return True
    if leaf == "max_position_embeddings":
        rope = getattr(config, "rope_parameters", None) or {}
        return rope.get("rope_type") == "default"
    try:
        known = type(config)().to_dict()
    except Exception:  # a configuration that cannot be made of nothing says nothing
        return False
    return leaf not in known
