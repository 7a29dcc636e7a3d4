"""Law 12: a digest of the live model equals the digest of the checkpoint's files, and zlib's of the exported bytes."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from aliasparam import checkpoint_digest, checkpoint_names, checkpoint_state_dict, invalidate, process
from aliasparam.errors import AliasError
from aliasparam.layout.bound import BoundLayout
from aliasparam.layout.boxes import Box
from aliasparam.reload import digest_of_folder, digest_of_tensors, live_digest
from aliasparam.reload.live import Live
from aliasparam.reload.sources import SafetensorsFolder

from ..small import Layer, storage_of
from . import folders
from .live_models import Whole, changed, folder_of


@pytest.mark.parametrize("kind", ["adler32", "xxh3-128", "blake3"])
@pytest.mark.parametrize("piece", [7, 64, 8 << 20])
def test_law_12_a_live_model_digests_as_its_files(
    kind: str, piece: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Whole(device)
    values = changed(checkpoint_state_dict(Whole()), 0.4, 0)
    model.load_state_dict(values, strict=False)  # without "tied"
    with SafetensorsFolder(folder_of(tmp_path / "a", values)) as folder:
        expected = digest_of_folder(folder, kind)
    monkeypatch.setattr(live_digest, "_PIECE", piece)

    process(model)
    found = checkpoint_digest(model, kind)
    assert found == expected
    assert "tied" not in found.tensors and "norm" in found.tensors
    if kind == "adler32":
        assert found.tensors == {name: f"{zlib.adler32(folders.plain(value)):08x}" for name, value in values.items()}

    with torch.no_grad():
        model.wide.weight[5, 7] += 1
    other = checkpoint_digest(model, kind)
    assert [name for name in found.tensors if found.tensors[name] != other.tensors[name]] == ["wide.weight"]
    assert found.whole != other.whole


def test_scratch_is_a_piece_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sizes = Layer((64, 512)), []
    monkeypatch.setattr(live_digest, "_PIECE", 2048)
    read = BoundLayout.empty
    monkeypatch.setattr(BoundLayout, "empty", lambda self, memory, box: sizes.append(read(self, memory, box)) or sizes[-1])
    checkpoint_digest(layer)
    assert len(sizes) == 16 and max(value.nbytes for value in sizes) == 2048


@pytest.mark.parametrize("written", ["0.weight", "1.weight", "2"])
def test_what_holds_no_weights_or_changes_meanwhile_has_no_digest(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor changes after it was digested itself: the digest would be of no generation."""
    layer = nn.ModuleList([Layer((6, 8)), Layer((6, 8))])
    layer.register_buffer("2", torch.zeros(3))
    names = checkpoint_names(layer)
    read, done = Live.bytes, []

    def and_write(live: Live, box: Box) -> torch.Tensor:
        if not done and live.tensor is names["1.weight"]:
            done.append(names[written].mul_(3))
        return read(live, box)

    monkeypatch.setattr(Live, "bytes", and_write)
    with pytest.raises(AliasError, match=f"^{written}: .*changed while it was read"), torch.no_grad():
        checkpoint_digest(layer)
    invalidate(layer)
    with pytest.raises(AliasError):
        checkpoint_digest(layer)


def test_positions_are_offsets() -> None:
    """Arithmetic on a few positions gives what the table of the whole tensor says."""
    model = Whole()
    for layer, name in ((model.padded, "weight"), (model.scales, "weight"), (model.wide, "weight"), (model.table, "weight")):
        bound = storage_of(layer, name).bound
        at = torch.randperm(bound.offsets().numel())[:37]
        assert torch.equal(bound.positions(at), bound.offsets().view(-1)[at])  # type: ignore[arg-type]
    for live in map(Live, (model.q.weight, model.k.weight, model.wide.weight)):  # type: ignore[arg-type]
        memory, at = live.storage.elements.view(torch.uint8), torch.arange(live.nbytes)  # type: ignore[union-attr]
        assert memory is not None and torch.equal(memory[live.positions(at)], live.bytes(live.box))


def test_law_12_weights_of_inference_mode_have_the_digest_of_their_bytes() -> None:
    """Torch counts no writes of such tensors, and raises where it is asked for their number."""
    with torch.inference_mode():
        weights = {"w": torch.arange(6.0), "b": torch.ones(2)}
    assert digest_of_tensors(weights) == digest_of_tensors({name: value.clone() for name, value in weights.items()})
    with torch.inference_mode():
        weights["w"][0] = 9
    assert digest_of_tensors(weights).tensors["w"] == f"{zlib.adler32(folders.plain(weights['w'].clone())):08x}"
