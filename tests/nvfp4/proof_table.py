"""The tables of backends and of MoE runners in docs/nvfp4/, made from them: ``python -m tests.nvfp4.proof_table`` writes both."""

from __future__ import annotations

from pathlib import Path

from aliasparam_nvfp4.linear.backends import LinearBackend, linear_backends
from aliasparam_nvfp4.moe.activation import RELU2
from aliasparam_nvfp4.moe.runners import MoERunner, moe_runners
from aliasparam_nvfp4.moe.scales import InputScales

from .proofs import PROOFS

DOCS = Path(__file__).parents[2] / "docs" / "nvfp4" / "backends.md"
MOE_DOCS = DOCS.with_name("moe.md")
_MARK = "<!-- {name}: {edge} -->"
#: Linear backends whose kernel has run, and where (docs/gpu.md). The others have a command that will.
LINEAR_RAN = {
    "reference": "runs here",
    "triton": "ran on Hopper",
    "triton_shuffled": "ran on Hopper",
    "triton_w4a4": "ran on Hopper",
}
#: MoE runners whose kernel has run on a GPU, and where. The others have a command that will.
RAN = {"flashinfer_cutile": "ran on Hopper", "triton": "ran on Hopper"}
#: What is compared with FlashInfer's own ``prepare_*`` as a whole, besides its index functions.
WHOLE_PREPARATION = ("trtllm", "trtllm_routed", "cutedsl", "b12x", "cutile", "cutile_sm12x")


def render() -> str:
    lines = [
        "| backend | runs on | kernel format | activations | call | (a) bytes | (b) emulator | (c) call | (d) verify |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_rank = sorted(linear_backends().values(), key=lambda b: -b.rank)
    return "\n".join([*lines, *("| " + " | ".join(_cells(backend)) + " |" for backend in by_rank)])


def _cells(backend: LinearBackend) -> list[str]:
    where = ", ".join(f"{major}.{minor}" for major, minor in sorted(backend.capabilities))
    flashinfer = backend.call in ("mm_fp4", "mm_bf16_fp4")
    kernel = getattr(backend, "kernel", "")
    call = f'`{backend.call}(backend="{kernel}")`' if flashinfer else f"`{backend.call}`"
    proofs = proofs_of(backend)
    return [
        f"`{backend.name}`",
        where or ("8.0 and later" if backend.name.startswith("triton") else "any device"),
        backend.layout.name,
        "as they are" if backend.weight_only else "quantized",
        call,
        "yes" if proofs["bytes"] else "",
        "yes" if proofs["emulator"] else "",
        "runs in the test-suite" if proofs["runs"] else "yes" if proofs["call"] else "",
        LINEAR_RAN.get(backend.name, "command; not run on its GPU"),
    ]


def proofs_of(backend: LinearBackend) -> dict[str, list[str]]:
    """Kind of proof to the tests which the suite runs on this backend: importing them records what they cover (see proofs.py)."""
    from . import test_accuracy, test_backend_calls, test_backends

    assert test_accuracy and test_backend_calls and test_backends
    return {kind: covered.get(backend.name, []) for kind, covered in PROOFS.items()}


def render_moe() -> str:
    lines = [
        "| runner | runs on | w13 rows | padded to (H, I) | block scales | activations | gate and up scales | call | (a) bytes "
        "| (b) emulator | (c) call | (d) verify |",
        "|" + "---|" * 12,
    ]
    by_rank = sorted(moe_runners().values(), key=lambda r: (-r.rank, r.name))
    return "\n".join([*lines, *("| " + " | ".join(_moe_cells(runner)) + " |" for runner in by_rank)])


_ROWS = {
    "checkpoint": ("the checkpoint's", "row-major"),
    "row-major": ("gate, up", "row-major"),
    "gate-up": ("gate, up", "128x4"),
    "up-gate": ("up, gate", "128x4"),
    "up-gate-256": ("up, gate", "128x4"),
    "interleaved": ("64 of up, 64 of gate in turn", "128x4"),
    "shuffled": ("pairs (up, gate), shuffled", "shuffled, 128x4"),
}
_ACTIVATIONS = {
    InputScales.ONE: "one scale for all experts",
    InputScales.DIVIDING: "one scale for all experts",
    InputScales.EACH: "a scale for each expert",
    InputScales.NONE: "as they are (W4A16)",
}


def _moe_cells(runner: MoERunner) -> list[str]:
    rows, scales = _ROWS.get(runner.layout.name, (runner.layout.name, ""))
    flashinfer = runner.name.startswith("flashinfer_")
    whole = runner.name.removeprefix("flashinfer_") in WHOLE_PREPARATION
    where = ", ".join(f"{major}.{minor}" for major, minor in sorted(runner.capabilities))
    return [
        f"`{runner.name}`",
        where or ("8.0 and later" if runner.name == "triton" else "any device"),
        rows,
        f"{runner.layout.hidden}, {runner.layout.intermediate}" if runner.layout.hidden > 1 else "",
        scales,
        _ACTIVATIONS[runner.input_scales],
        "may differ" if runner.separate_scales else "equal, or refused",
        f"`{runner.call}`",
        ("index functions, preparation" if whole else "index functions") if flashinfer else "",
        "bytes and layer",
        "yes" if flashinfer else "runs in the test-suite",
        RAN.get(runner.name, "command; not run" if runner.capabilities else "runs here"),
    ]


def render_activations() -> str:
    lines = ["| runner | SwiGLU with numbers | its numbers | `relu2` | I in whole, without a gate | biases |", "|" + "---|" * 6]
    for runner in sorted(moe_runners().values(), key=lambda r: (-r.rank, r.name)):
        relu2 = runner.refusal(RELU2) is None
        ungated = runner.layout.of(RELU2).intermediate if relu2 else None
        cells = [
            f"`{runner.name}`",
            "refused" if runner.swiglu_numbers is None else "yes",
            "" if runner.swiglu_numbers is None else runner.swiglu_numbers.value,
            "yes" if relu2 else "refused",
            "16s" if ungated == 1 else f"{ungated}s" if ungated else "",
            "refused" if runner.biases is None else "of raw sums" if runner.biases.raw else "of true values",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write() -> None:
    for page, name, table in (
        (DOCS, "backends", render()),
        (MOE_DOCS, "runners", render_moe()),
        (MOE_DOCS, "activations", render_activations()),
    ):
        begin, end = (_MARK.format(name=name, edge=edge) for edge in ("begin", "end"))
        text = page.read_text()
        head, _, rest = text.partition(begin)
        page.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    write()
