"""SGLang's engine and server in processes of their own: tokens before and after updates, and whether they go on answering."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from ..server import free_port, server
from .engine import GREEDY, SAID, engine, fails, tokens, update
from .folders import DENSE, moe, need_dense
from .runner import CPU, PROMPT
from .trainer import buckets

WEIGHT = "model.layers.1.self_attn.o_proj.weight"


def served(engine: Any, path: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """What each rank's scheduler says of its model; see stub/aliasparam_probe.py."""
    engine.collective_rpc("probe", path=str(path))
    return [json.loads(Path(f"{path}.{rank}.json").read_text()) for rank in range(ranks)]


def cut(folder: Path, to: Path) -> Path:
    """The folder with one tensor of another shape."""
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT] = tensors[WEIGHT][:, :-8].contiguous()
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("engine")
    return {tag: moe(where / tag, seed) for seed, tag in enumerate("ab")}


class Pair(NamedTuple):
    """An engine of A on two ranks over gloo, and what engines of either folder serve: tokens, and each rank's digest."""

    engine: Any
    a: tuple[list[int], list[str]]
    b: tuple[list[int], list[str]]
    where: Path

    def serves(self) -> tuple[list[int], list[str]]:
        return tokens(self.engine), [rank["digest"] for rank in served(self.engine, self.where, 2)]


