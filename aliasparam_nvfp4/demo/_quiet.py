"""Third-party noise off, errors on; and a clear word where an optional package is missing."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

from aliasparam.errors import MissingExtra


def need(*packages: str, extra: str = "demo") -> None:
    """Raise MissingExtra unless all ``packages`` can be imported."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise MissingExtra(
            f"this command needs {', '.join(missing)}", remedy=f"Install the extra: pip install 'aliasparam[{extra}]'"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines and progress bars of the libraries called inside."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            if importlib.util.find_spec("transformers") is not None:
                from transformers.utils import logging as hf_logging

                hf_logging.disable_progress_bar()
            yield
    finally:
        logging.disable(previous)
