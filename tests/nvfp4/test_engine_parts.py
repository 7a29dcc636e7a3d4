"""What the plugins of both engines share, without an engine."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from aliasparam.errors import ReloadError
from aliasparam_nvfp4.checkpoint import CheckpointError
from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.integrations import agreement, options
from aliasparam_nvfp4.integrations.agreement import Agreement, World, agree_on
from aliasparam_nvfp4.integrations.folder import check_folder
from aliasparam_nvfp4.integrations.hooking import around, becomes, missing
from aliasparam_nvfp4.integrations.plugins import SGLANG, VLLM, Engine

from .test_linear import tensors

ALONE = World()


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Agreement]]:
    """One reload's votes of each rank, as processes of their own would make them."""
    monkeypatch.setattr(agreement, "_numbers", itertools.repeat(0))
    store = dist.HashStore()
    return lambda ranks: [Agreement(World(rank, ranks, "0-1", store)) for rank in range(ranks)]


def test_ranks_go_on_when_all_said_yes(votes: Callable[[int], list[Agreement]]) -> None:
    both = votes(2)
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            list(pool.map(Agreement.agree, both))


def test_a_rank_that_refused_waits_for_nobody_and_nobody_goes_on(votes: Callable[[int], list[Agreement]]) -> None:
    fine, broken = votes(2)
    assert not fine.refused_elsewhere()
    broken.refuse("the disk went away")
    assert fine.refused_elsewhere()
    with pytest.raises(ReloadError, match="the disk went away"):
        fine.agree()


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_a_step_counts_where_no_rank_raised(broken: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_numbers", itertools.repeat(0))
    store = dist.HashStore()

    def taken(rank: int) -> int:
        if rank == broken:
            raise OSError("the disk went away")
        return rank

    def of(rank: int) -> int | str:
        try:
            return agree_on(World(rank, 2, "0-1", store), lambda: taken(rank))
        except (OSError, ReloadError) as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(of, range(2)))
    assert found == [0, 1] if broken is None else all("the disk went away" in str(said) for said in found)


def test_a_rank_that_says_nothing_is_a_no(votes: Callable[[int], list[Agreement]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "PATIENCE", timedelta(milliseconds=50))
    with pytest.raises(ReloadError, match="did not answer"):
        votes(2)[0].agree()


class Stock:
    def __init__(self, number: int) -> None:
        self.said = f"stock {number}"


class Special(Stock):
    """Has no ``__init__`` of its own."""


class Ours:
    def __init__(self, number: int) -> None:
        self.said = f"ours {number}"


def test_objects_of_a_hooked_class_and_of_no_subclass_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{__name__}.Stock.__init__"
    monkeypatch.setattr(Stock, "__init__", Stock.__init__)  # put back at the end
    assert missing([target]) == [target]
    for _ in range(2):  # the second time nothing
        around(target, becomes(Ours))
    stock, special = Stock(1), Special(number=2)
    assert type(stock) is Ours and (stock.said, special.said) == ("ours 1", "stock 2") and missing([target]) == []  # type: ignore[comparison-overlap]
    monkeypatch.setattr(Stock, "__init__", functools.wraps(Stock.__init__)(lambda self, number: None))
    assert missing([target, f"{__name__}.no_such_function"]) == [target, f"{__name__}.no_such_function"]


@pytest.mark.parametrize(
    ("engine", "version", "known"),
    [(VLLM, "0.32.0", True), (VLLM, "0.33.1+cpu", True), (VLLM, "0.34.0", False), (VLLM, "0.4.0", False), (VLLM, "dev", False),
     (SGLANG, "0.5.23", True), (SGLANG, "0.5.23.post1", True), (SGLANG, "0.5.3", False), (SGLANG, "0.5.24", False)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(engine: Engine, version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "installed", lambda self: version)
    doubt = engine.doubt()
    assert (doubt is None) is known
    assert known or (doubt is not None and version in doubt and "its own NVFP4 serves" in doubt)


def test_an_engine_without_the_entry_point_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed" in replace(VLLM, distributions=("no-such-engine",)).verdict()
    monkeypatch.setattr(Engine, "installed", lambda self: "0.32.0")
    assert "the plugin is not registered" in replace(VLLM, group="no.such.group").verdict()


def test_doctor_says_of_every_engine_whether_the_plugin_will_be_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "installed", lambda self: "0.40.1")
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["engines"]
    assert found == {name: f"{engine.doubt()}" for name, engine in (("sglang", SGLANG), ("vllm", VLLM))}
    monkeypatch.setattr(Engine, "installed", lambda self: None)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["engines"]
    assert found == {"sglang": "not installed", "vllm": "not installed"}


def test_a_policy_that_is_none_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.said("policy", "journal") == "journal"
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "staged")
    assert options.said("policy", "journal") == "staged"
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "stagd")
    with pytest.raises(options.OptionError, match="ALIASPARAM_NVFP4_POLICY"):
        options.said("policy", "journal")


