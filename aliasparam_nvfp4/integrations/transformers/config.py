"""config.json and tokenizer files of a folder, read by transformers: what it cannot read is one error which names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from aliasparam.errors import AliasError

from ...checkpoint import CheckpointError, CheckpointFolder, QuantConfig
from ...checkpoint.format import COMPRESSED_TENSORS
from ...checkpoint.layer_count import need_layers


@contextmanager
def readable(folder: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises inside the block says that it cannot ``what`` of this folder."""
    try:
        yield
    except (AliasError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"transformers cannot {what}",
            name=str(folder),
            expected="the files of a transformers causal language model",
            found=f"{type(error).__name__}: {lines[0] if lines else 'no message'}",
        ) from error


#: What transformers knows compressed-tensors by.
METHOD = "compressed-tensors"


def model_config(folder: Path) -> Any:
    """The model's configuration. Its ``quantization_config`` is that of hf_quant_config.json where config.json has none.

    Raises:
        CheckpointError: a model that transformers does not know, or entries that it refuses.
    """
    with readable(folder, "read the model's configuration"):
        config = AutoConfig.from_pretrained(folder)
    parsed, files = QuantConfig.from_folder(folder), CheckpointFolder(folder)
    files.close()
    need_layers(config.to_dict(), files.tensors, str(folder))
    config.quantization_config = {**parsed.raw, "quant_method": METHOD if parsed.tensors is COMPRESSED_TENSORS else "modelopt"}
    return config


def tokenizer_of(folder: Path) -> Any:
    """Raises CheckpointError where there are no tokenizer files, or broken ones."""
    with readable(folder, "read the tokenizer"):
        return AutoTokenizer.from_pretrained(folder)
