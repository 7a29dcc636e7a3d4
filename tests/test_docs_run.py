"""Blocks of pages that are no whole programs run too, each with what its page takes for granted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.linear.verify import random_weights

ROOT = Path(__file__).parents[1]
#: Blocks that say they need more than this machine, by their first line.
ELSEWHERE = "# against a running server"
#: Blocks of an exchange between processes, which have tests of their own.
TESTED = {
    ("docs/reload.md", 4): "aliasparam/reload/test_law_12_apply_delta.py",
    ("docs/reload.md", 5): "aliasparam/reload/test_published.py",
    ("docs/reload.md", 6): "aliasparam/reload/test_member.py",
    **{("docs/rl-loop.md", block): "examples/test_rl_loop.py" for block in range(5)},
    **{("docs/nvfp4/vllm.md", block): "engines/vllm/test_updates.py" for block in range(2)},
    ("docs/nvfp4/sglang.md", 0): "engines/sglang/test_engine.py",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def linear() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of one layer, and a checkpoint of it."""
    model = nn.Module()
    model.proj = nn.Module()
    NvFp4LinearMethod("reference").create_weights(model.proj, 64, [32], 64, 32, torch.bfloat16)
    return model, {f"proj.{n}": t for n, t in random_weights((32,), 64, 0, torch.device("cpu")).items()}


def reloading() -> dict[str, Any]:
    model, tensors = linear()
    return {"model": model, "stream": list(tensors.items()), "prefix_cache": {}}


def declaring() -> dict[str, Any]:
    """A layer on the way to its declaration, and a model that has been loaded."""
    from aliasparam import Alias, Derivation, declare, reload

    layer = nn.Module()
    for name, shape, dtype in (
        ("weight_scale", (128, 8), torch.float8_e4m3fn),
        ("input_scale", (1,), torch.float32),
        ("weight_scale_2", (1,), torch.float32),
    ):
        layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
    model, tensors = linear()
    with reload(model) as session:
        session.load(tensors)
    return {
        "layer": layer, "model": model, "torch": torch, "alpha": lambda inputs, weights: inputs.max() * weights,
        "Alias": Alias, "Derivation": Derivation, "declare": declare,
    }  # fmt: skip


def experts() -> dict[str, Any]:
    """16 experts, tensor by tensor; a router's logits and its bias."""
    from .nvfp4.moe_layers import checkpoint

    e, h, i = 16, 64, 32
    tensors = [
        (f"{'w2' if shard == 'w2' else 'w13'}_{suffix}", tensor, shard, expert)
        for (expert, shard, suffix), tensor in checkpoint(e, h, i).items()
    ]
    weights, ids = torch.randn(3, e).softmax(-1).topk(2)
    gate = nn.Module()
    gate.e_score_correction_bias = torch.zeros(e)
    return {
        "layer": nn.Module(), "num_experts": e, "hidden_size": h, "intermediate_size_per_partition": i, "torch": torch,
        "checkpoint": tensors, "x": torch.randn(3, h).bfloat16(), "topk_weights": weights, "topk_ids": ids, "gate": gate,
        "router_logits": torch.randn(3, e),
    }  # fmt: skip


def folders() -> dict[str, Any]:
    """checkpoint-a and checkpoint-b in the working directory, and a model of the first."""
    pytest.importorskip("transformers")
    from aliasparam_nvfp4.integrations.transformers import load_model

    from .nvfp4.cli.folders import chat_folder

    a, _ = chat_folder(Path("checkpoint-a"), 1), chat_folder(Path("checkpoint-b"), 2)
    return {"model": load_model(a)[0]}


PAGES: dict[str, list[Callable[[], dict[str, Any]] | None]] = {
    "README.md": [reloading, declaring],
    "docs/concepts.md": [declaring],
    "docs/reload.md": [reloading, folders, reloading, reloading, None, None, None],
    "docs/rl-loop.md": [None] * 5,
    "docs/nvfp4/vllm.md": [None] * 2,
    "docs/nvfp4/sglang.md": [None],
    "docs/nvfp4/moe.md": [experts, None],
    "docs/nvfp4/transformers.md": [folders, folders],
    "docs/nvfp4/serve.md": [None],
}
#: A block that begins with what an earlier one of its page left.
GOES_ON = {("docs/nvfp4/moe.md", 1): 0, ("docs/reload.md", 2): 0, ("docs/reload.md", 3): 0}


@pytest.mark.parametrize("page", PAGES)
def test_each_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, left = blocks(page), {}
    assert len(found) == len(PAGES[page])
    for number, (block, given) in enumerate(zip(found, PAGES[page], strict=True)):
        if (page, number) in TESTED:
            assert (ROOT / "tests" / TESTED[page, number]).is_file()
            continue
        if block.startswith(ELSEWHERE):
            continue
        names = dict(left[GOES_ON[page, number]]) if (page, number) in GOES_ON else {}
        left[number] = names | (given() if given is not None and not names else {})
        exec(compile(block, f"{page}, block {number}", "exec"), left[number])


def pages_with_code() -> Iterator[str]:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        if "```python" in page.read_text():
            yield str(page.relative_to(ROOT))


def test_no_page_is_forgotten() -> None:
    """What is not here is run whole by test_docs.py, or is the kit's own page, whose blocks are tests."""
    whole = {f"docs/{name}.md" for name in ("tutorial", "pwal", "layouts", "seeing", "own-method")}
    assert set(pages_with_code()) - set(PAGES) - whole <= {"docs/testing.md", "docs/porting-0.1.md", "CONTRIBUTING.md"}