def test_what_an_engine_was_given_counts_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"backend": "auto", "policy": "journal", "scope": "all"}
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "staged")
    monkeypatch.setenv("ALIASPARAM_NVFP4_SCOPE", "layers")
    found = options.chosen(defaults, {"policy": "write-through"}, "config")
    assert found == {"backend": "auto", "policy": "write-through", "scope": "layers"}
    for given, expected in (({"polcy": "staged"}, "'polcy'"), ({"policy": "stagd"}, "'stagd'")):
        with pytest.raises(options.OptionError, match=expected):
            options.chosen(defaults, given, "config")


def folder(
    path: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None, algorithm: str = "NVFP4", **config: int
) -> str:
    found = {f"layer.{name}": tensor.contiguous() for name, tensor in tensors((128,), 64, seed=0).items()}
    change(found)
    path.mkdir()
    save_file(found, path / "model.safetensors")
    quantization = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16}
    (path / "config.json").write_text(json.dumps({"hidden_size": 64, "quantization_config": quantization} | config))
    return str(path)


def without_input_scale(found: dict[str, Tensor]) -> None:
    del found["layer.input_scale"]


def test_a_folder_is_held_against_the_one_that_serves(tmp_path: Path) -> None:
    serves = folder(tmp_path / "a")
    check_folder(folder(tmp_path / "same"), serves, ALONE)
    check_folder("a/name/on/a/hub", serves, ALONE)
    with pytest.raises(CheckpointError, match=r"missing: layer\.input_scale"):
        check_folder(folder(tmp_path / "missing", without_input_scale), serves, ALONE)
    with pytest.raises(CheckpointError, match="another model"):
        check_folder(folder(tmp_path / "larger", hidden_size=128), serves, ALONE)
    with pytest.raises(CheckpointError, match="no such folder"):
        check_folder(str(tmp_path / "none"), serves, ALONE)
    infinite = folder(tmp_path / "infinite", lambda found: found.update({"layer.weight_scale_2": torch.tensor([torch.inf])}))
    with pytest.raises(ScaleError, match="is not a scale"):
        check_folder(infinite, serves, ALONE)
    with pytest.raises(ScaleError, match="NaN"):
        check_folder(folder(tmp_path / "nan", with_nan), serves, ALONE)


def with_nan(found: dict[str, Tensor]) -> None:
    scales = found["layer.weight_scale"]
    found["layer.weight_scale"] = torch.full_like(scales.view(torch.uint8), 0x7F).view(scales.dtype)


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "[]", "\xff"], ids=["cut", "deep", "a list", "no UTF-8"])
def test_a_config_that_cannot_be_read_is_refused_in_the_new_folder_alone(text: str, tmp_path: Path) -> None:
    good, broken = folder(tmp_path / "a"), folder(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"b/config\.json"):
        check_folder(broken, good, ALONE)
    check_folder(good, broken, ALONE)


def test_left_over_input_scales_of_w4a16_may_come_and_go(tmp_path: Path) -> None:
    full, bare = folder(tmp_path / "full", algorithm="W4A16_NVFP4"), folder(tmp_path / "bare", without_input_scale, "W4A16_NVFP4")
    check_folder(full, bare, ALONE)
    check_folder(bare, full, ALONE)
    none = torch.tensor([torch.nan])
    check_folder(folder(tmp_path / "none", lambda found: found.update({"layer.input_scale": none}), "W4A16_NVFP4"), full, ALONE)
