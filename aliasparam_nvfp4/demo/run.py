"""The main job: serve A, reload B into the same model, reload A, and prove every promise on the way."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from aliasparam import checkpoint_state_dict, memory_report, process
from aliasparam.errors import AliasError

from ..checkpoint import CheckpointFolder
from ._peak import PeakMemory
from ._quiet import need, quiet
from .checkpoints import DemoCheckpoints, prepare_checkpoints
from .finetune import PROMPT, expected_text
from .large_models import MODELS, scale_report
from .split import DENSE, Variant

#: What a reload may take above the model itself.
RELOAD_EXTRA = 64 << 20
_GIB = 1 << 30
_MIB = 1 << 20


class Demo:
    """One run: prints what it does, collects what it proved."""

    def __init__(
        self,
        cache: Path,
        console: Console,
        backend: str = "reference",
        *,
        variant: Variant = DENSE,
        moe_backend: str = "reference",
        verbose: bool = False,
    ) -> None:
        self.cache, self.console, self.variant, self.verbose = cache, console, variant, verbose
        self.backend, self.moe_backend = backend, moe_backend
        self.proofs: list[tuple[str, bool, str]] = []

    def run(self) -> bool:
        """Whether every proof held."""
        need("transformers", "gguf", "accelerate")
        self._heading(f"Two NVFP4 checkpoints of {self.variant.title}")
        checkpoints = prepare_checkpoints(self.cache, self.console, self.variant)
        self._serve(checkpoints)
        if self.variant is DENSE:
            self._naive_ways(checkpoints)
        if self.verbose:
            self._large_models()
        return self._verdict()

    # -- the story -----------------------------------------------------------------------------------------------------

    def _serve(self, checkpoints: DemoCheckpoints) -> None:
        with quiet():
            from ..integrations.transformers import logits

        self._heading("Load A, reload B, reload A")
        model, tokenizer = self._load(checkpoints.a)
        pointers = addresses(model)
        self._ask(model, tokenizer, "A")
        first_a = logits(model, tokenizer, PROMPT)
        self._prove_routing(model, tokenizer)

        extra = self._reload(model, checkpoints.b, "B")
        self._ask(model, tokenizer, "B")
        warm_b = logits(model, tokenizer, PROMPT)
        cold, _ = self._load(checkpoints.b)
        self._prove("warm B equals a cold load of B, logits bit for bit", torch.equal(warm_b, logits(cold, tokenizer, PROMPT)))
        self._prove("warm B equals a cold load of B, every byte of every name", fingerprints(model) == fingerprints(cold))
        del cold
        self._prove_export(model, checkpoints.b)
        self._prove_refusal(model, tokenizer, checkpoints.b)

        extra = max(extra, self._reload(model, checkpoints.a, "A"))
        self._ask(model, tokenizer, "A")
        self._prove("A again equals the first A, logits bit for bit", torch.equal(first_a, logits(model, tokenizer, PROMPT)))
        self._prove_export(model, checkpoints.a)
        before = fingerprints(model)
        again = process(model)
        self._prove("processing twice changes nothing", again == 0 and fingerprints(model) == before)
        count = len(pointers)
        self._prove(f"no address moved ({count} tensors)", addresses(model) == pointers)
        self._prove(
            f"a reload takes at most {RELOAD_EXTRA // _MIB} MiB above the model", extra <= RELOAD_EXTRA, f"{extra / _MIB:.1f} MiB"
        )
        self._memory(model)

    def _memory(self, model: Any) -> None:
        report = memory_report(model)
        one, two = report.allocated_bytes / _MIB, report.two_copies_bytes / _MIB
        self.console.print(f"  quantized layers take {one:.1f} MiB; with a second copy for the kernels {two:.1f} MiB")
        if self.verbose:
            self.console.print(str(report), soft_wrap=True)

    def _load(self, folder: Path) -> tuple[Any, Any]:
        with quiet():
            from ..integrations.transformers import load_model

            return load_model(folder, self.backend, moe_backend=self.moe_backend)

    def _prove_routing(self, model: Any, tokenizer: Any) -> None:
        """Every layer's router sends the prompt's tokens to different experts, and none to all."""
        from ..integrations.transformers import Experts, logits

        chosen: dict[str, Tensor] = {}
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
        hooks = [m.register_forward_pre_hook(lambda _, args, path=p: chosen.update({path: args[1]})) for p, m in layers]
        logits(model, tokenizer, PROMPT)
        for hook in hooks:
            hook.remove()
        if not layers:
            return
        choices = {path: {tuple(sorted(row)) for row in ids.tolist()} for path, ids in chosen.items()}
        fewest = min(len(sets) for sets in choices.values())
        used = {expert for sets in choices.values() for experts in sets for expert in experts}
        self._prove(
            "tokens go to different experts in every layer",
            len(choices) == len(layers) and fewest > 1,
            f"at least {fewest} choices of {len(next(iter(chosen.values()))[0])} among {len(used)} experts",
        )

    def _ask(self, model: Any, tokenizer: Any, tag: str) -> None:
        from ..integrations.transformers import answer

        self.console.print(f"  {PROMPT}  ", end="", style="dim")
        text = answer(model, tokenizer, PROMPT, on_text=lambda piece: self.console.print(piece, end=""))
        self.console.print()
        self._prove(f"{tag} answers as it was taught", text == expected_text(tag), repr(text))

    def _reload(self, model: Any, folder: Path, tag: str) -> int:
        from ..integrations.transformers import reload_folder

        total = sum(e.nbytes for e in CheckpointFolder(folder).tensors.values())
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        started = time.perf_counter()
        shown = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with PeakMemory() as peak, shown as bar:
            task = bar.add_task(f"hot reload of {tag}", total=total)
            reload_folder(model, folder, on_bytes=lambda n: bar.advance(task, n))
        seconds = time.perf_counter() - started
        above = f"peak {peak.extra_bytes / _MIB:.1f} MiB above the model"
        self.console.print(f"  hot reload of {tag}: {total / 1e6:.0f} MB in {seconds:.2f} s, {above}")
        return peak.extra_bytes

    def _prove_export(self, model: Any, folder: Path) -> None:
        source = CheckpointFolder(folder)
        exported = checkpoint_state_dict(model)
        same = exported.keys() == source.tensors.keys() and all(
            _digest(exported[name]) == _digest(source.read(name)) for name in exported
        )
        self._prove(f"the exported state dict is {folder.name}, byte for byte", same, f"{len(exported)} tensors")

    def _prove_refusal(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """A truncated folder is refused with one error, and the model goes on answering."""
        from ..integrations.transformers import logits, reload_folder

        before = logits(model, tokenizer, PROMPT)
        with _truncated(folder) as broken:
            try:
                reload_folder(model, broken)
                refused = ""
            except AliasError as error:
                refused = str(error).splitlines()[0]
        held = bool(refused) and torch.equal(before, logits(model, tokenizer, PROMPT))
        self._prove("a truncated checkpoint is refused, the model still answers", held, refused.rpartition(": ")[2])

    def _naive_ways(self, checkpoints: DemoCheckpoints) -> None:
        self._heading("The naive ways, same model, A then B: what the second load gives")
        a, b = CheckpointFolder(checkpoints.a), CheckpointFolder(checkpoints.b)
        for way, title in (("delete", "delete the sources"), ("skip", "skip by a flag"), ("twice", "process without state")):
            outcome = self._naive(way, checkpoints, a, b)
            self.console.print(f"  {title + ':':<23}{outcome if self.verbose else _shortened(outcome)}", soft_wrap=True)
            self._prove(f"naive way fails: {title}", expected_text("B") not in outcome)

    def _naive(self, way: str, checkpoints: DemoCheckpoints, a: CheckpointFolder, b: CheckpointFolder) -> str:
        from ..integrations.transformers import answer
        from .naive import make_naive, process_naive, reload_naive

        model, tokenizer = self._load(checkpoints.a)
        layers = make_naive(model, way, a)
        first = answer(model, tokenizer, PROMPT, max_new_tokens=16)
        self._prove(f"naive way serves its first load: {way}", first == expected_text("A"), repr(first))
        try:
            reload_naive(model, layers, b)
            if way == "twice":
                process_naive(layers)  # an engine processes all modules after any update, also those that got nothing
            return " ".join(repr(answer(model, tokenizer, PROMPT, max_new_tokens=16)).split())
        except AttributeError as error:
            return f"AttributeError: {error}"

    def _large_models(self) -> None:
        self._heading("Block scales a rank, in GiB: one copy against two")
        table = Table("model", "experts", "one copy", "two copies", "saved")
        for model in MODELS:
            report = scale_report(model)
            one, two, saved = (
                n * model.layers / _GIB for n in (report.allocated_bytes, report.two_copies_bytes, report.saved_bytes)
            )
            title = f"{model.name}, TP={model.tensor_parallel}"
            table.add_row(title, f"{model.layers} × {model.experts}", f"{one:.2f}", f"{two:.2f}", f"{saved:.2f}")
        self.console.print(table)

    # -- proofs --------------------------------------------------------------------------------------------------------

    def _prove(self, claim: str, held: bool, detail: str = "") -> None:
        self.proofs.append((claim, held, detail))

    def _verdict(self) -> bool:
        """Print what failed, or everything where asked, and how many proofs held."""
        held = [proof for proof in self.proofs if proof[1]]
        self._heading(f"{len(held)} of {len(self.proofs)} proofs held")
        for claim, holds, detail in self.proofs:
            if self.verbose or not holds:
                mark = Text("proved", "green") if holds else Text("FAILED", "red")
                self.console.print(Text.assemble("  ", mark, f"  {claim}", (f"  {detail}", "dim")), soft_wrap=True)
        if not self.verbose:
            self.console.print("--verbose lists them, and what one copy saves on the models people serve")
        return len(held) == len(self.proofs)

    def _heading(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def addresses(model: Any) -> dict[str, int]:
    """Address of every parameter and buffer, kernel names included."""
    return {name: tensor.data_ptr() for name, tensor in _named_tensors(model)}


def fingerprints(model: Any) -> dict[str, str]:
    """Digest of the bytes of every parameter (checkpoint values) and buffer (kernel bytes)."""
    return {name: _digest(tensor) for name, tensor in _named_tensors(model)}


def _named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


@contextmanager
def _truncated(folder: Path) -> Iterator[Path]:
    """A copy of ``folder`` whose weights file lacks its last bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        broken = Path(temporary) / folder.name
        shutil.copytree(folder, broken)
        weights = broken / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 4096)
        yield broken