@pytest.fixture(scope="module")
def pair(experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    where = tmp_path_factory.mktemp("pair") / "served"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # SGLang asks for a NUMA node a rank otherwise
        with engine(experts["b"], tp_size=2) as fresh:
            cold = Pair(fresh, ([], []), ([], []), where).serves()
        with engine(experts["a"], tp_size=2) as warm:
            found = Pair(warm, Pair(warm, ([], []), cold, where).serves(), cold, where)
            assert found.a[0] != cold[0] and not set(found.a[1]) & set(cold[1])
            yield found


def test_two_ranks_update_together_or_not_at_all(pair: Pair, experts: dict[str, Path], tmp_path: Path) -> None:
    """A folder, one that is refused, a session, one that is refused, sleep: tokens, digests and addresses of both ranks."""
    warm = pair.engine
    before = served(warm, tmp_path / "before", 2)
    assert all("AliasedModelOptNvFp4FusedMoEMethod" in rank["methods"] for rank in before)
    assert warm.update_weights_from_disk(str(experts["b"]))[0]
    assert pair.serves() == pair.b
    success, message, *_ = warm.update_weights_from_disk(str(cut(experts["a"], tmp_path / "bad")))
    assert not success and "the old weights serve" in message and pair.serves() == pair.b
    assert warm.begin_weight_update()[0]
    assert warm.update_weights_from_tensor(list(load_file(experts["a"] / "model.safetensors").items()))[0]
    assert tokens(warm) == pair.b[0]  # until the end the old weights serve
    assert warm.end_weight_update()[0] and pair.serves() == pair.a
    assert warm.begin_weight_update()[0]
    assert not warm.update_weights_from_tensor([(WEIGHT, torch.zeros(3, 3, dtype=torch.uint8))])[0]
    assert not warm.end_weight_update()[0] and pair.serves() == pair.a
    warm.release_memory_occupation()
    warm.resume_memory_occupation()
    after = served(warm, tmp_path / "after", 2)
    assert pair.serves() == pair.a and [rank["addresses"] for rank in after] == [rank["addresses"] for rank in before]


def test_two_ranks_whose_layers_refuse_go_on_after_a_load(pair: Pair, experts: dict[str, Path]) -> None:
    assert pair.engine.update_weights_from_disk(str(experts["a"]))[0]
    fails(pair.engine)
    assert update(pair.engine, experts["b"]) and pair.serves() == pair.b
    assert update(pair.engine, experts["a"]) and pair.serves() == pair.a


def test_two_ranks_take_deltas(pair: Pair, experts: dict[str, Path], tmp_path: Path) -> None:
    """The tensors of the folder that was loaded are patched on their way; one whose checksums do not hold changes nothing."""
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(experts["a"]) as a, SafetensorsFolder(experts["b"]) as b:
        diff(a, b, tmp_path / "weight_v000001", 1, 0)
        diff(b, a, tmp_path / "weight_v000002", 2, 1)
        diff(b, a, tmp_path / "wrong" / "weight_v000001", 1, 0)
    assert update(pair.engine, experts["a"])
    success, message, *_ = pair.engine.update_weights_from_disk(str(tmp_path / "wrong" / "weight_v000001"))
    assert not success and "checksum" in message and pair.serves() == pair.a
    assert update(pair.engine, tmp_path / "weight_v000001") and pair.serves() == pair.b
    assert update(pair.engine, tmp_path / "weight_v000002") and pair.serves() == pair.a


def test_two_ranks_take_what_a_trainer_broadcasts(pair: Pair, experts: dict[str, Path]) -> None:
    """A trainer's process, rank 0 of a gloo group of three, sends B in buckets, and then A without its last bucket."""
    warm, port = pair.engine, free_port()
    command = [sys.executable, "-m", "tests.engines.sglang.trainer", str(port), "2", str(experts["b"]), str(experts["a"])]
    with subprocess.Popen(command) as trainer:
        try:
            assert warm.init_weights_update_group("127.0.0.1", port, 1, 3, "trainer", backend="gloo")[0]
            for tag, torn in (("b", False), ("a", True)):
                assert warm.begin_weight_update()[0]
                for bucket in buckets(experts[tag])[: -1 if torn else None]:
                    described = [[name for name, _ in bucket], [str(t.dtype)[6:] for _, t in bucket]]
                    shapes = [list(tensor.shape) for _, tensor in bucket]
                    sent = warm.update_weights_from_distributed(*described, shapes, "trainer", load_format="flattened_bucket")
                    assert sent[0], sent
                assert warm.end_weight_update()[0] is not torn
                assert pair.serves() == pair.b
            assert warm.destroy_weights_update_group("trainer")[0]
        finally:
            trainer.kill()
    assert warm.update_weights_from_disk(str(experts["a"]))[0] and pair.serves() == pair.a


def test_the_server_answers_before_and_after_updates(tmp_path: Path) -> None:
    """The demo's model over HTTP: A to B, a bad folder, B to A by a delta, sleep."""
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    need_dense()
    with SafetensorsFolder(DENSE["a"]) as a, SafetensorsFolder(DENSE["b"]) as b:
        diff(b, a, tmp_path / "weight_v000001", 1, 0)
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in CPU.items()]
    with server("sglang.launch_server", ["--model-path", str(DENSE["a"]), *flags], tmp_path / "log") as post:
        ask = {"input_ids": PROMPT, "sampling_params": GREEDY}
        first, sums = post("/generate", ask)["output_ids"], post("/weights_checker")["per_engine_checksum"]
        assert post("/update_weights_from_disk", {"model_path": str(DENSE["b"])})["success"]
        second = post("/generate", ask)["output_ids"]
        refused = post("/update_weights_from_disk", {"model_path": str(cut(DENSE["a"], tmp_path / "bad"))}, status=400)
        assert not refused["success"] and WEIGHT in refused["message"] and post("/generate", ask)["output_ids"] == second
        assert post("/update_weights_from_disk", {"model_path": str(tmp_path / "weight_v000001")})["success"]
        assert post("/generate", ask)["output_ids"] == first and first != second
        post("/release_memory_occupation")
        post("/resume_memory_occupation")
        assert post("/generate", ask)["output_ids"] == first and post("/weights_checker")["per_engine_checksum"] == sums
        assert post("/weights_checker", {"action": "reset_tensors"})["success"]
        for more in ({}, {"return_logprob": True, "logprob_start_len": 0}):  # the model refuses, and the server lives
            assert SAID in str(post("/generate", ask | more, status=503))
        assert post("/update_weights_from_disk", {"model_path": str(DENSE["a"]), "flush_cache": False})["success"]
        assert post("/generate", ask)["output_ids"] == first and post("/weights_checker")["per_engine_checksum"] == sums
