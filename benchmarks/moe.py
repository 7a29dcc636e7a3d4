"""Decode of mixture-of-experts layers: our `triton` runner, FlashInfer's cuTile kernel and the memory, in one run:
``python benchmarks/moe.py``.

Every timing replays a CUDA graph that goes through several choices of experts, so that the weights of one call are not in the L2
cache for the next. cuTile is left out where its compiler is not installed. All results are held against float64 first.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.errors import BackendError
from aliasparam_nvfp4.quantize.codec import dequantize
from benchmarks.linear import copy_bandwidth, microseconds

#: (what, E, H, I of one rank, k, tokens).
SHAPES = (
    ("32 experts", 32, 2048, 768, 8, (8,)),
    ("Qwen3-30B, whole", 128, 2048, 768, 8, (1, 8, 32)),
    ("Qwen3-30B, TP=4", 128, 2048, 192, 8, (1, 8)),
    ("Kimi-K2.5, TP=4", 384, 7168, 512, 8, (1, 8)),
)
RUNNERS = ("triton", "flashinfer_cutile")
_ROUTINGS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", nargs="+", default=list(RUNNERS))
    options = parser.parse_args()
    console = Console(width=140)
    bandwidth = copy_bandwidth()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {bandwidth:.0f} GB/s (read and write)\n")
    table = Table(
        "layer", "E", "H", "I", "tokens", "experts used", "MB read", "runner", "µs", "GB/s", "of copy", "relative error"
    )
    for what, e, h, i, k, batches in SHAPES:
        tensors = random_experts(e, h, i)
        for runner in options.runner:
            try:
                method, layer = loaded(runner, tensors, e, h, i)
            except BackendError as error:
                console.print(f"{runner}: {error}")
                continue
            for tokens in batches:
                x, weights, routings = choices(tokens, e, h, k)
                calls = [partial(method.apply, layer, x, weights, ids) for ids in routings]
                wrong = relative_error(calls[0](), tensors, x, weights, routings[0])
                used = sum(len(torch.unique(ids)) for ids in routings) / len(routings)
                nbytes = used * 3 * h * i * 9 / 16
                try:
                    took, note = microseconds(calls, 2), ""
                except RuntimeError:  # not capturable
                    took, note = eager_microseconds(calls), " (no graph)"
                rate = nbytes / took / 1e3
                figures = (f"{took:.1f}{note}", f"{rate:.0f}", f"{rate / bandwidth:.2f}", f"{wrong:.4f}")
                table.add_row(what, str(e), str(h), str(i), str(tokens), f"{used:.1f}", f"{nbytes / 1e6:.1f}", runner, *figures)
            del method, layer
        del tensors
    console.print(table)


def random_experts(e: int, h: int, i: int) -> dict[str, torch.Tensor]:
    """Checkpoint tensors on the GPU, with outputs of about 1."""
    tensors: dict[str, torch.Tensor] = {
        "w13_input_scale": torch.ones(e, 2, device="cuda"),
        "w2_input_scale": torch.ones(e, device="cuda"),
    }
    for name, rows, columns in (("w13", 2 * i, h), ("w2", h, i)):
        tensors[f"{name}_weight"] = torch.randint(0, 256, (e, rows, columns // 2), dtype=torch.uint8, device="cuda")
        scale = torch.randint(0x30, 0x40, (e, rows, columns // 16), dtype=torch.uint8, device="cuda")
        tensors[f"{name}_weight_scale"] = scale.view(torch.float8_e4m3fn)
        shape = (e, 2) if name == "w13" else (e,)
        tensors[f"{name}_weight_scale_2"] = torch.full(shape, 0.4 / columns**0.5, device="cuda")
    return tensors


def loaded(runner: str, tensors: dict[str, torch.Tensor], e: int, h: int, i: int) -> tuple[NvFp4MoEMethod, Any]:
    method, layer = NvFp4MoEMethod(runner), torch.nn.Module()
    if (reason := method.backend.unavailable(torch.device("cuda"))) is not None:
        raise BackendError("this runner cannot run here", name=runner, found=reason)
    with torch.device("cuda"):
        method.create_weights(layer, e, h, i, torch.bfloat16)
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)
    method.process_weights_after_loading(layer)
    return method, layer


def choices(tokens: int, e: int, h: int, k: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(x, weights, several choices of experts)."""
    x = torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(tokens, k, device="cuda")
    routings = [torch.stack([torch.randperm(e, device="cuda")[:k] for _ in range(tokens)]).int() for _ in range(_ROUTINGS)]
    return x, weights / weights.sum(-1, keepdim=True), routings


def relative_error(
    found: torch.Tensor, tensors: dict[str, torch.Tensor], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> float:
    """Against float64 from the checkpoint's tensors, for the first two tokens."""
    expected = torch.zeros(min(2, len(x)), x.shape[1], dtype=torch.float64, device="cuda")
    for t, row in enumerate(x[:2].double()):
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            w13 = dequantize(
                tensors["w13_weight"][e], tensors["w13_weight_scale"][e], tensors["w13_weight_scale_2"][e, 0]
            ).double()
            w2 = dequantize(tensors["w2_weight"][e], tensors["w2_weight_scale"][e], tensors["w2_weight_scale_2"][e]).double()
            gate, up = (w13 @ row).chunk(2)
            expected[t] += weight * (w2 @ (torch.nn.functional.silu(gate) * up))
    return float((found[:2].double() - expected).norm() / expected.norm())


def eager_microseconds(calls: list[Any], rounds: int = 10) -> float:
    """Mean of calls in a row, host time included."""
    for call in calls:
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(rounds):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end) * 1e3 / rounds / len(calls))


if __name__ == "__main__":
    main()
