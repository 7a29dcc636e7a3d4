"""Chains of published versions: which deltas lead from what serves to what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aliasparam.reload.delta_folder import Chain, open_version
from aliasparam.reload.errors import DeltaError, SourceError
from aliasparam.reload.published import newest

from .delta_cases import trainer_writes
from .folders import plain, safetensors
from .test_delta import apply, changed


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, list[dict[str, bytes]]]:
    """Versions 1, 2, 3 deltas, 4 full, 5 and 6 deltas."""
    states = [{"w": bytes(100), "s": bytes(50)}]
    for version in range(1, 7):
        states.append({name: changed(value, 0.1, version) for name, value in states[-1].items()})
        folder = tmp_path / f"weight_v{version:06d}"
        if version == 4:
            folder.mkdir()
            tensors = {name: torch.tensor(list(value), dtype=torch.uint8) for name, value in states[-1].items()}
            safetensors(folder / "model.safetensors", tensors)
        else:
            encoding = "xor" if version % 2 else "overwrite"
            trainer_writes(folder, states[-2], states[-1], version, encoding, "adler32", files=2)
    return tmp_path, states


@pytest.mark.parametrize("target", range(7))
@pytest.mark.parametrize("applied", range(7))
def test_a_receiver_comes_to_any_later_version(source: tuple[Path, list[dict[str, bytes]]], applied: int, target: int) -> None:
    folder, states = source
    if target < applied:
        with pytest.raises(DeltaError, match=f"the version is older than what serves\n.*>= {applied}\n.*{target}"):
            Chain(folder, applied, target)
        return
    with Chain(folder, applied, target) as chain:
        assert (chain.full is not None) == (applied < 4 <= target)
        state = dict(states[applied])
        if chain.full is not None:
            state = {name: plain(chain.full.read(name)) for name in chain.full.tensors}
        assert len(chain.deltas) == target - (4 if chain.full is not None else applied)
        for delta in chain.deltas:
            state = apply(delta, state, 16)
        assert state == states[target]
        chain.check_unchanged()


def test_the_newest_version_is_one_that_was_published(source: tuple[Path, list[dict[str, bytes]]]) -> None:
    folder, _ = source
    (folder / "weight_v000007").mkdir()  # still being written: no index
    (folder / "weight_v8").mkdir()
    assert newest(folder).version == 6 and newest(folder / "weight_v000007").version == 0
    with pytest.raises(SourceError, match="the source cannot be listed: No such file"):
        newest(folder / "nowhere")


def test_a_chain_with_a_version_missing_is_refused(source: tuple[Path, list[dict[str, bytes]]]) -> None:
    folder, _ = source
    (folder / "weight_v000005").rename(folder / "weight_v000009")
    with pytest.raises(SourceError, match="weight_v000005: this is not a folder"):
        Chain(folder, 0, 6)
    with pytest.raises(DeltaError, match=r"the folder holds another version\n.*9\n.*5"):
        open_version(folder, 9)


def test_a_chain_that_does_not_pass_through_what_serves_is_refused(tmp_path: Path) -> None:
    old, new = {"w": b"a"}, {"w": b"b"}
    trainer_writes(tmp_path / "weight_v000003", old, new, 3, "xor", "adler32")
    index = tmp_path / "weight_v000003" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("000002", "000000"))
    with pytest.raises(
        DeltaError, match=r"no chain of deltas .*\n.*a delta on version 2, or a full version\n.*deltas on 0\n.*Load the base"
    ):
        Chain(tmp_path, 2, 3)
    Chain(tmp_path, 0, 3).close()


def test_a_delta_replaced_between_plan_and_commit_is_refused(source: tuple[Path, list[dict[str, bytes]]]) -> None:
    folder, states = source
    with Chain(folder, 0, 2) as chain:
        (folder / "weight_v000001").rename(folder / "old")
        trainer_writes(folder / "weight_v000001", states[0], states[2], 1, "xor", "adler32", files=2)
        assert apply(chain.deltas[0], states[0], 64) == states[1]  # what was opened
        with pytest.raises(SourceError, match="replaced while it was read"):
            chain.check_unchanged()
