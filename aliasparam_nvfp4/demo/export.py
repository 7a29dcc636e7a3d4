"""bf16 model to an NVFP4 checkpoint folder, by NVIDIA's ModelOpt on the CPU. Nothing is re-written by hand."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from ._quiet import need, quiet

_CALIBRATION = (
    "What is the capital of France?",
    "What is 2+2?",
    "Name three colors.",
    "Tell me about the sea.",
)


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

        def calibrate(model: Any) -> None:
            with torch.no_grad():
                for prompt in _CALIBRATION:
                    text = tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
                    )
                    model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))

        model = mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), calibrate)
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(destination)
