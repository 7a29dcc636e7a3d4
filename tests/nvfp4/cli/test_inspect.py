"""The verdict, memory on a rank, the picture, and JSON of `inspect`; JSON of `doctor` and `reload`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("transformers")
from aliasparam import memory_report
from aliasparam.errors import AliasError
from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.cli.digest import model_digest
from aliasparam_nvfp4.cli.inspect import findings
from aliasparam_nvfp4.integrations.transformers import load_model
from aliasparam_nvfp4.linear import NvFp4LinearMethod

from .folders import chat_folder, edit

SCALE = "model.layers.1.mlp.down_proj.weight_scale_2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("folders") / "a", 1)


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def inspected(*arguments: Any, code: int = 0) -> dict[str, Any]:
    return json.loads(run("inspect", *arguments, "--json", code=code))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["reference", "flashinfer_cutlass", "flashinfer_trtllm"])
def test_what_it_says_of_memory_is_what_the_loaded_model_takes(folder: Path, backend: str) -> None:
    found = inspected(folder, "--backend", backend)
    report = memory_report(load_model(folder, backend)[0])

    assert found["memory"]["linear layers"] == {"one_copy": report.allocated_bytes, "two_copies": report.two_copies_bytes}


def test_the_digest_of_a_folder_is_that_of_the_model_that_holds_it(folder: Path) -> None:
    assert inspected(folder, "--deep")["digest"] == model_digest(load_model(folder, "reference")[0])["digest"]


def test_ranks_divide_linear_layers_and_what_does_not_divide_is_named(folder: Path) -> None:
    found = inspected(folder, "--tp", "2", code=1)

    assert found["memory"] is None and "down_proj" in found["rank"]["refused"]  # 80 columns are 5 blocks


def with_heads(folder: Path, heads: int, kv_heads: int, *, fused: bool = False) -> Path:
    """Attention of heads of 16, its projections quantized."""
    folder.mkdir()
    k, tensors = 64, dict[str, torch.Tensor]()
    apart = {"q_proj": 16 * heads, "k_proj": 16 * kv_heads, "v_proj": 16 * kv_heads}
    for name, rows in ({"qkv_proj": sum(apart.values())} if fused else apart).items():
        at = f"model.layers.0.self_attn.{name}"
        tensors |= {f"{at}.weight": torch.zeros(rows, k // 2, dtype=torch.uint8), f"{at}.weight_scale_2": torch.ones(())}
        tensors |= {f"{at}.weight_scale": torch.ones(rows, k // 16).to(torch.float8_e4m3fn), f"{at}.input_scale": torch.ones(())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantized = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    text = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": k, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps({"text_config": text, "quantization_config": quantized}))
    return folder


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tp", "kv_heads", "rows"), [(2, 4, 32), (4, 4, 16), (4, 2, 16), (8, 1, 16), (8, 2, 16)])
def test_a_rank_has_a_whole_head_of_keys_and_values_at_least(
    tp: int, kv_heads: int, rows: int, fused: bool, tmp_path: Path
) -> None:
    """Engines give the same head to several ranks, also of projections that the file has in one."""
    folder = with_heads(tmp_path / "a", 8, kv_heads, fused=fused)
    parts = findings(folder, backend="reference", moe_backend="auto", tp=tp, ep=1, deep=False)[1]
    layer = torch.nn.Module()
    NvFp4LinearMethod("reference").create_weights(layer, 64, (8 // tp * 16, rows, rows), 64, 0, torch.bfloat16)

    assert [part.one_copy for part in parts] == [memory_report(layer).allocated_bytes]


@pytest.mark.parametrize(("tp", "kv_heads"), [(6, 4), (4, 6)])
def test_heads_that_do_not_divide_among_ranks_are_named(tp: int, kv_heads: int, tmp_path: Path) -> None:
    found = inspected(with_heads(tmp_path / "a", 12, kv_heads), "--tp", str(tp), code=1)

    assert found["memory"] is None and "k_proj" in found["rank"]["refused"]


def spoiled(folder: Path, tmp_path: Path, name: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(folder, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file) | ({name: value} if value is not None else {})
    if value is None:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (SCALE, None, SCALE),
        (SCALE, torch.tensor(float("nan")), "not a scale"),
        (SCALE.replace("weight_scale_2", "input_scale"), torch.tensor(1e-40), "not a scale"),
        (SCALE, torch.zeros(0), SCALE),
        ("model.norm.weight", torch.zeros(47, dtype=torch.bfloat16), "model.norm.weight"),
        ("model.more", torch.zeros(1), "model.more"),
    ],
    ids=[
        "a tensor is missing",
        "a scale is NaN",
        "a reciprocal is infinite",
        "a scale of no values",
        "another shape",
        "a tensor too many",
    ],
)
def test_what_will_not_load_is_said_with_its_reason_and_does_not_load(
    folder: Path, tmp_path: Path, name: str, value: torch.Tensor | None, reason: str
) -> None:
    bad = spoiled(folder, tmp_path, name, value)

    found = inspected(bad, code=1)

    assert found["will_load"] is False
    assert any(reason in line for line in found["reasons"]), found["reasons"]
    with pytest.raises(AliasError):
        load_model(bad, "reference")


def test_block_scales_are_read_where_asked(folder: Path, tmp_path: Path) -> None:
    scales = torch.full((48, 5), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    bad = spoiled(folder, tmp_path, SCALE.removesuffix("_2"), scales)

    assert inspected(bad)["will_load"] is True
    assert "NaN" in inspected(bad, "--deep", code=1)["reasons"][0]


def test_text_of_the_folder_is_no_markup(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "[red]x[/red]")
    edit(tmp_path / "[red]x[/red]" / "config.json", quantization_config=_ignoring("[bold]a", "b\x1b[2Jc"))

    shown = run("inspect", tmp_path / "[red]x[/red]")

    assert "[red]x[/red]: NVFP4" in shown and r"excluded modules: [bold]a, b\x1b[2Jc" in shown


def test_excluded_modules_of_all_layers_are_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    gates = [f"model.layers.{n}.mlp.gate" for n in range(3)]
    edit(tmp_path / "x" / "config.json", quantization_config=_ignoring("lm_head", *gates, "model.layers.7.mlp.up_proj"))

    assert "excluded modules: lm_head, model.layers.*.mlp.gate (3), model.layers.7.mlp.up_proj\n" in run(
        "inspect", tmp_path / "x"
    )


def _ignoring(*patterns: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(patterns)}


def test_the_picture_is_there_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("inspect", folder, "--picture", tmp_path / "a.svg")
    run("inspect", folder, "--picture", tmp_path / "b.svg")

    text = (tmp_path / "a.svg").read_text()
    assert "one copy" in text and "second copy" in text
    assert text == (tmp_path / "b.svg").read_text()
    with pytest.raises(AliasError, match="cannot be written"):
        CliRunner().invoke(app, ["inspect", str(folder), "--picture", str(tmp_path / "no" / "c.svg")], catch_exceptions=False)
    assert {p.name for p in tmp_path.iterdir()} == {"a.svg", "b.svg"}


def test_a_policy_for_missing_input_scales_is_asked_for_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    scales = [name for name in tensors if name.endswith("input_scale")]
    tensors[scales[0]] = torch.zeros_like(tensors[scales[0]])
    save_file({n: t for n, t in tensors.items() if n != scales[-1]}, file, metadata={"format": "pt"})

    refused = json.loads(run("inspect", tmp_path / "a", "--json", code=1))
    allowed = json.loads(run("inspect", tmp_path / "a", "--missing-input-scale", "dynamic", "--json"))

    assert not refused["will_load"] and any(scales[0] in reason for reason in refused["reasons"]) and allowed["will_load"]
    assert run("generate", tmp_path / "a", "w1", "--tokens", 2, "--missing-input-scale", "dynamic").strip()
    with pytest.raises(AliasError, match="missing: "):
        CliRunner().invoke(app, ["generate", str(tmp_path / "a"), "w1"], catch_exceptions=False)
    with pytest.raises(AliasError, match="one of refuse, max, dynamic"):
        CliRunner().invoke(app, ["generate", str(folder), "w1", "--missing-input-scale", "guess"], catch_exceptions=False)


def test_doctor_gives_versions_and_what_each_backend_lacks() -> None:
    found = json.loads(run("doctor", "--json"))

    assert found["linear_backends"]["reference"] is None
    assert found["auto"]["moe_runners"] in found["moe_runners"]
    assert next(p for p in found["packages"] if p["name"] == "torch")["version"] == torch.__version__
    if not torch.cuda.is_available():
        assert "compute capability" in found["linear_backends"]["flashinfer_cutlass"]


def test_reload_gives_each_step_as_json(folder: Path, tmp_path: Path) -> None:
    b = chat_folder(tmp_path / "b", 2)
    (tmp_path / "empty").mkdir()

    found = json.loads(run("reload", folder, b, tmp_path / "empty", folder, "--prompt", "w1", "--tokens", 2, "--json", code=1))

    first, second, refused, again = found["steps"]
    assert "missing" in refused["error"] and refused["answer"] == second["answer"]
    assert again["answer"] == first["answer"] and again["bytes"] > 0


@pytest.mark.parametrize("command", ["inspect", "generate", "serve", "quantize"])
def test_a_name_on_the_hub_says_what_to_do(command: str) -> None:
    with pytest.raises(AliasError, match="hf download nvidia/some-model --local-dir some-model"):
        CliRunner().invoke(app, [command, "nvidia/some-model", "x"], catch_exceptions=False)


@pytest.mark.parametrize("command", ["demo", "generate", "serve", "inspect", "reload"])
def test_an_unknown_runner_fails_at_once(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aliasparam_nvfp4.demo._quiet.need", lambda *_, **__: pytest.fail("it went on"))
    arguments = {"demo": [], "generate": [folder, "w1"], "reload": [folder, folder]}.get(command, [folder])

    with pytest.raises(AliasError, match="unknown MoE runner"):
        CliRunner().invoke(app, [command, *map(str, arguments), "--moe-backend", "nope"], catch_exceptions=False)


def test_a_chat_template_that_does_not_work_is_one_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "b")
    edit(tmp_path / "b" / "tokenizer_config.json", chat_template="{% for %}")

    with pytest.raises(AliasError, match="chat template"):
        CliRunner().invoke(app, ["generate", str(tmp_path / "b"), "w1"], catch_exceptions=False)
