"""A folder that a served model is to be updated from, checked before the first write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from aliasparam import TensorSpec

from ...checkpoint import CheckpointError, CheckpointFolder
from ...errors import ScaleError
from ...quantize.block_scales import need_block_scales
from ...quantize.global_scale import EXPECTED, are_scales
from .served import same

#: Entries of config.json that decide what tensors mean.
_MEANING = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_experts", "num_local_experts",
    "n_routed_experts", "num_experts_per_tok", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "norm_topk_prob",
)  # fmt: skip


def open_checked(path: str, before: str, known: Mapping[str, TensorSpec], rank: int, ranks: int) -> CheckpointFolder:
    """The folder, opened, where headers, config and scales say that it can be served.

    Args:
        path: the new folder.
        before: the folder that is served; its config.json is compared where it can be read.
        known: names, shapes and dtypes of the first load; empty where they are not known.
        rank, ranks: block scales are read by turns.

    Raises:
        CheckpointError: files that do not check, another model, or tensors that are missing or of another shape or dtype.
        ScaleError: global scales that are none, or block scales that are NaN.
    """
    folder = CheckpointFolder(path)
    try:
        _check_config(Path(path), Path(before))
        _check_headers(folder, known, _headers(before))
        _check_scales(folder, rank, ranks)
    except BaseException:
        folder.close()
        raise
    return folder


def stream(folder: CheckpointFolder, known: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the first load had too, read when it is asked for; at the end the files must be unchanged."""
    for name in folder.tensors:
        if name in known or not known:
            yield name, folder.read(name)
    folder.check_unchanged()


def _check_config(path: Path, before: Path) -> None:
    found, wanted = _config(path), _config(before)
    if found is None or wanted is None:
        return
    differing = {key: (wanted.get(key), found.get(key)) for key in _MEANING if wanted.get(key) != found.get(key)}
    ways = [_quantization(config) for config in (wanted, found)]
    if ways[0] != ways[1]:
        differing["quantization_config"] = ways[0], ways[1]
    if differing:
        raise CheckpointError(
            "config.json describes another model than the one that is served",
            name=str(path),
            expected={key: old for key, (old, _) in differing.items()},
            found={key: new for key, (_, new) in differing.items()},
            remedy="Start the engine from this folder instead.",
        )


def _config(path: Path) -> Any:
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return None  # a hub's name, or a folder of weights alone


def _quantization(config: Any) -> Any:
    way = config.get("quantization_config")
    return {key: way.get(key) for key in ("quant_method", "quant_algo", "group_size")} if isinstance(way, dict) else way


def _headers(path: str) -> frozenset[str]:
    """The tensors of the folder that is served, some of which its loader may have left out; none where it is gone."""
    try:
        with closing(CheckpointFolder(path)) as folder:
            return frozenset(folder.tensors)
    except CheckpointError:
        return frozenset()


def _check_headers(folder: CheckpointFolder, known: Mapping[str, TensorSpec], before: frozenset[str]) -> None:
    have = folder.tensors
    extra = [f"unexpected: {n} ({have[n].spec})" for n in have if n not in known and n not in before] if known else []
    missing = [f"missing: {name} ({spec})" for name, spec in known.items() if name not in have]
    unfit = [
        f"{name}: expected {spec}, found {have[name].spec}"
        for name, spec in known.items()
        if name in have and not same(have[name].spec, spec)
    ]
    lines = [*missing, *unfit, *extra]
    if lines:
        raise CheckpointError(
            "the folder does not fit the checkpoint that was loaded first; nothing was written",
            name=str(folder.path),
            found="\n            ".join([*lines[:5], *([f"… and {len(lines) - 5} more"] if len(lines) > 5 else [])]),
            remedy="Export the checkpoint again from the same model, or start the engine from this folder.",
        )


def _check_scales(folder: CheckpointFolder, rank: int, ranks: int) -> None:
    for name in folder.tensors:
        # An expert that met no token in calibration has an input scale of 0: the largest of its layer counts then.
        if name.endswith("weight_scale_2") or (name.endswith("input_scale") and ".experts." not in name):
            value = folder.read(name)
            if not bool(are_scales(value).all()):
                found = value.tolist()
                raise ScaleError("a global scale is not a scale", name=f"{folder.path}: {name}", expected=EXPECTED, found=found)
    block_scales = [n for n, entry in folder.tensors.items() if n.endswith("weight_scale") and entry.dtype.itemsize == 1]
    for name in block_scales[rank::ranks]:
        for _, piece in folder.chunks(name):
            need_block_scales(piece, f"{folder.path}: {name}")
