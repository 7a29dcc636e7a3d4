"""What writes NVFP4 folders: the demo's exporter against ModelOpt's own, and an output that is whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
from aliasparam.errors import AliasError  # noqa: E402
from aliasparam_nvfp4.checkpoint import QuantConfig  # noqa: E402
from aliasparam_nvfp4.cli import modelopt as command  # noqa: E402
from aliasparam_nvfp4.cli.app import app  # noqa: E402
from aliasparam_nvfp4.demo.export import nvfp4_tensors, quantize_to_nvfp4  # noqa: E402

from .. import moe_models  # noqa: E402
from ..test_cli import write_tokenizer  # noqa: E402


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {n for n in found if not torch.equal(raw(found[n]), raw(expected[n]))} == set()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2"])
def test_the_demos_exporter_gives_modelopts_tensors_bit_for_bit(kind: str, tmp_path: Path) -> None:
    theirs = moe_models.by_modelopt(tmp_path / "theirs", kind)
    with torch.no_grad():
        found = nvfp4_tensors(moe_models.small_moe(kind), [moe_models.IDS])

    assert_same(found, load_file(theirs / "model.safetensors"))


def test_its_folder_is_read_as_modelopts_is(tmp_path: Path) -> None:
    theirs = QuantConfig.from_folder(moe_models.by_modelopt(tmp_path / "theirs", "mixtral"))
    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    quantize_to_nvfp4(moe_models.small_moe("mixtral"), tokenizer, tmp_path / "ours")

    ours = QuantConfig.from_folder(tmp_path / "ours")
    modules = {name.rpartition(".")[0] for name in load_file(tmp_path / "ours" / "model.safetensors")} | {"lm_head"}
    modules -= {"model.embed_tokens"}  # no linear layer, whatever the config says of it
    assert [ours.scheme_of(m) for m in modules] == [theirs.scheme_of(m) for m in modules]


# -- an output that is whole or not there --------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder of which the command's other half is not asked."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def test_the_folder_appears_whole_with_the_rights_of_any_other(tmp_path: Path) -> None:
    with command.made_whole(tmp_path / "x" / "out") as unfinished:
        (unfinished / "file").touch()
        assert not (tmp_path / "x").exists()

    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "x" / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert [p.name for p in (tmp_path / "x" / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_leaves_nothing_and_removes_nothing_of_others(tmp_path: Path, error: type[BaseException]) -> None:
    for name in ("out.unfinished", ".out.theirs"):
        (tmp_path / name).mkdir()
    before = set(os.listdir(tmp_path))

    with pytest.raises(error), command.made_whole(tmp_path / "out") as unfinished:
        (unfinished / "file").touch()
        raise error

    assert set(os.listdir(tmp_path)) == before


def test_what_came_in_the_way_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), command.made_whole(tmp_path / "out"):
        (tmp_path / "out").mkdir()

    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["a folder", "a file", "a broken link"])
def test_an_output_that_exists_is_refused_first(source: Path, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    {"a folder": out.mkdir, "a file": out.touch, "a broken link": lambda: out.symlink_to("nowhere")}[there]()

    with pytest.raises(AliasError, match="the output exists"):
        CliRunner().invoke(app, ["quantize", str(source), str(out)], catch_exceptions=False)
