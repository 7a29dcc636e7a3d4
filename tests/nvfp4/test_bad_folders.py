"""Whatever is wrong with a folder is one error of the library which names it: never a traceback of another kind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aliasparam.errors import AliasError
from aliasparam_nvfp4.checkpoint import CheckpointError, QuantConfig
from aliasparam_nvfp4.cli.app import app

transformers = pytest.importorskip("transformers")
from .test_cli import write_tokenizer  # noqa: E402
from .test_transformers import write_checkpoint  # noqa: E402

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def header(value: Any) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        text = json.dumps(value).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    return poison


def index(value: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder / "model.safetensors.index.json", value)


def quantization(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, quantization_config={**MODELOPT, **entries})


def edit(folder: Path, **entries: Any) -> None:
    config = folder / "config.json"
    write(config, json.loads(config.read_text()) | entries)


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def becomes_a_folder(name: str) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return poison


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def renamed_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


#: What is wrong: (how, a part of the message).
TENSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a header that is a list": (header([]), "JSON is not an object"),
    "an entry without shape": (header({"a": {"dtype": "U8"}}), "an entry of the header"),
    "an entry that is a string": (header({"a": "x"}), "an entry of the header"),
    "a negative shape": (header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}), "an entry of the header"),
    "three offsets": (header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}), "an entry of the header"),
    "weights that are a folder": (becomes_a_folder("model.safetensors"), "not a file"),
    "weights of another kind": (renamed_weights, "the file is missing"),
    "a weight_map that is a list": (index({"weight_map": ["a"]}), "weight_map"),
    "a weight_map of numbers": (index({"weight_map": {"a": 1}}), "weight_map"),
    "an index without weight_map": (index({}), "weight_map"),
}
CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a group size that is a word": (quantization(group_size="x"), "group_size"),
    "ignore that is a number": (quantization(ignore=5), "ignore"),
    "ignore of nothing": (quantization(ignore=[None]), "ignore"),
    "a broken pattern": (quantization(ignore=["re:("]), "regular expression"),
    "config_groups that are a list": (quantization(config_groups=[1]), "config_groups"),
    "weights that are a word": (quantization(config_groups={"g": {"weights": "x"}}), "weights"),
    "a KV-cache scheme that is a number": (quantization(kv_cache_scheme=8), "kv_cache_scheme"),
    "quantized_layers that are a list": (
        quantization(quant_algo="MIXED_PRECISION", quantized_layers=["a"]),
        "quantized_layers",
    ),
    "compressed-tensors groups that are a list": (
        quantization(quant_method="compressed-tensors", format="nvfp4-pack-quantized", config_groups=[1]),
        "config_groups",
    ),
    "config.json is a folder": (becomes_a_folder("config.json"), "cannot be read"),
}
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a model type nobody knows": (lambda folder: edit(folder, model_type="foo"), "model type `foo`"),
    "a size that is a word": (lambda folder: edit(folder, hidden_size="x"), "transformers cannot"),
}
GENERATE = TENSORS | CONFIGS | MODELS | {"no tokenizer": (no_tokenizer, "read the tokenizer")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_checkpoint(tmp_path / "b", 2)
    write_tokenizer(made)
    return made


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, AliasError), result.exception
    return str(result.exception)


@pytest.mark.parametrize("case", TENSORS | CONFIGS)
def test_inspect_refuses_by_name(folder: Path, case: str) -> None:
    poison, message = (TENSORS | CONFIGS)[case]
    poison(folder)

    text = refused("inspect", folder)

    assert message in text and folder.name in text


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses_by_name(folder: Path, case: str) -> None:
    poison, message = GENERATE[case]
    poison(folder)

    text = refused("generate", folder, "w1", "--backend", "reference", "--tokens", "1")

    assert message in text and folder.name in text


@pytest.mark.parametrize("case", TENSORS | CONFIGS | MODELS)
def test_law_10_reload_refuses_by_name_and_goes_on(folder: Path, tmp_path: Path, case: str) -> None:
    poison, message = (TENSORS | CONFIGS | MODELS)[case]
    first = write_checkpoint(tmp_path / "a", 1)
    write_tokenizer(first)
    poison(folder)

    arguments = ["reload", first, folder, "--prompt", "w1", "--tokens", "1", "--backend", "reference"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])

    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert "refused" in result.output and message in " ".join(result.output.split())


def test_an_empty_prompt_is_refused(folder: Path) -> None:
    assert "nothing to answer" in refused("generate", folder, "", "--backend", "reference")


def test_quantizing_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty / "config.json", {})

    assert "transformers cannot" in refused("quantize", empty, tmp_path / "out")


def test_the_demo_refuses_an_unknown_backend_before_it_makes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*arguments: Any) -> None:
        raise AssertionError("checkpoints were made")

    monkeypatch.setattr("aliasparam_nvfp4.demo._quiet.need", made)

    assert "unknown linear backend" in refused("demo", "--backend", "nope", "--cache", tmp_path)


# -- patterns ------------------------------------------------------------------------------------------------------------


def excludes(module: str, *patterns: str, **config: Any) -> bool:
    return module in QuantConfig.from_dict({**MODELOPT, "ignore": list(patterns), **config}).rules.ignored


@pytest.mark.parametrize("pattern", ["self_attn", "*attn", "q_proj", "model.layers.0", "model.layers.0.self_attn*", "re:.*q_pr"])
def test_a_pattern_excludes_by_path_parent_or_part_as_in_sglang(pattern: str) -> None:
    assert excludes("model.layers.0.self_attn.q_proj", pattern)


@pytest.mark.parametrize("pattern", ["attn", "layers.0", "re:self_attn", "re:q_proj", "model.layers.1", "proj"])
def test_a_pattern_of_something_else_does_not(pattern: str) -> None:
    assert not excludes("model.layers.0.self_attn.q_proj", pattern)


def test_a_single_pattern_may_be_a_string() -> None:
    config = QuantConfig.from_dict({**MODELOPT, "ignore": "lm_head"})

    assert config.exclude == ("lm_head",)


@pytest.mark.parametrize(
    ("scheme", "algo"), [({"num_bits": 8, "type": "float"}, "FP8"), ("FP8", "FP8"), (None, None), ({}, None)]
)
def test_the_kv_cache_scheme_in_every_spelling(scheme: Any, algo: str | None) -> None:
    assert QuantConfig.from_dict({**MODELOPT, "kv_cache_scheme": scheme}).kv_cache_algo == algo


def test_bad_entries_name_the_entry() -> None:
    with pytest.raises(CheckpointError, match="quantization_config: group_size") as error:
        QuantConfig.from_dict({**MODELOPT, "group_size": "x"})

    assert error.value.expected == "a whole number" and error.value.found == "'x'"


@pytest.mark.parametrize(
    "name", ["config.json", "hf_quant_config.json", "tokenizer.json", "generation_config.json", "x.safetensors"]
)
@pytest.mark.parametrize("command", ["inspect", "generate", "serve", "quantize"])
def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(name: str, command: str, tmp_path: Path) -> None:
    """A read of it would never end: nobody writes."""
    write_checkpoint(tmp_path / "a", 1)
    write_tokenizer(tmp_path / "a")
    file = tmp_path / "a" / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    more = {"generate": ["w1"], "quantize": [str(tmp_path / "out")]}.get(command, [])

    with pytest.raises(AliasError, match=rf"{name}: this is not a file(.|\n)*a pipe"):
        CliRunner().invoke(app, [command, str(tmp_path / "a"), *more], catch_exceptions=False)


def test_devices_are_refused_and_links_to_files_are_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 1)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a" / "notes.txt").symlink_to(tmp_path / "notes.txt")
    (tmp_path / "a" / "gone.txt").symlink_to(tmp_path / "nowhere")
    QuantConfig.from_folder(tmp_path / "a")
    (tmp_path / "a" / "vocab.json").symlink_to("/dev/zero")

    with pytest.raises(CheckpointError, match="a device"):
        QuantConfig.from_folder(tmp_path / "a")


def test_a_million_layers_are_refused_before_any_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a", 1)
    write_tokenizer(tmp_path / "a")
    edit(tmp_path / "a", num_hidden_layers=10**6)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", lambda *_, **__: pytest.fail("it was built"))

    for command, more in (("inspect", []), ("generate", ["w1"])):
        result = CliRunner().invoke(app, [command, str(tmp_path / "a"), *more])
        text = result.output + str(result.exception)
        assert result.exit_code != 0 and "more layers than the files have" in text and "num_hidden_layers = 1000000" in text


@pytest.mark.parametrize("many", [100, 256])
def test_of_a_few_layers_too_many_each_tensor_is_named(many: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 1)
    write_tokenizer(tmp_path / "a")
    edit(tmp_path / "a", num_hidden_layers=many)

    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
    assert result.exit_code == 1 and "missing: model.layers." in result.output
