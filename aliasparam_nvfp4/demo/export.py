"""bf16 model to an NVFP4 checkpoint folder, by NVIDIA's ModelOpt on the CPU. Nothing is re-written by hand."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..checkpoint.quant_config import read_json
from ._quiet import need, quiet

_CALIBRATION = (
    "What is the capital of France?",
    "What is 2+2?",
    "Name three colors.",
    "Tell me about the sea.",
)


def load_unquantized(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers causal-LM folder, in bf16.

    Raises:
        CheckpointError: no such folder, no config.json, a model that is quantized already, or files that transformers cannot
            read.
        MissingExtra: transformers is not installed.
    """
    need("transformers", "modelopt")
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", name=str(folder), expected="a transformers model folder")
    if "quantization_config" in read_json(folder / "config.json"):
        raise CheckpointError("this model is quantized already", name=str(folder), expected="bf16, fp16 or fp32 weights")
    with quiet():
        from transformers import AutoModelForCausalLM

        from ..integrations.transformers.config import readable, tokenizer_of

        tokenizer = tokenizer_of(folder)
        with readable(folder, "load the model"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.eval(), tokenizer


def quantize_to_nvfp4(model: Any, tokenizer: Any, destination: Path) -> None:
    """Quantize ``model`` (bf16, in place) with ModelOpt's NVFP4_DEFAULT_CFG and export it to ``destination``.

    The folder appears whole or not at all: it is written beside and renamed at the end.

    Raises:
        MissingExtra: ModelOpt is not installed.
        FileExistsError: ``destination`` exists.
    """
    need("modelopt", "transformers")
    if destination.exists():
        raise FileExistsError(f"{destination} exists; choose another folder or remove it")
    unfinished = destination.with_name(destination.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        from ..integrations.transformers.load import chat_ids

        def calibrate(model: Any) -> None:
            with torch.no_grad():
                for prompt in _CALIBRATION:
                    model(input_ids=chat_ids(tokenizer, prompt))

        model = mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), calibrate)
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(destination)
