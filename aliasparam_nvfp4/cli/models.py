"""A model loaded for a command, and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from .options import need_backends
from .output import progress, say


def load(folder: Path, backend: str, moe_backend: str, missing: str = "refuse", *, to: Sequence[str] = ()) -> tuple[Any, Any]:
    """(model, tokenizer) of an NVFP4 folder; ``to``: linear backends that it may be moved to.

    Raises:
        MissingExtra: transformers is not installed.
        AliasError: as :func:`~aliasparam_nvfp4.integrations.transformers.load_model`.
    """
    need_backends(backend, moe_backend, missing)
    from ..checkpoint import QuantConfig
    from ..demo._quiet import need, quiet

    need("transformers", "accelerate", extra="transformers")
    QuantConfig.from_folder(folder)
    with progress() as bar:
        bar.add_task(f"loading {folder}", total=None)
        with quiet():
            from ..integrations.transformers import load_model

            return load_model(folder, backend, moe_backend=moe_backend, missing_input_scale=cast(Any, missing), retarget_to=to)


def ask(model: Any, tokenizer: Any, prompt: str, tokens: int, on_text: Callable[[str], None] | None = None) -> str:
    """The model's greedy answer.

    Raises:
        CheckpointError: the tokenizer or its chat template cannot take the prompt.
    """
    from ..integrations.transformers import answer

    token_ids(tokenizer, prompt)
    return answer(model, tokenizer, prompt, max_new_tokens=tokens, on_text=on_text)


def token_ids(tokenizer: Any, prompt: str) -> Any:
    """Token ids ``[1, T]`` of a one-question chat.

    Raises:
        CheckpointError: whatever a chat template raises: it is a program that came with the folder.
    """
    from aliasparam.errors import AliasError

    from ..checkpoint import CheckpointError
    from ..integrations.transformers.load import chat_ids

    try:
        return chat_ids(tokenizer, prompt)
    except AliasError:
        raise
    except Exception as error:
        raise CheckpointError(
            "the tokenizer or its chat template cannot take this prompt",
            name=str(tokenizer.name_or_path),
            expected="text",
            found=f"{type(error).__name__}: {error}",
        ) from error


def ask_aloud(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The same, printed as it comes."""
    text = ask(model, tokenizer, prompt, tokens, on_text=lambda piece: say(piece, end=""))
    say()
    return text
