"""The public surface, what importing it costs, and the typing marker."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import aliasparam
import aliasparam_nvfp4

FIXED = [
    "AliasedParameter", "AliasRegistry", "declare", "process", "checkpoint_state_dict", "reload", "memory_report", "explain",
    "alias_or_bind_derived_param", "copy_or_rebind_param",
]  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_names_are_there_and_documented(name: str) -> None:
    assert getattr(aliasparam, name).__doc__


def test_importing_the_core_imports_no_engine() -> None:
    assert loaded_by("aliasparam").isdisjoint({"transformers", "flashinfer", "hypothesis", "aliasparam_nvfp4", "rich"})


def test_importing_nvfp4_imports_no_engine() -> None:
    assert loaded_by("aliasparam_nvfp4").isdisjoint({"transformers", "flashinfer", "modelopt", "hypothesis"})


def loaded_by(package: str) -> set[str]:
    code = f"import sys, {package}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_testing_kit_says_which_extra_it_needs() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import aliasparam.testing"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert ended.stderr.endswith("aliasparam.testing needs hypothesis: pip install 'aliasparam[testing]'\n")


def test_typed_and_of_one_version() -> None:
    for package in (aliasparam, aliasparam_nvfp4):
        assert package.__file__ is not None
        assert (Path(package.__file__).parent / "py.typed").is_file()
    assert importlib.metadata.version("aliasparam") == aliasparam.__version__
    importlib.import_module("aliasparam.testing")
