"""SGLang PR 25190's acceptance test in its shape: a Qwen3-MoE NVFP4 checkpoint over several processes, reloaded from disk twice,
decode logprobs unchanged. There within 1e-4; here bit for bit. Real processes over gloo, one thread each.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("modelopt")

from aliasparam import checkpoint_digest
from aliasparam.errors import AliasError
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam_nvfp4.checkpoint import CheckpointError, CheckpointFolder, ExpertTensorName
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe import ExpertRanks

from ..processes import run_ranks
from .moe_models import IDS, by_modelopt, logits

EXPERTS, LEAST_DB = 8, 10.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("qwen3-moe")
    return by_modelopt(root / "a", "qwen3", 0), by_modelopt(root / "b", "qwen3", 1)


def load(folder: Path, ranks: ExpertRanks, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    from aliasparam_nvfp4.integrations.transformers import use_backend

    with use_backend("reference", moe="reference", ranks=ranks):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def decode_logprobs(model: Any) -> Tensor:
    """Log-probabilities over the vocabulary of 8 greedily decoded tokens, through the KV cache."""
    out = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits).float().log_softmax(-1)


def own_bytes(folder: Path, ranks: ExpertRanks) -> int:
    """What a rank must read: every tensor which is not an expert's, its part of the experts, all input scales."""
    total = 0
    for entry in CheckpointFolder(folder).tensors.values():
        name = ExpertTensorName.parse(entry.name)
        if name is not None and name.suffix != "input_scale":
            if name.expert // (EXPERTS // ranks.ep_size) != ranks.ep_rank:
                continue
            total += entry.nbytes // (ranks.tp_size if len(entry.shape) == 2 else 1)
        else:
            total += entry.nbytes
    return total


def serve(rank: int, a: Path, b: Path, broken: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    try:
        # Experts are divided by two, and each one's I by two. Each by four alone: test_moe_parallel.py.
        serve_as(rank, ExpertRanks(tp_rank=rank % 2, tp_size=2, ep_rank=rank // 2, ep_size=2), a, b, broken)
    finally:
        dist.destroy_process_group()


def serve_as(rank: int, ranks: ExpertRanks, a: Path, b: Path, broken: Path) -> None:
    from aliasparam_nvfp4.integrations.transformers import reload_folder

    model = load(a, ranks)
    first, where = decode_logprobs(model), {n: t.data_ptr() for n, t in model.named_buffers()}
    for _ in range(2):
        assert reload_folder(model, a) == own_bytes(a, ranks)
        assert torch.equal(decode_logprobs(model), first)
    reload_folder(model, b)
    assert not torch.equal(decode_logprobs(model), first)
    reload_folder(model, a)
    assert torch.equal(decode_logprobs(model), first)
    assert {n: t.data_ptr() for n, t in model.named_buffers()} == where
    with pytest.raises(CheckpointError, match="truncated" if rank == 1 else "another process refused"):
        reload_folder(model, broken if rank == 1 else b)
    assert torch.equal(decode_logprobs(model), first), "all go on answering"
    everyone = [torch.empty_like(first) for _ in range(4)]
    dist.all_gather(everyone, first)
    assert all(torch.equal(one, first) for one in everyone), "ranks agree"

    apply_deltas(rank, model, a, b, broken.parent)

    found = logits(load(b, ranks, torch.float32))
    if rank == 0:
        alone = logits(load(b, ExpertRanks(), torch.float32))
        assert signal_to_noise(found.double(), alone.double()) >= LEAST_DB


def apply_deltas(rank: int, model: Any, a: Path, b: Path, deltas: Path) -> None:
    """A delta to B and back, of experts that this rank has in part or not at all, is a reload of B, and of A."""
    from aliasparam_nvfp4.integrations.transformers import apply_delta_folder, reload_folder

    first = decode_logprobs(model)
    reload_folder(model, b)
    second, digest = decode_logprobs(model), checkpoint_digest(model)
    reload_folder(model, a)
    before = checkpoint_digest(model)
    assert apply_delta_folder(model, deltas / "to-b", serving=0) == 1
    assert checkpoint_digest(model) == digest and torch.equal(decode_logprobs(model), second)
    for name, match in (
        ("to-b", "the checksum of the new bytes differs|another process refused"),
        ("xxh3", "cannot be verified"),
    ):
        with pytest.raises(AliasError, match=match):  # it is applied already, or cannot be added up
            apply_delta_folder(model, deltas / name)
    with pytest.raises(AliasError, match=r"truncated|another process refused"):
        apply_delta_folder(model, deltas / ("cut" if rank == 1 else "to-a"))
    assert checkpoint_digest(model) == digest and torch.equal(decode_logprobs(model), second), "all go on answering"
    assert apply_delta_folder(model, deltas / "to-a", serving=1) == 2
    assert checkpoint_digest(model) == before and torch.equal(decode_logprobs(model), first)


def publish(a: Path, b: Path, deltas: Path) -> None:
    with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new:
        diff(old, new, deltas / "to-b", 1, 0, checksum_format="adler32")
        diff(new, old, deltas / "xxh3", 2, 1)
        diff(new, old, deltas / "to-a", 2, 1, checksum_format="adler32", encoding="overwrite")
    cut = Path(shutil.copytree(deltas / "to-a", deltas / "cut"))
    shard = next(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def test_decode_logprobs_are_bit_equal_after_each_reload(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders[1], tmp_path / "broken"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-100])
    publish(*folders, tmp_path)
    run_ranks(serve, (*folders, broken, tmp_path / "store"), 4)
