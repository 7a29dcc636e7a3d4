"""``retarget``: a loaded model to other kernels, in place."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .models import ask, load
from .options import AsJson, Backend, Folder, Missing, Runner, Tokens, need_backends
from .output import say, say_json, table

To = Annotated[str | None, typer.Option("--to", help="Linear backend to move to.")]
MoETo = Annotated[str | None, typer.Option("--moe-to", help="MoE runner to move experts to.")]


def retarget(
    folder: Folder,
    to: To = None,
    moe_to: MoETo = None,
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    missing_input_scale: Missing = "refuse",
    prompt: Annotated[
        str, typer.Option(help="Asked before and after, where the kernels run here.")
    ] = "What is the capital of France?",
    tokens: Tokens = 32,
    json: AsJson = False,
) -> None:
    """Load for one backend, move to another in place, say what moved. Exit code 1 if a value or an address changed."""
    from aliasparam.errors import AliasError

    if to is None and moe_to is None:
        raise AliasError("there is nothing to move to", expected="--to BACKEND, --moe-to RUNNER, or both")
    need_backends(to or "auto", moe_to or "auto")
    found = moved(folder, to, moe_to, (backend, moe_backend, missing_input_scale), (prompt, tokens))
    if json:
        say_json(found)
    else:
        _show(found)
    if not (found["values_kept"] and found["addresses_kept"]):
        raise typer.Exit(1)


def moved(
    folder: Any, to: str | None, moe_to: str | None, loaded_with: tuple[str, str, str], question: tuple[str, int]
) -> dict[str, Any]:
    """What the move came to.

    Raises:
        AliasError: a folder that does not load, or layers that cannot be moved; nothing was moved then.
    """
    from ..linear import retarget as retarget_linears
    from ..moe import retarget_experts
    from .digest import model_digest

    model, tokenizer = load(folder, *loaded_with, to=[name for name in (to,) if name and name != "auto"])
    before, held, addresses = _served(model), model_digest(model)["digest"], _addresses(model)
    answers = [_answer(model, tokenizer, *question)]
    started = time.perf_counter()
    count = {
        "linear": retarget_linears(model, to) if to else 0,
        "experts": retarget_experts(model, moe_to) if moe_to else 0,
    }
    seconds = time.perf_counter() - started
    answers.append(_answer(model, tokenizer, *question))
    return {
        "folder": str(folder),
        "moved": count,
        "before": before,
        "after": _served(model),
        "seconds": seconds,
        "values_kept": model_digest(model)["digest"] == held,
        "addresses_kept": _addresses(model) == addresses,
        "answers": answers,
    }


def _served(model: Any) -> dict[str, int]:
    """Backends and runners to how many layers they serve."""
    found: dict[str, int] = {}
    for module in model.modules():
        for key in ("nvfp4_backend", "nvfp4_runner"):
            if (served := module.__dict__.get(key)) is not None:
                found[served.name] = found.get(served.name, 0) + 1
    return found


def _addresses(model: Any) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.named_buffers() if tensor.numel()}


def _answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str | None:
    """None where a kernel does not run here."""
    for module in model.modules():
        for key in ("nvfp4_backend", "nvfp4_runner"):
            served = module.__dict__.get(key)
            if served is not None and served.unavailable(model.device) is not None:
                return None
    return ask(model, tokenizer, prompt, tokens)


def _show(found: dict[str, Any]) -> None:
    layers = sum(found["moved"].values())
    say(f"{found['folder']}: {layers} layers moved in {found['seconds']:.2f} s")
    names = sorted({*found["before"], *found["after"]})
    rows = ((name, str(found["before"].get(name, 0)), str(found["after"].get(name, 0))) for name in names)
    table(("layers on", "before", "after"), rows)
    say(f"every value as it was: {'yes' if found['values_kept'] else 'NO'}")
    say(f"every address as it was: {'yes' if found['addresses_kept'] else 'NO'}")
    for when, answer in zip(("before", "after"), found["answers"], strict=True):
        say(f"answer {when}: {answer if answer is not None else 'not asked, these kernels do not run here'}")
