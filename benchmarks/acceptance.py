"""The acceptance test of SGLang PR 25190, over ranks: ``python benchmarks/acceptance.py A B [--ranks 4] [--moe triton]``.

A Qwen3-MoE NVFP4 checkpoint is loaded over several processes (NCCL with a GPU each, else gloo), reloaded from disk twice, then
from B and from A again. Decode logprobs must be those of the first load (there within 1e-4; here bit for bit), no address may
move, and B must answer otherwise. Every combination of tensor and expert parallelism that the ranks allow. Needs transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend
from aliasparam_nvfp4.moe import ExpertRanks

IDS = [[1, 5, 9, 2, 7, 3]]
TOKENS = 16


def divisions(ranks: int) -> list[tuple[int, int]]:
    """(TP, EP) with TP * EP = ranks."""
    return [(ranks // ep, ep) for ep in range(1, ranks + 1) if ranks % ep == 0]


@torch.no_grad()
def decode(model: Any) -> Tensor:
    """Log-probabilities over the vocabulary of greedily decoded tokens, through the KV cache: ``[TOKENS, 1, vocabulary]``."""
    ids = torch.tensor(IDS, device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits).float().log_softmax(-1)


def addresses(model: Any) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def serve(rank: int, options: argparse.Namespace, store: str, results: Any) -> None:
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    try:
        for tp, ep in divisions(options.ranks):
            layout = ExpertRanks(tp_rank=rank % tp, tp_size=tp, ep_rank=rank // tp, ep_size=ep)
            row = measure(layout, options, f"cuda:{rank}" if cuda else "cpu")
            rows: list[Any] = [None] * options.ranks
            dist.all_gather_object(rows, row)
            if rank == 0:
                results.put((tp, ep, rows))
    finally:
        dist.destroy_process_group()


def measure(ranks: ExpertRanks, options: argparse.Namespace, device: str) -> dict[str, Any]:
    with use_backend(options.linear, moe=options.moe, ranks=ranks):
        model = AutoModelForCausalLM.from_pretrained(options.a, dtype=torch.bfloat16, device_map=device).eval()
    decode(model)  # kernels are compiled and chosen
    first, where = decode(model), addresses(model)
    found: dict[str, Any] = {"repeatable": torch.equal(decode(model), first), "seconds": []}
    answers = []
    for folder in (options.a, options.a, options.b, options.a):
        begun = time.perf_counter()
        reload_folder(model, folder)
        found["seconds"].append(time.perf_counter() - begun)
        answers.append(decode(model))
    found["differences"] = [float((answer - first).abs().max()) for answer in answers]
    found["equal"] = [torch.equal(answer, first) for answer in answers]
    found["moved"] = sum(addresses(model)[name] != at for name, at in where.items())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--linear", default="auto", help="backend of linear layers")
    parser.add_argument("--moe", default="auto", help="backend of experts")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (options, f"{folder}/store", results), nprocs=options.ranks)
    table = Table("TP", "EP", "A again", "A again", "B", "A", "addresses moved", "reload, s", title=f"{options.moe} experts")
    good = True
    while not results.empty():
        tp, ep, rows = results.get()
        right = [all(row["equal"][i] for row in rows) for i in range(4)]
        good &= right == [True, True, False, True] and not any(row["moved"] for row in rows)
        cells = ["bit-equal" if ok else f"{max(r['differences'][i] for r in rows):.3g} apart" for i, ok in enumerate(right)]
        seconds = " ".join(f"{max(row['seconds'][i] for row in rows):.2f}" for i in range(4))
        repeatable = "" if all(row["repeatable"] for row in rows) else " (the model itself is not repeatable)"
        table.add_row(str(tp), str(ep), *cells, str(sum(row["moved"] for row in rows)) + repeatable, seconds)
    Console(width=140).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
