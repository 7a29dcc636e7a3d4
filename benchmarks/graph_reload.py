"""Hot reload under a captured CUDA graph: ``python benchmarks/graph_reload.py A B``.

One decode step of the model of folder A, sampling included, is captured once. Every answer below is made by replaying that
graph: A's, then B's after a reload in place, then A's again. Without a GPU the step runs uncaptured, for the same story, and with
the `reference` runner of experts too, which looks at its choices on the host. ``--against`` holds the logits of A and B against
those of other backends (of experts, where the model has any).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import StaticCache

from aliasparam_nvfp4.demo.finetune import PROMPT
from aliasparam_nvfp4.integrations.transformers import load_model, reload_folder
from aliasparam_nvfp4.integrations.transformers.load import chat_ids, logits
from aliasparam_nvfp4.linear.verify import signal_to_noise

_LENGTH = 192


class Decoder:
    """Greedy decoding with fixed addresses: token, position, mask and cache live in the same memory for ever."""

    def __init__(self, model: Any, prompt: Tensor, *, captured: bool) -> None:
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=_LENGTH)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self._columns = torch.arange(_LENGTH, device=prompt.device)
        self.prefill()
        self.replay = self._capture() if captured else self._step

    def prefill(self) -> None:
        """Forget everything, read the prompt, choose the first token. Not captured: prompts differ in length."""
        self.cache.reset()
        positions = torch.arange(self.prompt.shape[1], device=self.prompt.device).unsqueeze(0)
        self.token.copy_(self._forward(self.prompt, positions))
        self.position.fill_(self.prompt.shape[1])

    def answer(self, tokens: int) -> tuple[list[int], float]:
        """(token ids, seconds of the replays)."""
        self.prefill()
        chosen = [self.token.clone()]
        _synchronize()
        started = time.perf_counter()
        for _ in range(tokens - 1):
            self.replay()
            chosen.append(self.token.clone())
        _synchronize()
        return torch.cat(chosen).flatten().tolist(), time.perf_counter() - started

    def _step(self) -> None:
        self.token.copy_(self._forward(self.token, self.position))
        self.position.add_(1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        # Given ready-made, a mask is used as it is: the model looks at no value on the host.
        mask = torch.where(self._columns <= positions.view(1, 1, -1, 1), 0.0, float("-inf")).to(self.model.dtype)
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        best: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return best

    def _capture(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        return self.graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--backend", default="triton" if torch.cuda.is_available() else "reference")
    parser.add_argument("--moe-backend", default="auto")
    parser.add_argument("--against", nargs="*", default=[], metavar="BACKEND")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    with torch.no_grad():
        if not story(options.a, options.b, options.backend, options.moe_backend, options.tokens, console):
            raise SystemExit(1)
        for other in options.against:
            compare(options.a, options.b, options.backend, options.moe_backend, other, console)


def story(a: Path, b: Path, backend: str, moe_backend: str, tokens: int, console: Console) -> bool:
    """Whether the graph's answers changed to B's and came back, bit for bit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captured = device.type == "cuda" and moe_backend != "reference"
    model, tokenizer = load_model(a, backend, device, moe_backend=moe_backend)
    decoder = Decoder(model, chat_ids(tokenizer, PROMPT).to(device), captured=captured)
    addresses = {n: t.data_ptr() for n, t in _tensors(model)}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    graph = "a captured graph" if captured else "no graph"
    console.print(f"{where}, torch {torch.__version__}, {graph}, backend {backend}{_of_experts(model)}")

    def ask(tag: str) -> list[int]:
        ids, seconds = decoder.answer(tokens)
        end = model.generation_config.eos_token_id
        text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
        console.print(f"  {tag}: {text!r}, {(tokens - 1) / seconds:.0f} tokens/s")
        return ids

    first = ask("A")
    _reload(model, b, console)
    second = ask("B")
    cold, _ = load_model(b, backend, device, moe_backend=moe_backend)
    cold_decoder = Decoder(cold, decoder.prompt, captured=captured)
    cold_ids, _ = cold_decoder.answer(tokens)
    eager = _uncaptured(cold_decoder, tokens)
    _reload(model, a, console)
    again = ask("A")
    proofs = {
        "the same graph answers as B after the reload": second == cold_ids and second != first,
        "and as A after the next": again == first,
        "a cold model without a graph says the same as B": eager == cold_ids,
        "no address moved": addresses == {n: t.data_ptr() for n, t in _tensors(model)},
    }
    for claim, held in proofs.items():
        console.print(f"  {'proved' if held else 'FAILED'}  {claim}")
    return all(proofs.values())


def compare(a: Path, b: Path, backend: str, moe_backend: str, other: str, console: Console) -> None:
    """Print how far the logits of two backends are apart, signal to noise in dB, for both checkpoints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in (a, b):
        model, tokenizer = load_model(folder, backend, device, moe_backend=moe_backend)
        named = _of_experts(model)
        theirs, _ = load_model(folder, backend if named else other, device, moe_backend=other if named else "auto")
        found, expected = (logits(m, tokenizer, PROMPT).double() for m in (model, theirs))
        decibel = signal_to_noise(found, expected)
        console.print(f"  {folder.name}: {decibel:.1f} dB against {other}, next token {_agree(found, expected)}")


def _agree(found: Tensor, expected: Tensor) -> str:
    return "the same" if torch.equal(found[:, -1].argmax(-1), expected[:, -1].argmax(-1)) else "another"


def _of_experts(model: Any) -> str:
    names = {m.__dict__["nvfp4_runner"].name for m in model.modules() if "nvfp4_runner" in m.__dict__}
    return f", experts on {', '.join(sorted(names))}" if names else ""


def _uncaptured(decoder: Decoder, tokens: int) -> list[int]:
    decoder.replay = decoder._step
    return decoder.answer(tokens)[0]


def _reload(model: Any, folder: Path, console: Console) -> None:
    _synchronize()
    started = time.perf_counter()
    nbytes = reload_folder(model, folder)
    _synchronize()
    seconds = time.perf_counter() - started
    console.print(f"  reloaded {folder.name} in {seconds:.2f} s, {nbytes / (1 << 20):.0f} MiB")


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
