"""How a run ends: whatever goes wrong is one message on standard error and an exit code.

0 all went well; 1 the command says so (a proof failed, a folder was refused); 2 an error; by SIGINT after Ctrl-C and by SIGPIPE
where the reader of a pipe has gone, as shells expect of a command.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .terminal import adapt_streams, plain

#: Set it to see where an error comes from.
TRACEBACK = "ALIASPARAM_TRACEBACK"


def guarded(run: Callable[[], int]) -> NoReturn:
    """Exit the process with what ``run`` returns, or as its exception says."""
    adapt_streams()
    logging.lastResort = logging.NullHandler()  # what is wrong is said once, by the message that ends the run
    sys.unraisablehook = _interrupts_come_back(sys.unraisablehook)
    try:
        code = run()
        sys.stdout.flush()
    except BaseException as error:
        _end(error)
    _leave(code)


def _end(error: BaseException) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
    if isinstance(error, SystemExit):
        _leave(error.code if isinstance(error.code, int) else 0 if error.code is None else 2)
    if _interrupted(error):
        _die_of(signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        _die_of(signal.SIGPIPE)
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # there may be nowhere left to say it
        sys.stderr.write(f"error: {plain(message_of(error))}\n")
        sys.stderr.flush()
    _leave(2)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: libraries wrap what is raised in the middle of their imports and callbacks."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # click's
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def message_of(error: BaseException) -> str:
    """One message: what happened, and to what."""
    if hasattr(error, "format_message"):  # click's usage errors
        return _usage(error)
    if _is_alias_error(error):
        return str(error)
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return named + (error.strerror or str(error) or type(error).__name__)
    if isinstance(error, RecursionError):
        return "the input is nested too deep"
    kind = type(error).__name__
    if "(os error " in str(error):  # how libraries in Rust pass one on
        return _first_line(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return "out of memory" + (f": {_first_line(error)}" if str(error) else "")
    if isinstance(error, ImportError):
        return f"an installed package cannot be imported: {_first_line(error)}"
    return f"{kind}: {_first_line(error)}\n  This is not expected. {TRACEBACK}=1 shows where it comes from."


@contextlib.contextmanager
def about(what: object) -> Iterator[None]:
    """An OSError that names no file (a full disk, a port that is taken) is about ``what``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = str(what)
        raise


def _is_alias_error(error: BaseException) -> bool:
    """Without importing the package: an error of it has imported it already."""
    errors = sys.modules.get("aliasparam.errors")
    return errors is not None and isinstance(error, errors.AliasError)


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    help_ = f"\n  {context.command_path} --help says what there is." if context is not None else ""
    return f"{error.format_message()}{help_}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _interrupts_come_back(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Python drops what is raised in a ``__del__`` or a weak reference's callback; an interrupt must not be lost there."""

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            later = threading.Timer(0.02, _thread.interrupt_main)  # at once it would be raised in here, and dropped again
            later.daemon = True
            later.start()
        else:
            before(unraisable)

    return hook


def _die_of(number: signal.Signals) -> NoReturn:
    """End as the signal ends a process that does not know it: shells then stop their loops, and nothing more is printed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    _leave(128 + number)  # where the signal is blocked


def _leave(code: int) -> NoReturn:
    """Exit without a word: output that cannot be written was told of, or its reader has gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(code)
