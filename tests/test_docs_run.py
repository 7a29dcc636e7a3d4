"""Blocks of pages that are no whole programs run too, each with what its page takes for granted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4 import NvFp4LinearMethod
from aliasparam_nvfp4.linear.verify import random_weights

from .processes import run_ranks

ROOT = Path(__file__).parents[1]
#: Blocks of version 0.1, by their first line.
OLD = "# version 0.1"
#: Blocks that run elsewhere: beside a server, or in an engine, which is installed in an environment of its own.
ELSEWHERE = {
    ("docs/nvfp4/serve.md", 0): "nvfp4/cli/test_serve.py",
    **{("docs/nvfp4/vllm.md", block): "engines/vllm/test_updates.py" for block in range(2)},
    ("docs/nvfp4/sglang.md", 0): "engines/sglang/test_engine.py",
}
#: Blocks of an exchange between processes: what rank 0 runs, and the others.
EXCHANGE = ("docs/rl-loop.md", 0, 1)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def linear(version: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of one layer, and a checkpoint of it."""
    model = nn.Module()
    model.proj = nn.Module()
    NvFp4LinearMethod("reference").create_weights(model.proj, 64, [32], 64, 32, torch.bfloat16)
    return model, {f"proj.{n}": t for n, t in random_weights((32,), 64, version, torch.device("cpu")).items()}


def serving(version: int = 0) -> nn.Module:
    from aliasparam import reload

    model, tensors = linear(version)
    with reload(model) as session:
        session.load(tensors)
    return model


def reloading() -> dict[str, Any]:
    model, tensors = linear()
    return {"model": model, "stream": list(tensors.items()), "prefix_cache": {}}


def declaring() -> dict[str, Any]:
    """A layer on the way to its declaration, and a model that has been loaded."""
    from aliasparam import Alias, Derivation, declare

    layer = nn.Module()
    for name, shape, dtype in (
        ("weight_scale", (128, 8), torch.float8_e4m3fn),
        ("input_scale", (1,), torch.float32),
        ("weight_scale_2", (1,), torch.float32),
    ):
        layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
    return {
        "layer": layer, "model": serving(), "torch": torch, "alpha": lambda inputs, weights: inputs.max() * weights,
        "Alias": Alias, "Derivation": Derivation, "declare": declare,
    }  # fmt: skip


def published() -> dict[str, Any]:
    """A model of version 6, and the deltas from there to version 9."""
    from aliasparam.reload.delta_writer import diff

    for version in range(7, 10):
        diff(linear(version - 1)[1], linear(version)[1], f"source/weight_v{version:06}", version, version - 1)
    return {"model": serving(6)}


def wide() -> dict[str, Any]:
    """A model that serves, and a trainer's weight for it."""
    return {"model": serving(), "trained": {"proj.weight": torch.randn(32, 64).bfloat16()}}


def two_models() -> dict[str, Any]:
    """A target and a draft of step 6, on the only rank there is."""
    from aliasparam import reload

    def prepare() -> tuple[Any, str]:
        session = reload(serving(6), policy="staged-journal")
        session.begin()
        session.load(linear(7)[1])
        session.prepare()
        return session, "step-7"

    return {"prepare_target": prepare, "prepare_draft": prepare, "store": dist.HashStore(), "rank": 0, "ranks": 1}


def judged() -> dict[str, Any]:
    """A method that keeps the laws, as a kit's user has it."""
    from aliasparam import Alias, declare, process

    def make(device: str = "cpu", aliasing: bool = True) -> nn.Module:
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(4, 2, dtype=torch.uint8, device=device), requires_grad=False)
        declare(layer, Alias("weight", "weight_prepared", "(h i) k -> ~h i k, h=2"), loaded=False, aliasing=aliasing)
        return layer

    return {"make": make, "make_layer": make, "my_process_weights_after_loading": process}


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


def trained() -> dict[str, Any]:
    """The same, and a trainer that went from one to the other."""
    from safetensors.torch import load_file

    from aliasparam.reload import digest_of_tensors

    given = folders()
    before, after = (load_file(f"checkpoint-{name}/model.safetensors") for name in "ab")
    return {**given, "before": before, "after": after, "trainers_digest": digest_of_tensors(after).whole}


PAGES: dict[str, list[Callable[[], dict[str, Any]] | None]] = {
    "README.md": [reloading, declaring],
    "docs/concepts.md": [declaring],
    "docs/reload.md": [reloading, folders, None, None, published, lambda: {"model": serving(7)}, two_models],
    "docs/rl-loop.md": [None, None, trained, None, None, wide],
    "docs/testing.md": [judged, None, None],
    "docs/porting-0.1.md": [None],
    "docs/nvfp4/vllm.md": [None] * 2,
    "docs/nvfp4/sglang.md": [None],
    "docs/nvfp4/moe.md": [experts, None],
    "docs/nvfp4/transformers.md": [folders, folders],
    "docs/nvfp4/serve.md": [None],
}
#: A block that begins with what an earlier one of its page left.
GOES_ON = {
    **{("docs/nvfp4/moe.md", 1): 0, ("docs/testing.md", 1): 0, ("docs/testing.md", 2): 0},
    **{("docs/reload.md", 2): 0, ("docs/reload.md", 3): 0, ("docs/reload.md", 5): 4},
    **{("docs/rl-loop.md", 3): 2, ("docs/rl-loop.md", 4): 3},
}


@pytest.mark.parametrize("page", PAGES)
def test_each_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, left = blocks(page), {}
    assert len(found) == len(PAGES[page])
    for number, (block, given) in enumerate(zip(found, PAGES[page], strict=True)):
        if (page, number) in ELSEWHERE:
            assert (ROOT / "tests" / ELSEWHERE[page, number]).is_file()
        elif not block.startswith(OLD) and (page != EXCHANGE[0] or number not in EXCHANGE[1:]):
            left[number] = dict(left[GOES_ON[page, number]]) if (page, number) in GOES_ON else {}
            left[number] |= given() if given is not None else {}
            run(page, number, left[number])


def run(page: str, number: int, names: dict[str, Any]) -> None:
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), names)


def test_the_blocks_of_an_exchange_run_between_processes(tmp_path: Path) -> None:
    run_ranks(_exchange, (str(tmp_path),), 3)


def _exchange(rank: int, folder: str) -> None:
    page, sends, receives = EXCHANGE
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    model, tensors = serving(0), linear(1)[1]
    run(page, receives if rank else sends, {"model": model, "named_tensors": tensors})
    if rank:
        assert all(torch.equal(value, tensors[name]) for name, value in checkpoint_state_dict(model).items())
    dist.destroy_process_group()


def pages_with_code() -> Iterator[str]:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        if "```python" in page.read_text():
            yield str(page.relative_to(ROOT))


def test_no_page_is_forgotten() -> None:
    """What is not here is run whole by test_docs.py."""
    whole = {f"docs/{name}.md" for name in ("tutorial", "pwal", "layouts", "seeing", "own-method")}
    assert set(pages_with_code()) == set(PAGES) | whole
