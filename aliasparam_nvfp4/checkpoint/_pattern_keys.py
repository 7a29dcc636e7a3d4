"""What every match of a pattern must contain, so that patterns can be looked up.

[Note: keys are whole parts] The key is the longest run of whole dotted parts that the pattern spells out between two dots, or
between a dot and the beginning or end of the name: ``*layers.7.mlp*`` has ``7``, ``re:.*layers\\.7\\.mlp\\..*`` has ``7.mlp``. A
name which the pattern matches has this run among its own parts.

[Note: unescaped dots] In a regular expression people write ``.`` for ``\\.``, and mean it. It may stand for another character
all the same; then the text to its left, that character and the text to its right are within one part of the name. These are the
pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: A literal, an escaped dot, an unescaped dot, or what ends a literal run (groups are cut before).
_TOKEN = re.compile(
    r"(?P<literal>[\w\-/]|\\[\-_/])(?![*+?{])|(?P<dot>\\\.)(?![*+?{])|(?P<any>\.)(?![*+?{])|(?P<end>\$$)|.", re.DOTALL
)
_GROUP = re.compile(r"\\[^.\-_/]|\[\^?\]?[^]]*\]|\([^()]*\)|\{[^}]*\}")


@dataclass(frozen=True)
class Key:
    """Attributes:
    parts: the run, or "" where a pattern has none.
    other: any text that a match contains.
    pairs: texts around every unescaped dot of the run.
    """

    parts: str = ""
    other: str = ""
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass
class _Run:
    """Literal text: pieces between dots, and which of the dots are unescaped."""

    begins: bool
    pieces: list[str]
    unescaped: list[bool]
    ends: bool = False

    def key(self) -> Key:
        first, last = 0 if self.begins else 1, len(self.pieces) - (0 if self.ends else 1)
        around = zip(self.pieces, self.pieces[1:], self.unescaped, strict=False)
        beside = [*self.pieces[:first], *self.pieces[last:]]  # says more than a part of the key, which a match contains anyway
        other = max([*beside, ""], key=len) or max(self.pieces, key=len)
        return Key(".".join(self.pieces[first:last]), other, tuple((a, b) for a, b, odd in around if odd))


def glob_key(pattern: str) -> Key:
    """The key of a glob."""
    texts = re.split(r"\*|\?|\[[^]]*\]|\[", pattern)
    runs = []
    for number, text in enumerate(texts):
        pieces = text.split(".")
        runs.append(_Run(number == 0, pieces, [False] * (len(pieces) - 1), number == len(texts) - 1))
    return _best(runs)


def regex_key(pattern: str) -> Key:
    """The key of a regular expression that is matched from the beginning."""
    if "(?" in pattern:
        return Key()  # flags and look-arounds
    previous, flat = "", pattern
    while previous != flat:
        previous, flat = flat, _GROUP.sub("#", flat)
    return Key() if "|" in flat or "(" in flat or "[" in flat else _best(list(_runs(flat)))


def _runs(pattern: str) -> Iterator[_Run]:
    run = _Run(True, [""], [])
    for token in _TOKEN.finditer(pattern):
        if token["literal"]:
            run.pieces[-1] += token["literal"][-1]
        elif token["dot"] or token["any"]:
            run.pieces.append("")
            run.unescaped.append(bool(token["any"]))
        elif token["end"]:
            run.ends = True
        elif token[0] != "^" or token.start():
            yield run
            run = _Run(False, [""], [])
    yield run


def _best(runs: list[_Run]) -> Key:
    keys = [run.key() for run in runs]
    best = max(keys, key=lambda key: (key.parts.count(".") + bool(key.parts), len(key.parts)))
    others = [key.other for key in keys if key is not best]
    return Key(best.parts, max([*others, ""], key=len) or best.other, best.pairs if best.parts else ())
