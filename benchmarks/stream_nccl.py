"""A weight stream from one GPU to another over NCCL, verified: ``python benchmarks/stream_nccl.py [--gib 4]``.

Without two GPUs, over gloo on the host (``--gib 0.05``). A damaged bucket is tried as well: the old weights stay.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from aliasparam import Alias, checkpoint_digest, declare, process, reload
from aliasparam.errors import AliasError
from aliasparam.reload import WeightStream, send_weights, stream

LINE = "(g b a) k -> g a b k, a=4 b=8"
ROWS, COLUMNS = 4096, 4096


def model_of(layers: int, device: str) -> nn.ModuleList:
    model = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8, device=device), requires_grad=False)
        declare(layer, Alias("weight", "prepared", LINE))
        model.append(layer)
    process(model)
    return model


def trained(layers: int, device: str, step: int) -> Iterator[tuple[str, Tensor]]:
    """The trainer's weights of a step, made as they are sent."""
    for number in range(layers):
        random = torch.Generator(device).manual_seed(1000 * step + number)
        values = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, device=device, generator=random)
        yield f"{number}.weight", values


def trainer(layers: int, device: str, options: argparse.Namespace) -> None:
    own = model_of(layers, device)
    for step in (1, 2):
        with reload(own) as r:
            r.load(trained(layers, device, step))
        started = time.perf_counter()
        sent = send_weights(((n, p.data) for n, p in own.named_parameters()), 1, bucket_bytes=options.bucket_mib << 20)
        seconds = time.perf_counter() - started
        print(f"step {step}: {sent / 2**30:.2f} GiB in {seconds:.3f} s, {sent / seconds / 1e9:.2f} GB/s, committed", flush=True)
        digests: list[Any] = [None, None]
        dist.all_gather_object(digests, checkpoint_digest(own).whole)
        print(f"  {'proved' if digests[0] == digests[1] else 'FAILED'}  the server's digest is the trainer's", flush=True)
    digest_of = stream.digest_of
    stream.digest_of = lambda memory, kind: digest_of(memory, kind)[::-1]
    try:
        send_weights(trained(layers, device, 3), 1, bucket_bytes=options.bucket_mib << 20)
    except AliasError as error:
        print(f"  proved  a damaged bucket is refused: {error.found.splitlines()[0]}", flush=True)
    dist.all_gather_object(digests, checkpoint_digest(own).whole)
    print(f"  {'proved' if digests[0] == digests[1] else 'FAILED'}  and the old weights serve", flush=True)


def server(layers: int, device: str, options: argparse.Namespace) -> None:
    model = model_of(layers, device)
    digests: list[Any] = [None, None]
    for step in (1, 2, 3):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            with WeightStream(0) as stream, reload(model, policy=options.policy, source="stream") as r:
                r.load(stream)
        except AliasError:
            assert step == 3
        if device == "cuda":
            peak = (torch.cuda.max_memory_allocated() - before) >> 20
            print(f"  device peak of step {step} above the model: {peak} MiB", flush=True)
        dist.all_gather_object(digests, checkpoint_digest(model).whole)


def run(rank: int, port: int, options: argparse.Namespace) -> None:
    nccl = torch.cuda.device_count() >= 2 and not options.host
    if nccl:
        torch.cuda.set_device(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl" if nccl else "gloo", rank=rank, world_size=2)
    layers = max(1, round(options.gib * 2**30 / (ROWS * COLUMNS)))
    if rank == 0:
        where = torch.cuda.get_device_name() if nccl else "CPU, gloo"
        print(f"torch {torch.__version__}, {where}, {layers} tensors of 16 MiB, {options.policy}", flush=True)
    (trainer if rank == 0 else server)(layers, "cuda" if nccl else "cpu", options)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--policy", default="journal")
    parser.add_argument("--host", action="store_true", help="gloo, also where there are GPUs")
    options = parser.parse_args()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(run, (port, options), nprocs=2)


if __name__ == "__main__":
    main()
