"""How a run ends. Real processes, of the part that needs no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOSTILE = "from aliasparam.errors import AliasError\nraise AliasError('a', name='[red]b[/red] \\x1b[2J\\u202e')"
START = "import os, sys, signal, time\nfrom aliasparam_nvfp4.cli.guard import guarded\n"


def run(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """``body`` is the statements of what runs guarded."""
    code = START + "def f():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "    return 0\nguarded(f)"
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False} | options
    return subprocess.run([sys.executable, "-c", code], **settings)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('/nothing/at/all')", "error: /nothing/at/all: No such file or directory\n"),
        ("raise OSError(28, 'No space left on device', 'out')", "error: out: No space left on device\n"),
        (
            "from aliasparam_nvfp4.cli.guard import about\nwith about('out'): raise OSError(28, 'No space left on device')",
            "error: out: No space left on device\n",
        ),
        ("raise ValueError('I/O error: No space left on device (os error 28)')", "error: I/O error: No space left on device"),
        ("raise MemoryError", "error: out of memory\n"),
        ("def g(): return g()\ng()", "error: the input is nested too deep\n"),
        ("import nothing_like_this", "error: an installed package cannot be imported: No module named 'nothing_like_this'\n"),
        ("raise type('PanicException', (BaseException,), {})('in Rust')", "error: PanicException: in Rust\n"),
        (HOSTILE, r"error: [red]b[/red] \x1b[2J\u202e: a"),
    ],
)  # fmt: skip
def test_whatever_goes_wrong_is_one_message_and_2(body: str, message: str) -> None:
    ended = run(body)

    assert ended.returncode == 2 and ended.stdout == ""
    assert message in ended.stderr and ended.stderr.startswith("error: ") and "\nerror:" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_traceback_is_there_for_the_asking() -> None:
    assert "Traceback" in run("raise ValueError('x')", env={**os.environ, "ALIASPARAM_TRACEBACK": "1"}).stderr


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError('wrapped') from e",
        "class D:\n    def __del__(self): raise KeyboardInterrupt\nD(); time.sleep(9)",
        "import threading\nthreading.Thread(target=time.sleep, args=(30,)).start()\nraise KeyboardInterrupt",
    ],
    ids=["while it waits", "wrapped by a library", "in a __del__", "while a thread runs"],
)
def test_an_interrupt_is_quiet_and_ends_the_process_as_shells_expect(body: str) -> None:
    ended = run(body, timeout=20)

    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == ended.stderr == ""


def test_a_reader_that_goes_ends_it_quietly() -> None:
    code = START + "def f():\n  while True: print('x' * 999)\nguarded(f)"
    ended = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1 > /dev/null; echo ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    assert ended.stdout == f"{128 + signal.SIGPIPE}\n" and ended.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_standard_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        ended = run("print('x')", capture_output=False, stdout=full, stderr=subprocess.PIPE)

    assert ended.returncode == 2 and ended.stderr == "error: No space left on device\n"


def test_what_a_library_logs_is_no_second_message() -> None:
    assert run("import logging\nlogging.getLogger('aliasparam.reload').warning('aborted')").stderr == ""


def test_closed_streams_are_silent() -> None:
    code = START + "guarded(lambda: print('x', file=sys.stderr) or print('x') or 0)"
    ended = subprocess.run(["bash", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code], timeout=60, check=False)

    assert ended.returncode == 0


def test_ascii_terminals_get_the_nearest_character() -> None:
    ended = run("print('A → B × 2 … 中 \\udcff')", env={**os.environ, "PYTHONIOENCODING": "ascii"})

    assert (ended.returncode, ended.stdout) == (0, "A -> B x 2 ... \\u4e2d \\udcff\n")


def test_the_first_word_needs_no_torch() -> None:
    code = "import sys, aliasparam_nvfp4.cli.app; print('torch' in sys.modules)"

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
