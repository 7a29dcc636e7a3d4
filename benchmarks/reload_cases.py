"""What ``reload.py`` reloads: a model of declared weights, its checkpoints and deltas, and other engines' ways in torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aliasparam import Alias, Derivation, checkpoint_names, declare, process
from aliasparam.reload.digest import PositionalAdler32, optional
from aliasparam.reload.held_file import memory_of
from aliasparam.reload.live import Live

#: TRT-LLM's row shuffle and the 128x4 swizzle of block scales.
WEIGHT = "(g b a) k -> g a b k, a=4 b=8"
SCALE = "(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4"
SHARD_BYTES = 2 << 30


class Model(nn.Module):
    """``layers`` of ``weight`` [rows, columns], block scales [rows, columns / 8], two globals and a norm."""

    def __init__(self, layers: int, rows: int, columns: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            for name, shape in (("weight", (rows, columns)), ("weight_scale", (rows, columns // 8))):
                layer.register_parameter(name, _parameter(torch.zeros(shape, dtype=torch.uint8, device=device)))
            layer.register_parameter("weight_scale_2", _parameter(torch.ones(1, device=device)))
            layer.register_parameter("input_scale", _parameter(torch.ones(1, device=device)))
            layer.register_parameter("norm", _parameter(torch.ones(columns, dtype=torch.bfloat16, device=device)))
            declare(
                layer,
                Alias("weight", "weight_prepared", WEIGHT),
                Alias("weight_scale", "weight_scale_prepared", SCALE),
                Derivation("alpha", ("weight_scale_2", "input_scale"), torch.mul, (1,), torch.float32),
            )
            self.layers.append(layer)
        process(self)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def values_of(model: Model, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random bytes and scales under the model's names, on the host."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.dtype is torch.uint8:
            words = torch.randint(-(1 << 62), 1 << 62, (tensor.numel() // 8,), generator=random)
            yield name, words.view(torch.uint8).view(tensor.shape)
        else:
            yield name, torch.rand(tensor.shape, generator=random).to(tensor.dtype) + 0.5


def write_folder(folder: Path, model: Model, seed: int) -> Path:
    """A checkpoint in shards, as exporters write it."""
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    held = 0

    def close() -> None:
        nonlocal shard, held
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard, held = {}, 0

    for name, value in values_of(model, seed):
        shard[name] = value
        held += value.nbytes
        if held >= SHARD_BYTES:
            close()
    if shard:
        close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_delta(folder: Path, model: nn.Module, share: float, version: int) -> int:
    """The delta that changes ``share`` of the bytes of every large tensor of the live model; how many bytes those are."""
    folder.mkdir(parents=True)
    zstd, step, changed = optional("zstandard").ZstdCompressor(level=1), round(1 / share), 0
    frames: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    for name, tensor in checkpoint_names(model).items():
        live = Live(tensor)
        if live.nbytes < 1 << 16:
            continue
        count = live.nbytes // step
        at = torch.arange(count, device=live.device) * step + torch.randint(0, step, (count,), device=live.device)
        new, sums = torch.empty(count, dtype=torch.uint8, device=live.device), PositionalAdler32()
        for start, piece in live.pieces(64 << 20):
            first, last = torch.searchsorted(at, torch.tensor([start, start + piece.numel()], device=live.device)).tolist()
            new[first:last] = piece[at[first:last] - start] ^ 5
            sums.add(piece.index_put((at[first:last] - start,), new[first:last]), start)
        raw = (
            struct.pack("<I", count) + bytes(memory_of(at.to(torch.int32).cpu().view(torch.uint8))) + bytes(memory_of(new.cpu()))
        )
        frames[name] = torch.frombuffer(bytearray(zstd.compress(raw)), dtype=torch.uint8)
        checksums[name] = sums.hexdigest(live.nbytes)
        changed += count
    save_file(frames, folder / "model-00000.safetensors", metadata=checksums)
    fields = {"delta_encoding": "overwrite", "compression_format": "zstd", "checksum_format": "adler32"}
    fields |= {"version": f"{version:06d}", "base_version": f"{version - 1:06d}"}
    index = {"metadata": fields, "weight_map": dict.fromkeys(frames, "model-00000.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return changed


def forget_cached(folder: Path) -> None:
    """Let the next read come from the disk: the kernel drops what it holds of the files."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


# -- other engines -----------------------------------------------------------------------------------------------------------

Prepare = Callable[[Tensor], Tensor]


def shuffled(weight: Tensor) -> Tensor:
    """Of ``[rows, columns]``, as engines' scripts do it: a row table and one gather into a new tensor."""
    rows = torch.arange(weight.shape[0], device=weight.device).view(-1, 8, 4).transpose(1, 2).reshape(-1)
    return weight.index_select(0, rows)


def swizzled(scale: Tensor) -> Tensor:
    rows, columns = scale.shape
    return scale.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).contiguous().view(rows, columns)


_PREPARE: dict[str, Prepare] = {"weight": shuffled, "weight_scale": swizzled}


class TwoCopies:
    """A serving model in two formats: checkpoint tensors, and what kernels read, at addresses that a graph holds."""

    def __init__(self, like: Model, *, keeps_checkpoint: bool) -> None:
        self.kernel = {n: torch.empty(p.shape, dtype=p.dtype, device=p.device) for n, p in like.named_parameters()}
        self.checkpoint = {n: torch.empty_like(t) for n, t in self.kernel.items()} if keeps_checkpoint else {}

    def load_in_place(self, values: dict[str, Tensor]) -> None:
        """SGLang: every tensor into its checkpoint parameter, then process_weights_after_loading of all modules once more."""
        for name, value in values.items():
            self.checkpoint[name].copy_(value)
        for name, value in self.checkpoint.items():
            prepare = _PREPARE.get(name.rpartition(".")[2])
            self.kernel[name].copy_(prepare(value) if prepare else value)

    def load_layerwise(self, values: dict[str, Tensor]) -> None:
        """vLLM's layerwise reload: fresh tensors, filled and processed, and their results copied into the old storage."""
        for name, value in values.items():
            fresh = torch.empty_like(self.kernel[name])
            fresh.copy_(value)
            prepare = _PREPARE.get(name.rpartition(".")[2])
            self.kernel[name].copy_(prepare(fresh) if prepare else fresh)
