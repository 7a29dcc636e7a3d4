"""Law 12 where a tensor is held in parts by several processes, or is another one in the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam import apply_delta, checkpoint_state_dict, process
from aliasparam.errors import AliasError
from aliasparam.reload import delta_held, prepare_delta
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.delta_held import Part, Places
from aliasparam.reload.errors import DeltaError

from ..small import INTERLEAVE, SWAP, SWAP_PAD8, Layer
from .delta_cases import trainer_writes
from .live_models import changed, folder_of, raw

#: The whole tensors, and how two ranks hold them: rows, columns, columns of each of several matrices, an expert each, all of it.
SHAPES = {"rows": (8, 6), "columns": (6, 12), "box": (3, 4, 6), "left": (4, 4), "right": (4, 4), "both": (6, 8)}
DIVIDED = ("rows", "columns", "box")
LAYOUTS = {"rows": SWAP, "columns": INTERLEAVE, "box": SWAP, "left": SWAP, "right": SWAP, "both": SWAP_PAD8}


def box_of(name: str, rank: int) -> tuple[tuple[int, int], ...]:
    if name == "box":
        return ((0, 3), (0, 4), (0, 2)) if rank == 0 else ((0, 3), (0, 4), (2, 6))
    rows, columns = SHAPES[name]
    if name == "rows":
        return ((0, 4), (0, columns)) if rank == 0 else ((4, 8), (0, columns))
    if name == "columns":
        return ((0, rows), (0, 8)) if rank == 0 else ((0, rows), (8, 12))
    return ((0, rows), (0, columns))


class Rank(nn.Module):
    """What one rank holds of ``tensors``."""

    def __init__(self, rank: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rank = rank
        for name, whole in tensors.items():
            if name == ("right", "left")[rank]:
                continue  # the other rank's expert
            box = box_of(name, rank)
            part = whole[tuple(slice(a, b) for a, b in box)]
            self.add_module(name, Layer(tuple(part.shape), LAYOUTS[name], whole.dtype))
            getattr(self, name).weight.copy_(part)
        process(self)

    def places(self, add_up: Callable[[Tensor], None] | None) -> Places:
        return Places(
            names={name: f"{name}.weight" for name in SHAPES},
            parts={name: Part(SHAPES[name], box_of(name, self.rank)) for name in DIVIDED},
            divided=DIVIDED,
            elsewhere=(("right", "left")[self.rank],),
            add_up=add_up,
        )

    def forward(self) -> list[Tensor]:
        return [layer() for layer in self.children()]


class Adding:
    """Adds up over threads, as an all-reduce would."""

    def __init__(self) -> None:
        self.total, self.lock, self.barrier = torch.zeros(()), threading.Lock(), threading.Barrier(2, timeout=20)

    def __call__(self, rows: Tensor) -> None:
        with self.lock:
            self.total = self.total + rows
        self.barrier.wait()
        rows.copy_(self.total)


def on_both(ranks: list[Rank], delta: Path | Callable[[], Any]) -> list[str | None]:
    """Apply it on two ranks at once; what each refused."""
    adding, refused = Adding(), [None, None]

    def one(rank: Rank) -> None:
        opened = DeltaFolder(delta) if isinstance(delta, Path) else delta()
        try:
            with opened:
                apply_delta(rank, opened, names=rank.places(adding))
        except AliasError as error:
            refused[rank.rank] = str(error)  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


def tensors(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        n: torch.randint(0, 256, s, dtype=torch.uint8, generator=random).to(torch.int64 if n == "columns" else torch.uint8)
        for n, s in SHAPES.items()
    }


@given(share=st.sampled_from([0.02, 0.3, 1.0]), seed=st.integers(0, 50), piece=st.sampled_from([1, 13, 30, 1 << 20]),
       encoding=st.sampled_from(["xor", "overwrite"]), full=st.booleans())  # fmt: skip
def test_law_12_parts_of_all_ranks_are_the_new_tensors(
    share: float, seed: int, piece: int, encoding: str, full: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, old = tmp_path_factory.mktemp("parts"), tensors(seed)
    middle = changed(changed(old, 0.5, 2 * seed), 0.5, 2 * seed + 1)
    new = changed(changed(middle, share, 2 * seed), share, 2 * seed + 1)
    folder_of(folder / "weight_v000001", middle)
    trainer_writes(folder / "weight_v000002", raw(middle), raw(new), 2, encoding, "adler32", 2)
    ranks = [Rank(rank, old if full else middle) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(delta_held, "PIECE", piece)
        delta = (lambda: Chain(folder, 0, 2)) if full else folder / "weight_v000002"
        assert on_both(ranks, delta) == [None, None]
    for rank in ranks:
        cold = Rank(rank.rank, new)
        assert raw(checkpoint_state_dict(rank)) == raw(checkpoint_state_dict(cold))
        assert all(torch.equal(a, b) for a, b in zip(rank(), cold(), strict=True))


def test_a_part_that_is_wrong_anywhere_is_refused_everywhere(tmp_path: Path) -> None:
    old = tensors(0)
    new = changed(changed(old, 0.2, 0), 0.2, 1)
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    other = {**old, "rows": old["rows"].clone()}
    other["rows"][7, 5] ^= 1  # rank 1's
    ranks = [Rank(0, old), Rank(1, other)]
    before = [rank() for rank in ranks]
    refused = on_both(ranks, delta)
    assert all(text is not None and "rows: the checksum of the new bytes differs" in text for text in refused), refused
    assert all(torch.equal(a, b) for rank, served in zip(ranks, before, strict=True) for a, b in zip(rank(), served, strict=True))


def test_a_part_that_nobody_would_verify_is_refused(tmp_path: Path) -> None:
    old = {"rows": tensors(0)["rows"]}
    new = {"rows": old["rows"] ^ 1}
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    model = nn.Module()
    model.rows = Layer((4, 6), SWAP)  # of another base
    process(model)
    served = model.rows()
    with pytest.raises(DeltaError, match=r"rows: .* held in parts, and not among those that all processes verify"):
        apply_delta(model, delta, names=Places({"rows": "rows.weight"}, {"rows": Part((8, 6), box_of("rows", 0))}))
    assert torch.equal(model.rows(), served)


def test_what_cannot_be_verified_in_parts_is_refused(tmp_path: Path) -> None:
    old = tensors(0)
    new = changed(changed(old, 0.2, 0), 0.2, 1)
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "xxh3-128")
    with DeltaFolder(delta) as opened:
        with pytest.raises(DeltaError, match=r"cannot be verified where a tensor is held in parts\n.*adler32.*\n.*xxh3-128"):
            prepare_delta(Rank(0, old), opened, names=Rank(0, old).places(None))
        places = Rank(0, old).places(None)
        wrong = {"rows": Part((8, 6), ((0, 5), (0, 6)))}
        with pytest.raises(DeltaError, match="rows: the live tensor is not this part"):
            prepare_delta(Rank(0, old), opened, names=Places(places.names, wrong, wrong, elsewhere=("right",)))
    alone = trainer_writes(tmp_path / "e", raw(old), raw(new), 1, "xor", "adler32")
    with DeltaFolder(alone) as opened, pytest.raises(DeltaError, match="a digest of a part of a tensor"):
        prepare_delta(Rank(0, old), opened, names=Rank(0, old).places(None))


def test_law_12_two_tensors_of_the_files_in_one_place_are_refused(tmp_path: Path) -> None:
    """Each of them fits its checksum, and the model would be neither."""
    old = {"a": torch.zeros(4, 6, dtype=torch.uint8), "b": torch.zeros(4, 6, dtype=torch.uint8)}
    new = {name: value.clone() for name, value in old.items()}
    new["a"][0, 0], new["b"][1, 1] = 1, 2
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    model = nn.Module()
    model.layer = Layer((8, 6), SWAP)
    with torch.no_grad():
        model.layer.weight.zero_()
    process(model)
    rows = {"a": ((0, 4), (0, 6)), "b": ((3, 7), (0, 6))}
    with pytest.raises(DeltaError, match=r"layer.weight: two tensors of the files lie in one place.*\n.*b"):
        apply_delta(model, delta, names=Places(inside={name: [("layer.weight", box)] for name, box in rows.items()}))
    assert not (model.layer.weight + 0).any()
    rows["b"] = ((4, 8), (0, 6))
    apply_delta(model, delta, names=Places(inside={name: [("layer.weight", box)] for name, box in rows.items()}))
    assert torch.equal(model.layer.weight + 0, torch.cat([new["a"], new["b"]]))
    alone = nn.Module()
    alone.w = nn.Parameter(old["a"].clone(), requires_grad=False)
    with pytest.raises(DeltaError, match="w: two tensors of the files lie in one place"):
        apply_delta(alone, delta, names={"a": "w", "b": "w"})
    assert not alone.w.any()


class Halves:
    """``q`` and ``k`` of the files are one tensor in the model, its rows in another order."""

    sources = ("q", "k")
    targets = ("layer.weight",)

    def revert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        q, k = tensors["layer.weight"].flip(0).chunk(2)
        return {"q": q, "k": k}

    def convert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"layer.weight": torch.cat([tensors["q"], tensors["k"]]).flip(0)}


@pytest.mark.parametrize("checksum", ["adler32", "xxh3-128"])
@pytest.mark.parametrize("full", [False, True])
def test_law_12_of_what_is_converted(checksum: str, full: bool, tmp_path: Path) -> None:
    old = {"q": tensors(1)["rows"], "k": tensors(2)["rows"]}
    new = changed(old, 0.1, 0)
    assert torch.equal(old["q"], new["q"]) != torch.equal(old["k"], new["k"])
    folder_of(tmp_path / "weight_v000001", old)
    trainer_writes(tmp_path / "weight_v000002", raw(old), raw(new), 2, "xor", checksum)
    model = nn.Module()
    model.layer = Layer((16, 6), SWAP)
    if not full:
        model.layer.weight.copy_(Halves().convert(old)["layer.weight"])
    process(model)
    with Chain(tmp_path, 0 if full else 1, 2) as chain:
        assert apply_delta(model, chain, names=Places(converted=(Halves(),))) == 2
    assert torch.equal(model.layer.weight + 0, Halves().convert(new)["layer.weight"])
    served = model.layer()
    with Chain(tmp_path, 1, 2) as chain, pytest.raises(DeltaError, match="the checksum of the new bytes differs"):
        apply_delta(model, chain, names=Places(converted=(Halves(),)))
    assert torch.equal(model.layer(), served)
