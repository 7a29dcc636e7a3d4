"""Experts read from a checkpoint folder: both spellings, one clear error for what does not fit, own byte ranges alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aliasparam.errors import AliasError, StaleKernelError
from aliasparam_nvfp4.checkpoint import CheckpointError, CheckpointFolder, ExpertTensorName, expert_layers
from aliasparam_nvfp4.errors import ScaleError, ShapeError
from aliasparam_nvfp4.moe import ExpertRanks, load_experts

from .moe_layers import Checkpoint, MoE, checkpoint, choices, load, names

E, H, I = 4, 64, 128  # noqa: E741
LAYER = "model.layers.0.mlp.experts"
SPELLINGS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def write(folder: Path, tensors: Checkpoint, *, spelled: bool = True) -> CheckpointFolder:
    folder.mkdir(exist_ok=True)
    spelling = SPELLINGS if spelled else {s: s for s in SPELLINGS}
    save_file({f"{LAYER}.{e}.{spelling[s]}.{suffix}": t for (e, s, suffix), t in tensors.items()}, folder / "model.safetensors")
    return CheckpointFolder(folder)


def of(how: str, rank: int, size: int) -> MoE:
    if how == "tp":
        return MoE("reference", E, H, I // size, tp_rank=rank, tp_size=size)
    return MoE("reference", E // size, H, I, ep_rank=rank, ep_size=size)


@pytest.mark.parametrize("spelled", [True, False])
@pytest.mark.parametrize("how, size", [("tp", 1), ("tp", 2), ("tp", 4), ("ep", 2), ("ep", 4)])
def test_a_rank_reads_its_own_bytes_alone_and_holds_what_the_weight_loader_gives(
    how: str, size: int, spelled: bool, tmp_path: Path
) -> None:
    tensors = checkpoint(E, H, I)
    matrices = sum(t.nbytes for (_, _, suffix), t in tensors.items() if suffix in ("weight", "weight_scale"))
    for rank in range(size):
        folder = write(tmp_path / "a", tensors, spelled=spelled)
        read, expected = of(how, rank, size), of(how, rank, size)
        load(expected, tensors)

        load_experts(read.method, read, folder, LAYER)

        assert names(read) == names(expected)
        # Each scalar is read twice: once to be checked before anything is written.
        own = E if how == "tp" else E // size
        assert folder.bytes_read == matrices // size + 2 * 4 * 3 * (own + E)


@pytest.mark.parametrize("how", ["tp", "ep"])
def test_bytes_of_other_ranks_may_be_anything(how: str, tmp_path: Path) -> None:
    tensors, spoiled = checkpoint(E, H, I), checkpoint(E, H, I)
    for (expert, shard, suffix), tensor in spoiled.items():
        if suffix not in ("weight", "weight_scale"):
            continue
        if how == "ep":
            tensor.view(torch.uint8).fill_(0xFF) if expert >= E // 2 else None
        else:
            dim = 1 if shard == "w2" else 0
            tensor.view(torch.uint8).narrow(dim, tensor.shape[dim] // 2, tensor.shape[dim] // 2).fill_(0xFF)
    read, expected = of(how, 0, 2), of(how, 0, 2)
    load(expected, tensors)

    load_experts(read.method, read, write(tmp_path / "a", spoiled), LAYER)

    assert names(read) == names(expected)


def test_a_reload_from_a_folder_keeps_addresses_and_comes_back(tmp_path: Path) -> None:
    a, b = (write(tmp_path / tag, checkpoint(E, H, I, seed)) for seed, tag in enumerate("ab"))
    layer, inputs = of("tp", 1, 2), choices(5, E, H)
    load_experts(layer.method, layer, a, LAYER)
    first, where = layer(*inputs), {n: t.data_ptr() for n, t in layer.named_buffers()}

    load_experts(layer.method, layer, b, LAYER)
    assert not torch.equal(layer(*inputs), first)
    load_experts(layer.method, layer, a, LAYER)

    assert torch.equal(layer(*inputs), first)
    assert {n: t.data_ptr() for n, t in layer.named_buffers()} == where


Spoil = Callable[[dict[str, Tensor]], object]
W1 = f"{LAYER}.2.gate_proj"


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [n for n in tensors if n.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


def no_product(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("input_scale") or name == f"{W1}.weight_scale_2":
            tensor.fill_(1e-25)


BAD: dict[str, tuple[Spoil, type[AliasError], str]] = {
    "an expert is missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{LAYER}.1.")], CheckpointError, "expert 1 is missing"),
    "an expert too many": (
        lambda t: rename(t, f"{LAYER}.3.", f"{LAYER}.4."), CheckpointError, "expert 4 is unexpected: the model has 4"),
    "an expert twice": (lambda t: t.update({f"{LAYER}.2.w1.weight": t[f"{W1}.weight"].clone()}), CheckpointError, "twice"),
    "a tensor is missing": (lambda t: t.pop(f"{W1}.weight_scale"), CheckpointError, "expert 2 lacks w1 weight_scale"),
    "a tensor too many": (lambda t: t.update({f"{W1}.bias": torch.ones(I)}), CheckpointError, f"unexpected: {W1}.bias"),
    "mixed dtypes": (
        lambda t: t.update({f"{W1}.weight": torch.ones(I, H, dtype=torch.bfloat16)}), CheckpointError,
        "different dtypes of w1 weight: expert 0 uint8, expert 1 uint8, expert 2 bfloat16"),
    "a wrong shape": (lambda t: t.update({f"{W1}.weight": t[f"{W1}.weight"][:-1].clone()}), CheckpointError, f"{W1}.weight: exp"),
    "a scale that is none": (lambda t: t[f"{W1}.input_scale"].fill_(0), ScaleError, f"{W1}.input_scale"),
    "scales whose product is none": (no_product, ScaleError, "what a kernel multiplies with is not a scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_experts_are_one_clear_error_and_the_layer_still_answers(case: str, tmp_path: Path) -> None:
    poison, kind, message = BAD[case]
    good = write(tmp_path / "good", checkpoint(E, H, I))
    layer, inputs = of("tp", 0, 1), choices(5, E, H)
    load_experts(layer.method, layer, good, LAYER)
    first, held = layer(*inputs), names(layer)
    tensors = {n: good.read(n) for n in good.tensors}
    poison(tensors)
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")

    with pytest.raises(kind) as error:
        load_experts(layer.method, layer, CheckpointFolder(tmp_path / "bad"), LAYER)

    assert message in str(error.value)
    assert torch.equal(layer(*inputs), first)
    assert names(layer) == held


def test_scales_of_gate_and_up_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", checkpoint(E, H, I, untied=True))
    layer = MoE("flashinfer_cutlass", E, H, I)

    with pytest.raises(ScaleError, match="gate and up"):
        load_experts(layer.method, layer, folder, LAYER)
    load_experts(of("tp", 0, 1).method, MoE("reference", E, H, I), folder, LAYER)


def test_a_failure_half_way_refuses_until_it_is_loaded_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", checkpoint(E, H, I))
    layer = of("tp", 0, 1)
    load_experts(layer.method, layer, folder, LAYER)

    def stop(_: int) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        load_experts(layer.method, layer, folder, LAYER, on_bytes=stop)
    with pytest.raises(StaleKernelError):
        layer(*choices(5, E, H))
    load_experts(layer.method, layer, folder, LAYER)
    layer(*choices(5, E, H))


def test_names_are_taken_apart_and_others_left_alone() -> None:
    name = ExpertTensorName.parse("model.layers.3.block_sparse_moe.experts.11.w2.weight_scale_2")
    assert name is not None
    assert (name.layer, name.key) == ("model.layers.3.block_sparse_moe.experts", (11, "w2", "weight_scale_2"))
    for other in ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.shared_expert.up_proj.weight", "experts.1.w4.weight",
                  "model.layers.3.mlp.experts.gate_up_proj"):  # fmt: skip
        assert ExpertTensorName.parse(other) is None


def test_an_unknown_layer_is_named(tmp_path: Path) -> None:
    layer = of("tp", 0, 1)
    with pytest.raises(CheckpointError, match=r"no experts of this name"):
        load_experts(layer.method, layer, write(tmp_path / "a", checkpoint(E, H, I)), "model.layers.9.mlp.experts")


@pytest.mark.parametrize("rows, columns", [(slice(3, 9), slice(None)), (slice(None), slice(2, 5)), (slice(1, 4), slice(0, 2))])
def test_a_part_of_a_tensor_is_the_slice_of_it(rows: slice, columns: slice, tmp_path: Path) -> None:
    whole = torch.arange(12 * 8, dtype=torch.int32).view(12, 8)
    save_file({"t": whole, "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    folder = CheckpointFolder(tmp_path)

    assert torch.equal(folder.read("t", rows, columns), whole[rows, columns])
    assert folder.bytes_read == whole[rows, columns].nbytes
    pieces = list(folder.chunks("t", 40, rows=rows, columns=columns))
    assert torch.equal(torch.cat([piece for _, piece in pieces]), whole[rows, columns])
    assert [first for first, _ in pieces] == list(range(0, len(whole[rows]), len(pieces[0][1])))
    for bad in ((slice(0, 13), slice(None)), (slice(None), slice(7, 9)), (slice(0, 4, 2), slice(None))):
        with pytest.raises(CheckpointError, match="does not have these"):
            folder.read("t", *bad)
    with pytest.raises(CheckpointError, match="does not have these rows"):
        folder.read("scalar", slice(0, 1))


def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ShapeError, match="no such tp rank"):
        ExpertRanks(tp_rank=2, tp_size=2)
    assert ExpertRanks(ep_size=2, tp_size=4).divided(8, 256) == (4, 64)
    with pytest.raises(ShapeError, match="experts cannot be divided"):
        ExpertRanks(ep_size=3).divided(8, 256)
    with pytest.raises(ShapeError, match="blocks of 16"):
        ExpertRanks(tp_size=4).divided(8, 96)


def test_layers_are_found_in_both_spellings(tmp_path: Path) -> None:
    for spelled in (True, False):
        (found,) = expert_layers(write(tmp_path / str(spelled), checkpoint(E, H, I), spelled=spelled).tensors).values()
        assert found.layer == LAYER
        assert len(list(found.projections())) == 3 * E
