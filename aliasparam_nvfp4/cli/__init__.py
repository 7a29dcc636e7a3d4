"""The command line, ``aliasparam-nvfp4``: one file a command, put together in app.py."""

from __future__ import annotations

from .guard import guarded


def main() -> None:
    """Entry point. Everything heavy is imported inside, so that an interrupt meets :func:`guarded` from the first moment."""

    def run() -> int:
        from .app import invoke

        return invoke()

    guarded(run)


__all__ = ["main"]
