"""A trainer in a process of its own: rank 0 of SGLang's group of weight updates, which broadcasts folders in buckets.

``python -m tests.engines.sglang.trainer PORT RANKS FOLDER...``; of the last folder it leaves the last bucket out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

SIZE = 40


def buckets(folder: Path) -> list[list[tuple[str, Tensor]]]:
    """The tensors of a folder, some at a time; the last ones are of experts, of which none may be missing."""
    tensors = sorted(load_file(folder / "model.safetensors").items(), key=lambda item: ".experts." in item[0])
    return [tensors[first : first + SIZE] for first in range(0, len(tensors), SIZE)]


def main(port: str, ranks: str, *folders: str) -> None:
    import torch.distributed as dist
    from sglang.srt.utils import init_custom_process_group
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    group = init_custom_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=1 + int(ranks), rank=0, group_name="trainer")
    for number, folder in enumerate(folders, 1):
        found = buckets(Path(folder))
        for bucket in found[:-1] if number == len(folders) else found:
            dist.broadcast(FlattenedTensorBucket(named_tensors=bucket).get_flattened_tensor(), src=0, group=group)
    dist.barrier(group=group)


if __name__ == "__main__":
    main(*sys.argv[1:])
