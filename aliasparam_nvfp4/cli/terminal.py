"""Text on whatever terminal there is: its encoding, and what may not reach it."""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata

_ASCII = {"→": "->", "×": "x", "…": "...", "≥": ">=", "≤": "<=", "–": "-", "—": "-", "’": "'", "━": "-", "·": "."}
_HANDLER = "aliasparam"


def adapt_streams() -> None:
    """Nothing printed can fail for its characters, and closed streams are silent ones."""
    codecs.register_error(_HANDLER, _nearest)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (lives as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def plain(text: str) -> str:
    """``text`` from a user, a file or a model, with what a terminal would obey (escapes, changes of direction) shown instead."""
    return "".join(c if c in "\n\t" or not _obeyed(c) else _escaped(c) for c in text)


def _obeyed(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(_ASCII.get(c, _escaped(c)) for c in bad), error.end


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
