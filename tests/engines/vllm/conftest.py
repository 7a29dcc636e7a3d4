"""The demo's checkpoints, and tiny ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tiny import tiny_compressed, tiny_dense, tiny_moe


@pytest.fixture(scope="session")
def real() -> tuple[Path, Path]:
    """SmolLM2 A and B, as ``make demo`` left them."""
    from aliasparam_nvfp4.demo.checkpoints import default_cache

    folders = default_cache() / "smollm2-135m-nvfp4-a", default_cache() / "smollm2-135m-nvfp4-b"
    if not all(folder.with_suffix(".stamp").is_file() for folder in folders):
        pytest.skip("the demo's checkpoints are not there: make demo")
    return folders


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return tiny_moe(folder / "a", 0), tiny_moe(folder / "b", 1)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With biases of q, k and v, and global scales of its own for each of them."""
    folder = tmp_path_factory.mktemp("dense")
    return tiny_dense(folder / "a", 0), tiny_dense(folder / "b", 1)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """compressed-tensors' names, dense and experts."""
    folder = tmp_path_factory.mktemp("compressed")
    return tiny_compressed(folder / "a", 0), tiny_compressed(folder / "b", 1)
