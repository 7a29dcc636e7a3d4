"""Law 12: a delta of ``b`` on ``a`` makes a model of ``a`` one of ``b``; back again, ``a``; a wrong one, nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam import (
    Alias,
    Derivation,
    apply_delta,
    checkpoint_digest,
    checkpoint_state_dict,
    declare,
    process,
    registry_of,
    reload,
)
from aliasparam.errors import AliasError, ReloadError, StaleKernelError
from aliasparam.layout.bound import BoundLayout, flat_bytes
from aliasparam.reload import delta as deltas
from aliasparam.reload import delta_held, digest_of_folder, patch, prepare_delta
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.digest import sums_of_run
from aliasparam.reload.errors import DeltaError
from aliasparam.reload.live import Live
from aliasparam.reload.observe import Hooks
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam.testing import same_bytes
from aliasparam.testing._faults import FailingAt, Fault

from ..small import Layer
from .delta_cases import trainer_writes
from .live_models import Few, Whole, changed, folder_of, raw, same


def cold(kind: type[Whole], values: dict[str, Tensor]) -> list[Tensor]:
    model = kind()
    model.load_state_dict(values, strict=False)
    process(model)
    return model()


A = checkpoint_state_dict(Whole())
B = changed(A, 0.05, 0)
C = changed(B, 0.6, 1)
SERVED = {"a": cold(Whole, A), "b": cold(Whole, B), "c": cold(Whole, C)}


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", ["adler32", "xxh3-128", "blake3"])
@pytest.mark.parametrize("piece", [24, 8 << 20])
def test_law_12_there_and_back(
    encoding: str, checksum: str, piece: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_held, "PIECE", piece)
    monkeypatch.setattr(patch, "JOINED", 2 * piece)
    there = trainer_writes(tmp_path / "b", raw(A), raw(B), 1, encoding, checksum, files=2)
    back = trainer_writes(tmp_path / "a", raw(B), raw(A), 2, encoding, checksum)
    model = Whole(device)
    before = checkpoint_digest(model)
    addresses = [buffer.data_ptr() for buffer in model.buffers()]

    assert apply_delta(model, there, serving=0) == 1
    assert same(model(), SERVED["b"]) and raw(checkpoint_state_dict(model)) == raw(B)
    assert apply_delta(model, back) == 2
    assert same(model(), SERVED["a"]) and checkpoint_digest(model) == before
    assert addresses == [buffer.data_ptr() for buffer in model.buffers()]


@given(share=st.sampled_from([0.001, 0.03, 0.5, 1.0]), seed=st.integers(0, 99), encoding=st.sampled_from(["xor", "overwrite"]))
def test_law_12_whatever_changes(share: float, seed: int, encoding: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    new = changed(A, share, seed)
    model = Whole()
    apply_delta(model, trainer_writes(tmp_path_factory.mktemp("d") / "v", raw(A), raw(new), 1, encoding, "adler32"))
    assert raw(checkpoint_state_dict(model)) == raw(new) and same(model(), cold(Whole, new))


def published(source: Path) -> Path:
    """Versions 1 (full, b), 2 (a delta to c), 3 (a delta to a)."""
    folder_of(source / "weight_v000001", B)
    trainer_writes(source / "weight_v000002", raw(B), raw(C), 2, "xor", "xxh3-128")
    trainer_writes(source / "weight_v000003", raw(C), raw(A), 3, "overwrite", "adler32")
    return source


@pytest.mark.parametrize(("applied", "target", "served"), [(0, 1, "b"), (0, 2, "c"), (0, 3, "a"), (1, 3, "a"), (2, 2, "c")])
def test_law_12_a_chain_is_one_commit(applied: int, target: int, served: str, device: torch.device, tmp_path: Path) -> None:
    model, commits = Whole(device), []
    base = {0: A, 1: B, 2: C}[applied]
    model.load_state_dict(base, strict=False)
    process(model)
    with Chain(published(tmp_path), applied, target) as chain:
        version = apply_delta(model, chain, serving=applied, hooks=Hooks(on_commit=[commits.append]))
    with Chain(tmp_path, target, target) as nothing:
        assert apply_delta(model, nothing) == target
    assert version == target and len(commits) == 1
    assert same(model(), SERVED[served])


def test_law_12_a_delta_leads_out_of_a_reload_that_failed_also_where_the_new_bytes_are_there_already(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = changed(changed(old, 0.3, 0), 0.3, 1)
    folder_of(tmp_path / "weight_v000001", new)
    session = reload(model)
    session.begin()
    session.update("weight", new["weight"])
    session.abort()
    with pytest.raises(StaleKernelError):
        model(torch.ones(4))
    with Chain(tmp_path, 0, 1) as chain:
        assert apply_delta(model, chain) == 1
    model(torch.ones(4))
    assert raw(model.state_dict()) == raw(new)


@given(
    shares=st.lists(st.sampled_from([0.01, 0.08, 0.3]), min_size=2, max_size=4),
    pieces=st.sampled_from([7, 64, 1 << 20]),
    ahead=st.sampled_from([1, 5, 1 << 18]),
    encodings=st.lists(st.sampled_from(["xor", "overwrite"]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=10)
def test_law_12_deltas_of_the_same_bytes_one_after_another(
    shares: list[float], pieces: int, ahead: int, encodings: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, states = tmp_path_factory.mktemp("d"), [A]
    for version, (share, encoding) in enumerate(zip(shares, encodings, strict=False), 1):
        states.append(changed(states[-1], share, 2 * (seed + version)))  # the same tensors each time
        trainer_writes(source / f"weight_v{version:06d}", raw(states[-2]), raw(states[-1]), version, encoding, "adler32")
    model = Whole()
    with pytest.MonkeyPatch.context() as patched, Chain(source, 0, len(shares)) as chain:
        patched.setattr(delta_held, "PIECE", pieces)
        patched.setattr(deltas, "_POSITIONS", ahead)
        apply_delta(model, chain, serving=0)
    assert raw(checkpoint_state_dict(model)) == raw(states[-1]) and same(model(), cold(Whole, states[-1]))


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("right", [True, False])
def test_where_a_tensor_is_summed_in_its_place_that_alone_is_read_which_changes(
    encoding: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; the sums are those of the bytes, corrected for the pieces that change, or for single bytes."""
    read: list[int] = []
    monkeypatch.setattr(delta_held, "PIECE", 512)
    monkeypatch.setattr(Live, "positional_sums", lambda live: sums_of_run(flat_bytes(live.part(live.box) + 0)))
    layer = Layer((256, 512))
    old = checkpoint_state_dict(layer)
    new = {"weight": old["weight"].clone()}
    new["weight"][17, 3:40] ^= 5
    new["weight"][200, 7] ^= 1
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, encoding, "adler32")
    if not right:
        with torch.no_grad():
            layer.weight[99, 4] ^= 1
        process(layer)
    gathered = Live.bytes
    monkeypatch.setattr(Live, "bytes", lambda live, box: read.append(box[0][0]) or gathered(live, box))
    with contextlib.nullcontext() if right else pytest.raises(DeltaError, match="the checksum of the new bytes differs"):
        apply_delta(layer, delta)
    assert read == ([17, 200] if encoding == "xor" else []) and (not right or same_bytes(layer.weight, new["weight"]))


