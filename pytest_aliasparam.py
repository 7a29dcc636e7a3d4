"""pytest plugin: the fixture ``check_method``, and a summary of which laws each checked method keeps.

Outside the package, so that pytest runs in this environment which do not use it never import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_reports: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("aliasparam")
    group.addoption("--aliasparam-examples", type=int, default=50, help="sequences that check_method tries for each method")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_reports] = []


@pytest.fixture
def check_method(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """:func:`aliasparam.testing.check_method`, with the number of sequences from the command line, and a line in the summary."""
    from aliasparam.testing import LawBroken
    from aliasparam.testing import check_method as check

    def checked(make: Callable[[], Any], **options: Any) -> Any:
        options.setdefault("examples", request.config.getoption("--aliasparam-examples"))
        options.setdefault("name", request.node.name)
        try:
            report = check(make, **options)
        except LawBroken as broken:
            request.config.stash[_reports].append(str(broken))
            raise
        request.config.stash[_reports].append(str(report))
        return report

    return checked


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[_reports]
    if lines:
        terminalreporter.section("aliasparam: laws of quantization methods")
        for line in lines:
            terminalreporter.write_line(line)
