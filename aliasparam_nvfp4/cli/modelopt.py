"""bf16 folder to NVFP4 folder by NVIDIA's ModelOpt, on the CPU. Nothing is re-written by hand."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..checkpoint.quant_config import read_json
from ..checkpoint.special import need_plain_files
from ..demo._quiet import quiet
from ..demo.export import CALIBRATION
from .models import token_ids


def load_unquantized(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers causal-LM folder, in bf16.

    Raises:
        CheckpointError: no such folder, no config.json, a model that is quantized already, or files that transformers cannot
            read.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", name=str(folder), expected="a transformers model folder")
    need_plain_files(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        raise CheckpointError("this model is quantized already", name=str(folder), expected="bf16, fp16 or fp32 weights")
    with quiet():
        from transformers import AutoModelForCausalLM

        from ..integrations.transformers.config import readable, tokenizer_of

        tokenizer = tokenizer_of(folder)
        with readable(folder, "load the model"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.eval(), tokenizer


def quantize(model: Any, tokenizer: Any, folder: Path) -> None:
    """Quantize ``model`` (bf16, in place) with ModelOpt's NVFP4_DEFAULT_CFG and export it into ``folder``.

    Raises:
        CheckpointError: the tokenizer's chat template is broken.
        OSError: the folder cannot be written.
    """
    with quiet():
        prompts = [token_ids(tokenizer, prompt) for prompt in CALIBRATION]
        import modelopt.torch.quantization as mtq  # half a minute on a slow machine: a broken template is said before
        from modelopt.torch.export import export_hf_checkpoint

        def calibrate(model: Any) -> None:
            with torch.no_grad():
                for ids in prompts:
                    model(input_ids=ids)

        model = mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), calibrate)
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def made_whole(destination: Path) -> Iterator[Path]:
    """A new folder beside ``destination``, which gets its name where the block ends well; otherwise nothing is left of it.

    Raises:
        OSError: nothing can be written there, or ``destination`` is there when the block ends.
    """
    beside = next(parent for parent in destination.absolute().parents if os.path.lexists(parent))
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=beside))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(destination)) from None
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        destination.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(destination):
            raise FileExistsError(17, "the output exists", str(destination))
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