WRONG = {
    "the base": ("c", "a", 1, "xor", "the checksum of the new bytes differs"),
    "the base, overwritten": ("c", "a", 1, "overwrite", "the checksum of the new bytes differs"),
    "the version": ("a", "b", 5, "xor", "applies to another version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_law_12_a_wrong_delta_changes_nothing_that_serves(case: str, tmp_path: Path) -> None:
    old, new, version, encoding, message = WRONG[case]
    values = {"a": A, "b": B, "c": C}
    delta = trainer_writes(tmp_path / "d", raw(values[old]), raw(values[new]), version, encoding, "adler32")
    model = Whole()
    versions = [p._version for p in model.buffers()]
    if case == "the base, overwritten":  # other bytes beside those that are overwritten
        model.load_state_dict({**A, "padded.weight": A["padded.weight"] ^ 64, "norm": A["norm"] + 1}, strict=False)
        process(model)
    served = model()
    with pytest.raises(DeltaError, match=message):
        apply_delta(model, delta, serving=0)
    assert same(model(), served)
    if case != "the base, overwritten":
        assert versions == [p._version for p in model.buffers()]
    apply_delta(Whole(), trainer_writes(tmp_path / "e", raw(A), raw(B), 1, "xor", "adler32"))


def test_names_of_the_folder_and_of_the_model(tmp_path: Path) -> None:
    theirs = {f"model.{name}": value for name, value in A.items()}
    new = {f"model.{name}": value for name, value in B.items()}
    delta = trainer_writes(tmp_path / "d", raw(theirs), raw(new), 1, "xor", "adler32")
    model = Whole()
    with pytest.raises(ReloadError, match="no tensor of this name"):
        apply_delta(model, delta)
    apply_delta(model, delta, names={name: name.removeprefix("model.") for name in theirs})
    assert same(model(), SERVED["b"])


def test_law_10_processing_refuses_and_the_old_weights_serve_again(tmp_path: Path) -> None:
    def alpha(scale: Tensor) -> Tensor:
        if scale.max() > 9:
            raise ValueError("a bad scale")
        return scale.max().reshape(1)

    layer = nn.Module()
    layer.scale = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    layer.weight = nn.Parameter(torch.arange(48.0).view(6, 8), requires_grad=False)
    declare(
        layer, Derivation("alpha", ("scale",), alpha, (1,), torch.float32), Alias("weight", "prepared", "(h r) k -> r h k, h=2")
    )
    process(layer)
    old, model = checkpoint_state_dict(layer), layer
    new = {"scale": torch.tensor([1.0, 20.0]), "weight": old["weight"] + 1}
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    prepared, before = model.get_buffer("prepared").clone(), checkpoint_digest(model)
    with pytest.raises(AliasError, match="a bad scale"):
        apply_delta(model, delta)
    assert checkpoint_digest(model) == before and torch.equal(model.get_buffer("prepared"), prepared)
    assert model.get_buffer("alpha").tolist() == [2.0]


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_the_old_weights_serve_until_the_commit_and_after_a_switch_can_come_back(encoding: str, tmp_path: Path) -> None:
    delta = trainer_writes(tmp_path / "d", raw(A), raw(B), 1, encoding, "adler32")
    model = Whole()
    with DeltaFolder(delta) as opened:
        session = prepare_delta(model, opened)
    assert same(model(), SERVED["a"])
    session.switch()
    with pytest.raises(AliasError):
        model()
    session.abort()
    assert same(model(), SERVED["a"]) and checkpoint_digest(model) == checkpoint_digest(Whole())

    with DeltaFolder(delta) as opened:
        session = prepare_delta(model, opened)
    with torch.no_grad():
        model.padded.weight[0, 0, 0] += 1
    with pytest.raises(ReloadError, match="changed since the delta was checked"):
        session.commit()
    session.abort()


def test_after_a_commit_that_failed_no_position_of_another_layout_is_written(tmp_path: Path) -> None:
    layer, fails = Layer((32, 8)), [True]
    old = checkpoint_state_dict(layer)
    new = {"weight": old["weight"].clone()}
    new["weight"][3, 2] ^= 5
    registry = registry_of(layer)
    assert registry is not None

    def check(_: object) -> None:
        if fails:
            raise ValueError("not now")

    registry.checks.append(check)
    session = prepare_delta(layer, trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32"))
    with pytest.raises(ValueError, match="not now"):
        session.commit()
    registry.retarget({"weight": "(a b) k -> b a k, a=8"})
    fails.clear()
    with pytest.raises(ReloadError, match="changed since the delta was checked"):
        session.commit()
    with pytest.raises(ReloadError, match="cannot bring the old weights back"):
        session.abort()


@pytest.mark.parametrize("other", ["value", "layout"])
def test_law_12_what_changes_while_a_commit_waits_for_forwards_is_not_patched(other: str, tmp_path: Path) -> None:
    model = Few()
    old = checkpoint_state_dict(model)
    new = changed(changed(old, 0.1, 0), 0.1, 1)
    session = prepare_delta(model, trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32"))
    close, registry = session.drain.close, registry_of(model.wide)
    assert registry is not None

    def slow(*args: Any) -> None:
        close(*args)
        if other == "value":
            model.wide.weight[0, 0] += 1
        else:
            registry.retarget({"weight": None})

    session.drain.close = slow  # type: ignore[method-assign]
    with pytest.raises(ReloadError, match="changed since the delta was checked"):
        session.commit()
    session.abort()
    expected = {**old, "wide.weight": old["wide.weight"].clone()}
    expected["wide.weight"][0, 0] += other == "value"
    assert raw(checkpoint_state_dict(model)) == raw(expected)


def test_law_10_the_kth_operator_fails(tmp_path: Path) -> None:
    old = checkpoint_state_dict(Few())
    new = changed(changed(old, 0.05, 0), 0.9, 1)
    served = {"old": cold(Few, old), "new": cold(Few, new)}
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    found = {"old": 0, "new": 0}
    for k in itertools.count(step=3):
        model, faults = Few(), FailingAt(k)
        with contextlib.suppress(Fault, AliasError), faults:
            apply_delta(model, delta)
        left = "old" if raw(checkpoint_state_dict(model)) == raw(old) else "new"
        assert same(model(), served[left]), f"operator {k} ({faults.failed})"
        if not faults.failed:
            break
        found[left] += 1
    assert left == "new" and found["old"] > 30 and found["new"] == 0, found


def test_law_10_a_commit_that_failed_at_the_kth_operator_may_be_called_again(tmp_path: Path) -> None:
    old = checkpoint_state_dict(Few())
    new = changed(changed(old, 0.3, 0), 0.3, 1)
    delta = trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")
    for k in itertools.count():
        model, faults = Few(), FailingAt(k)
        session = prepare_delta(model, delta)
        with contextlib.suppress(Fault, AliasError), faults:
            session.commit()
        if not faults.failed:
            break
        session.commit()
        assert raw(checkpoint_state_dict(model)) == raw(new), f"operator {k} ({faults.failed})"
    assert k > 30


def test_cost_follows_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit touches the bytes that differ: it reads and writes no box, and holds 6 bytes for each."""
    layer = Layer((256, 512))
    old = checkpoint_state_dict(layer)
    new = {"weight": old["weight"].clone()}
    new["weight"][17, 3:40] ^= 5
    with DeltaFolder(trainer_writes(tmp_path / "d", raw(old), raw(new), 1, "xor", "adler32")) as delta:
        session = prepare_delta(layer, delta)
    assert session._policy.nbytes == 6 * 37
    with monkeypatch.context() as during:
        for name in ("read", "write"):
            during.setattr(type(_bound(layer)), name, lambda *_: pytest.fail("a box was moved"))
        session.commit()
    assert same_bytes(layer.weight, new["weight"])


def _bound(layer: Layer) -> BoundLayout:
    bound: BoundLayout = layer.weight._alias_storage.bound
    return bound


def test_what_this_package_writes(tmp_path: Path) -> None:
    with SafetensorsFolder(folder_of(tmp_path / "a", A)) as a, SafetensorsFolder(folder_of(tmp_path / "b", B)) as b:
        diff(a, b, tmp_path / "delta", 1, 0, encoding="overwrite", checksum_format="blake3")
        model = Whole()
        apply_delta(model, tmp_path / "delta")
        assert checkpoint_digest(model) == digest_of_folder(b) != digest_of_folder(a)
    assert patch.PIECE == delta_held.PIECE


@pytest.mark.parametrize("checksum", ["adler32", "xxh3-128"])
@pytest.mark.parametrize("agrees", [True, False])
def test_law_12_tensors_in_one_memory_are_all_that_was_promised_or_none(agrees: bool, checksum: str, tmp_path: Path) -> None:
    """Each fits its checksum by itself; together they may be neither."""
    model, memory = nn.Module(), torch.arange(12.0)
    model.a, model.b = (nn.Parameter(part, requires_grad=False) for part in (memory[:8], memory[4:]))
    old, new = {"a": memory[:8].clone(), "b": memory[4:].clone()}, memory + 1
    changed_to = {"a": new[:8], "b": new[4:] if agrees else old["b"] + torch.arange(8).eq(7)}
    folder = trainer_writes(tmp_path / "b", raw(old), raw(changed_to), 1, "xor", checksum)
    with contextlib.nullcontext() if agrees else pytest.raises(ReloadError, match="others for a"):
        apply_delta(model, folder, serving=0)
    assert torch.equal(memory, new if agrees else torch.arange(12.0))


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_law_12_a_buffer_that_is_a_view_of_its_conjugate(encoding: str, device: torch.device, tmp_path: Path) -> None:
    """torch conjugates and negates when it reads: the bytes in memory are others than those of the values."""
    model = nn.Module()
    values = torch.arange(8.0, device=device).view(torch.complex64)
    model.register_buffer("conjugated", values.conj())
    model.register_buffer("negated", values.clone().conj().imag)
    old = {name: value.resolve_conj().resolve_neg().cpu() for name, value in model.state_dict().items()}
    new = {name: value.clone() for name, value in old.items()}
    for value in new.values():
        value[1] += 1
    apply_delta(model, trainer_writes(tmp_path / "v", raw(old), raw(new), 1, encoding, "adler32"))
    assert all(torch.equal(model.state_dict()[name].cpu(), value) for name, value in new.items())


def test_law_12_a_folder_is_given_by_its_path_too(tmp_path: Path) -> None:
    """Its files are closed again, before the commit of a delta too."""
    model, held = Whole(), len(os.listdir("/proc/self/fd"))
    session = prepare_delta(model, str(trainer_writes(tmp_path / "b", raw(A), raw(B), 1, "xor", "adler32")))
    assert len(os.listdir("/proc/self/fd")) == held
    session.commit()
    assert checkpoint_digest(model) == digest_of_folder(folder_of(tmp_path / "whole", B))
    assert len(os.listdir("/proc/self/fd")) == held
