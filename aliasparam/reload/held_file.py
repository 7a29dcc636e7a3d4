"""One file, opened once: read at offsets into given memory, and known to be the same file with the same bytes at the end."""

from __future__ import annotations

import ctypes
import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import samestat
from pathlib import Path
from typing import Self, TypeVar

from torch import Tensor

from .errors import SourceError

#: Two writes within one tick of a file system's clock leave the same mtime, so a file younger than this is looked at again.
_TICK = 0.02
_LOOKS = 50
_PIECE = 1 << 30  # one call reads less than 2 GiB on Linux


class HeldFile:
    """A regular file of ``folder``, held open until :meth:`close`.

    Reading never maps the file: a truncation meanwhile is an error, not a SIGBUS. Links are followed within the folder and,
    for a snapshot of a hub cache (``snapshots/<revision>/x -> ../../blobs/<hash>``), into the blobs beside it.

    Raises:
        SourceError: missing, no regular file, or a link that leaves the folder.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        try:
            real = os.path.realpath(path, strict=True)
            _check_place(path, Path(real), folder)
            self._file = _File(real, opener=_as_it_is)
        except FileNotFoundError:
            raise SourceError("the file is missing", name=str(path), remedy="Copy or export the checkpoint again.") from None
        except IsADirectoryError:
            raise _no_file(path) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SourceError(f"the file cannot be opened: {reason}", name=str(path)[:200]) from None
        self._seen = os.fstat(self._file.fileno())
        if not stat.S_ISREG(self._seen.st_mode):
            self.close()
            raise _no_file(path)
        for _ in range(_LOOKS):
            if not 0 <= time.time() - self._seen.st_mtime < _TICK:
                return
            time.sleep(_TICK)
            self._seen = os.fstat(self._file.fileno())
        self.close()
        raise SourceError("the file is being written to", name=str(path), remedy=_AGAIN)

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._seen.st_size

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on. The caller has bounded ``count``."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_all(self, limit: int) -> bytes:
        """
        Raises:
            SourceError: it has more bytes than ``limit``.
        """
        if self.size > limit:
            expected, found = f"at most {limit} bytes", f"{self.size} bytes"
            raise SourceError("the file is too long", name=str(self.path), expected=expected, found=found)
        return self.read(0, self.size)

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill ``memory`` with the bytes from ``offset`` on.

        Raises:
            SourceError: the file ends before (it was truncated), cannot be read, or is closed.
        """
        fd = self._fd()
        while memory:
            try:
                count = os.preadv(fd, [memory[:_PIECE]], offset)
            except OSError as error:
                raise SourceError(f"the file cannot be read: {error.strerror}", name=str(self.path)) from None
            if count == 0:
                raise SourceError(
                    "the file was truncated while it was read",
                    name=str(self.path),
                    expected=f"{self.size} bytes, as when it was opened",
                    found=f"it ends at or before byte {offset}",
                    remedy="Load again when it is complete.",
                )
            memory, offset = memory[count:], offset + count

    def _fd(self) -> int:
        if self._file.closed:
            raise SourceError("the file was closed", name=str(self.path))
        return self._file.fileno()

    def check_unchanged(self) -> None:
        """
        Raises:
            SourceError: another file is at this path now, or this one was written to.
        """
        self._fd()
        try:
            now = os.stat(self.path)
        except OSError:
            became, found = "was removed", None
        else:
            if (now.st_size, now.st_mtime_ns) == (self._seen.st_size, self._seen.st_mtime_ns) and samestat(now, self._seen):
                return
            found = f"{self.size} bytes before, {now.st_size} now" if now.st_size != self.size else "it was written to"
            became = "changed" if samestat(now, self._seen) else "was replaced"
        raise SourceError(f"the file {became} while it was read", name=str(self.path), found=found, remedy=_AGAIN)

    def close(self) -> None:
        self._file.close()


class _File(io.FileIO):
    """Has its descriptor from the first: between an ``os.open`` and who keeps its number an interrupt would leave it open."""

    def __del__(self) -> None:
        self.close()


def _no_file(path: Path) -> SourceError:
    return SourceError("this is not a file", name=str(path), expected="a regular file")


def _as_it_is(path: str, flags: int) -> int:
    """A link that was put in the file's place since is not followed, and a pipe does not wait for who writes to it."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


class Opened:
    """What is opened together, and is checked and closed together; a context manager."""

    def __init__(self) -> None:
        self._held: list[HeldFile | Opened] = []

    def hold(self, one: _Held) -> _Held:
        """``one``, which is this one's from now on."""
        self._held.append(one)
        return one

    @contextmanager
    def opening(self) -> Iterator[None]:
        """What raises inside closes it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """To be called after the last read and before anything that was read is served.

        Raises:
            SourceError: a file was replaced, removed, truncated or written to since it was opened.
        """
        for one in self._held:
            one.check_unchanged()

    def close(self) -> None:
        for one in self._held:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_Held = TypeVar("_Held", bound=HeldFile | Opened)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a uint8 [n], contiguous, in host memory, without numpy; it keeps the tensor alive."""
    if tensor.device.type != "cpu" or tensor.dim() != 1 or tensor.element_size() != 1 or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise SourceError("these are no plain bytes", expected="uint8 [n], contiguous, in host memory", found=found)
    memory = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


_AGAIN = "Load again from a folder that nobody writes to; publish each version in a folder of its own."


def _check_place(path: Path, real: Path, folder: Path) -> None:
    home = Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if snapshots is not None and real.parent == snapshots.parent / "blobs":
        return
    raise SourceError(
        "a link leaves the checkpoint folder",
        name=str(path),
        expected=f"a file in {home}" + (f" or {snapshots.parent / 'blobs'}" if snapshots is not None else ""),
        found=str(real),
        remedy="Copy the file into the folder, or give the folder in which it is.",
    )
