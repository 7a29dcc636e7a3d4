"""An RL loop in small: a trainer streams each step's weights to a server, and the next step as a delta. Two processes.

    python examples/rl_loop.py

The trainer fine-tunes SmolLM2-135M, quantizes it to NVFP4 and sends it over ``torch.distributed`` (gloo here; NCCL takes the same
calls). The server, transformers with this package, answers before and after. After each commit both say what they hold, by
digest: no weights move for that.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from aliasparam import checkpoint_digest, reload
from aliasparam.reload import WeightStream, digest_of_tensors, send_weights
from aliasparam.reload.delta_writer import diff

TRAINER, SERVER = 0, 1


# -- the trainer -------------------------------------------------------------------------------------------------------------


def train(store: dist.Store, source: Path, start: str | None, steps: int) -> None:
    from aliasparam_nvfp4.demo.finetune import finetune

    model, tokenizer = _base(start)
    finetune(model, tokenizer, "B", steps=steps)
    first = quantized(model, tokenizer)
    sent = send_weights(first, SERVER, seconds=600)  # the server has committed when this returns
    print(f"trainer: streamed {sent / 1e6:.0f} MB", flush=True)
    compare(store, "stream", first)

    finetune(model, tokenizer, "B", steps=1)
    second = quantized(model, tokenizer)
    folder = source / "weight_v000002"
    changed, total = diff(first, second, folder, version=2, base_version=1)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"trainer: one more step, {changed} of {total} tensors changed, a delta of {size / 1e6:.1f} MB", flush=True)
    store.set("published", str(folder))
    compare(store, "delta", second)


def quantized(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """The NVFP4 tensors of the model as it is now, by the names that checkpoints have."""
    from aliasparam_nvfp4.demo.export import CALIBRATION, nvfp4_tensors
    from aliasparam_nvfp4.integrations.transformers.load import chat_ids

    with torch.no_grad():
        half = copy.deepcopy(model).to(torch.bfloat16).eval()
        return nvfp4_tensors(half, [chat_ids(tokenizer, prompt) for prompt in CALIBRATION])


def compare(store: dist.Store, what: str, tensors: dict[str, Tensor]) -> None:
    same = store.get(f"digest of {what}").decode() == digest_of_tensors(tensors).whole
    print(f"trainer: the server's digest is {'mine' if same else 'ANOTHER'} after the {what}", flush=True)


def _base(start: str | None) -> tuple[Any, Any]:
    """SmolLM2 in float32, or a model that was fine-tuned before."""
    if start is None:
        from aliasparam_nvfp4.demo.base import load_base

        return load_base()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), AutoTokenizer.from_pretrained(start)


# -- the server --------------------------------------------------------------------------------------------------------------


def serve(store: dist.Store, folder: Path) -> None:
    from aliasparam_nvfp4.demo.finetune import PROMPT
    from aliasparam_nvfp4.integrations.transformers import answer, apply_delta_folder, load_model

    model, tokenizer = load_model(folder)

    def say(when: str) -> None:
        print(f"server, {when}: {answer(model, tokenizer, PROMPT)}", flush=True)

    say("checkpoint A")
    with WeightStream(TRAINER, seconds=600) as stream, reload(model, policy="staged", source="stream") as session:
        session.load(stream)
        say("while weights arrive")
    say("after the stream")
    store.set("digest of stream", checkpoint_digest(model).whole)

    delta = store.get("published").decode()
    version = apply_delta_folder(model, delta, serving=1)
    say(f"after the delta to version {version}")
    store.set("digest of delta", checkpoint_digest(model).whole)


def run(rank: int, port: int, options: argparse.Namespace, source: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=600))
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2)
    if rank == TRAINER:
        train(store, source, options.start, options.steps)
    else:
        serve(store, options.serving)
    dist.destroy_process_group()


def main() -> None:
    from aliasparam_nvfp4.demo.finetune import STEPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serving", type=Path, help="the folder that serves first; the demo's checkpoint A without")
    parser.add_argument("--start", help="a model to go on training from; SmolLM2 without")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.serving is None:
        from rich.console import Console

        from aliasparam_nvfp4.demo.checkpoints import default_cache, prepare_checkpoints

        options.serving = prepare_checkpoints(default_cache(), Console()).a
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as source:
        multiprocessing.spawn(run, (store.port, options, Path(source)), nprocs=2)  # one that fails ends the other


if __name__ == "__main__":
    main()
