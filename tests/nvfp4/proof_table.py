"""The backends' table in docs/nvfp4/backends.md, made from the backends: ``python -m tests.nvfp4.proof_table`` writes it."""

from __future__ import annotations

from pathlib import Path

from aliasparam_nvfp4.backends import LinearBackend, linear_backends

DOCS = Path(__file__).parents[2] / "docs" / "nvfp4" / "backends.md"
_BEGIN, _END = "<!-- backends: begin -->", "<!-- backends: end -->"


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
    ours = "runs in the test-suite"
    return [
        f"`{backend.name}`",
        where or ("8.0 and later" if backend.name.startswith("triton") else "any device"),
        backend.layout.name,
        "as they are" if backend.weight_only else "quantized",
        call,
        "yes",
        "yes",
        "yes" if flashinfer else ours,
        "command; not run on Blackwell" if flashinfer else "runs here" if backend.name == "reference" else "ran on Hopper",
    ]


def write() -> None:
    text = DOCS.read_text()
    head, _, rest = text.partition(_BEGIN)
    DOCS.write_text(f"{head}{_BEGIN}\n{render()}\n{_END}{rest.partition(_END)[2]}")


if __name__ == "__main__":
    write()
