"""An NVFP4 folder by the real llm-compressor, for the tests which ALIASPARAM_LLMCOMPRESSOR names a folder of them to.

llm-compressor pins other versions than the test environment has, so it runs in one of its own, on the CPU:

    python3.11 -m venv lc && lc/bin/pip install torch==2.13.0
    echo torch==2.13.0 > lc/constraints.txt
    lc/bin/pip install -c lc/constraints.txt llmcompressor==0.14.0.1 typer rich
    PYTHONPATH=. lc/bin/python -m tests.nvfp4.make_llmcompressor_folder TUNED OUT --variant mixtral_8

TUNED is the demo's fine-tuned model in bf16 (``smollm2-135m-tuned-a`` in its cache folder, made by ``make demo DEMO=--moe``).
OUT is made below the folder that ALIASPARAM_LLMCOMPRESSOR shall name: ``dense``, ``mixtral_8``, ``mixtral_4`` or ``qwen2_8``, and
``dense-a16`` with ``--scheme NVFP4A16``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

VARIANTS = ("dense", "mixtral_8", "mixtral_4", "qwen2_8")
PROMPTS = ("What is the capital of France?", "What is 2+2?", "Name three colors.", "Tell me about the sea.")


def make(tuned: Path, out: Path, variant: str, scheme: str) -> None:
    """``oneshot`` with llm-compressor's own recipe, then its own saving."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    if variant != "dense":
        from aliasparam_nvfp4.demo import split

        model = getattr(split, variant)(model)
    model = model.to(torch.bfloat16)
    if variant != "dense":  # llm-compressor rewrites experts as they are loaded, so it gets a folder
        base = out.with_name(out.name + ".bf16")
        model.save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([dict(tokenizer(chat, add_special_tokens=False)) for chat in chats]),
        recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*gate$"]),
        max_seq_length=64,
        num_calibration_samples=len(chats),
        moe_calibrate_all_experts=True,
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="dense")
    parser.add_argument("--scheme", choices=("NVFP4", "NVFP4A16"), default="NVFP4")
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
