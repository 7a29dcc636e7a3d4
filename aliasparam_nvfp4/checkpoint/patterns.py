"""Patterns of module names: 100 000 modules against 10 000 patterns take about a second.

Two dialects:

| a pattern | ModelOpt | compressed-tensors |
|---|---|---|
| plain name | the module, a path above it, or any single part of its path | the module alone |
| glob (``*``, ``?``, ``[..]``) | the same three | none: it is a plain name |
| ``re:`` and a regular expression | the beginning of the path | the beginning of the path |

ModelOpt's is SGLang 0.5.23 ``modelopt_quant.py``; compressed-tensors' is ``compressed_tensors/utils/match.py``, ``match_name``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache

from ._pattern_keys import Key, glob_key, regex_key

_WILD = re.compile(r"[*?[]")


class Patterns:
    """An ordered set of patterns.

    A name is looked up, not tried against every pattern: plain names by the name and its parts, and of the others those alone
    whose key (see _pattern_keys.py) is among the runs of the name's parts, or whose text is within a part. That is asked once for
    each part, because parts recur.

    Args:
        patterns: in the order of their precedence.
        exact: compressed-tensors' dialect; ModelOpt's without.
    """

    def __init__(self, patterns: Iterable[str], *, exact: bool = False) -> None:
        self._exact = exact
        self._plain: dict[str, int] = {}
        self._keyed: dict[str, list[int]] = {}
        self._loose: list[tuple[int, str]] = []
        self._unkeyed: list[int] = []
        self._pairs: dict[tuple[str, str], list[int]] = {}
        self._inside: dict[str, list[int]] = {}
        self._others: dict[int, tuple[str, str]] = {}
        for number, pattern in enumerate(patterns):
            if pattern.startswith("re:"):
                self._add(number, pattern, *_keys(pattern[3:]))
            elif exact or not _WILD.search(pattern):
                self._plain.setdefault(pattern, number)
            else:
                self._add(number, pattern, glob_key(pattern))
        self._depths = {pattern.count(".") + 1 for pattern in self._plain}
        self._widths = sorted({key.count(".") + 1 for key in self._keyed})

    def _add(self, number: int, pattern: str, *keys: Key) -> None:
        """A match has one of the ``keys``."""
        self._others[number] = pattern, keys[0].other if len(keys) == 1 else ""
        for key in keys:
            if key.parts:
                self._keyed.setdefault(key.parts, []).append(number)
            elif key.other:
                self._loose.append((number, key.other))
            else:
                self._unkeyed.append(number)
            for pair in key.pairs:
                self._pairs.setdefault(pair, []).append(number)

    def __contains__(self, name: str) -> bool:
        """Whether any pattern matches the module ``name``."""
        return next(self._plain_matches(name), None) is not None or next(self._other_matches(name), None) is not None

    def all(self, name: str) -> list[int]:
        """The numbers of the patterns that match, plain names before the others, each in their order."""
        return [*sorted(set(self._plain_matches(name))), *sorted(set(self._other_matches(name)))]

    def _plain_matches(self, name: str) -> Iterator[int]:
        if name in self._plain:
            yield self._plain[name]
        if self._exact or not self._plain:
            return
        parts = name.split(".")
        paths = (".".join(parts[:depth]) for depth in self._depths if depth < len(parts))
        for tried in (*(parts if 1 in self._depths else ()), *paths):
            if tried in self._plain:
                yield self._plain[tried]

    def _other_matches(self, name: str) -> Iterator[int]:
        for number in self._candidates(name) if self._others else ():
            pattern, other = self._others[number]
            if other in name and _matches(pattern, name):
                yield number

    def _candidates(self, name: str) -> Iterator[int]:
        parts, keyed = name.split("."), self._keyed
        for width in self._widths:
            for first in range(len(parts) - width + 1):
                key = parts[first] if width == 1 else ".".join(parts[first : first + width])
                if key in keyed:
                    yield from keyed[key]
        yield from self._unkeyed
        if self._pairs or self._loose:
            for part in parts:
                yield from self._inside[part] if part in self._inside else self._look_inside(part)

    def _look_inside(self, part: str) -> list[int]:
        """Patterns of which an unescaped dot may stand for a character within ``part``, and those known by a text within it."""
        found = [n for n, text in self._loose if text in part]
        found += [n for (a, b), numbers in self._pairs.items() if len(part) > len(a) + len(b) and b in part for n in numbers
                 if re.search(f"{re.escape(a)}.{re.escape(b)}", part)]  # fmt: skip
        self._inside[part] = found
        return found


_compiled = lru_cache(maxsize=20_000)(re.compile)
#: Texts, ``.*`` and choices of texts: what exporters write by the thousand, and compiling takes a third of a millisecond each.
_SIMPLE = re.compile(r"\^?((?:[\w\-]|\\\.|\.\*|\((?:\?:)?[\w\-|]*\))*)(\$?)")
_CHOICE = re.compile(r"\((?:\?:)?([\w\-|]*)\)")


@lru_cache(maxsize=20_000)
def _texts(regex: str) -> tuple[list[list[str]], bool] | None:
    """(for each choice the texts between ``.*``, whether the name must end there); None for another expression."""
    found = _SIMPLE.fullmatch(regex)
    if found is None or found[1].count("|") > 8:
        return None
    choices = [""]
    for number, part in enumerate(_CHOICE.split(found[1])):
        choices = [text + one for text in choices for one in (part.split("|") if number % 2 else [part])]
    return [[piece.replace("\\.", ".") for piece in text.split(".*")] for text in choices], bool(found[2])


def _keys(regex: str) -> list[Key]:
    if (simple := _texts(regex)) is None:
        return [regex_key(regex)]
    return [glob_key("*".join(pieces) + ("" if simple[1] else "*")) for pieces in simple[0]]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        if (simple := _texts(pattern[3:])) is None:
            return _compiled(pattern[3:]).match(name) is not None
        return any(_begins(pieces, name, whole=simple[1]) for pieces in simple[0])
    parts = name.split(".")
    if "?" in pattern or "[" in pattern:
        paths = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return any(fnmatchcase(tried, pattern) for tried in (*paths, *parts))
    pieces = pattern.split("*")
    return _stars(pieces, name) or ("." not in pattern and any(_stars(pieces, part) for part in parts))


def _begins(pieces: list[str], name: str, *, whole: bool) -> bool:
    """Whether ``name``, or with ``whole`` all of it, begins with these pieces with anything between them."""
    first, *others = pieces
    if not name.startswith(first):
        return False
    at, last = len(first), others.pop() if others else None
    for piece in others:
        if (at := name.find(piece, at)) < 0:
            return False
        at += len(piece)
    if last is None:
        return not whole or at == len(name)
    return name.endswith(last) and len(name) - len(last) >= at if whole else name.find(last, at) >= 0


def _stars(pieces: list[str], name: str) -> bool:
    """Whether ``name``, or a path above it, is these pieces with anything between them."""
    if not name.startswith(pieces[0]):
        return False
    at, last = len(pieces[0]), pieces[-1]
    for piece in pieces[1:-1]:
        if (at := name.find(piece, at)) < 0:
            return False
        at += len(piece)
    while last and (at := name.find(last, at)) >= 0:
        if name[at + len(last) :][:1] in ("", "."):
            return True
        at += 1
    return not last
