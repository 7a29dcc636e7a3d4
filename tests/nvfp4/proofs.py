"""Which tests prove what of which linear backend. The decorator both runs a test on a backend and records that it does, so the
table in docs/nvfp4/backends.md cannot say more than the suite runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

_Test = TypeVar("_Test", bound=Callable[..., Any])

#: Kind of proof to backend name to names of tests.
PROOFS: dict[str, dict[str, list[str]]] = {"bytes": {}, "emulator": {}, "call": {}, "runs": {}}


def proves(kind: str, names: str, cases: Sequence[Any]) -> Callable[[_Test], _Test]:
    """Parametrize a test by ``cases`` (the first of each is the backend), and record that it proves ``kind`` of them."""

    def decorate(test: _Test) -> _Test:
        for case in cases:
            backend = case[0] if isinstance(case, tuple) else case
            tests = PROOFS[kind].setdefault(backend.name, [])
            if test.__name__ not in tests:
                tests.append(test.__name__)
        return pytest.mark.parametrize(names, cases, ids=lambda v: getattr(v, "name", str(v)))(test)

    return decorate
