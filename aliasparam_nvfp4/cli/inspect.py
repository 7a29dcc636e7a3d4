"""``inspect``: what a checkpoint folder holds, whether it will load, and what it takes on a rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .guard import about
from .options import AsJson, Backend, Folder, Missing, Runner, need_backends
from .output import mib, progress, say, say_json, table

if TYPE_CHECKING:
    from .rank_memory import Part


def inspect(
    folder: Folder,
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    missing_input_scale: Missing = "refuse",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")] = 1,
    deep: Annotated[bool, typer.Option("--deep", help="Read all bytes: block scales, and the digest.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Memory of every layer, one copy against two (svg, png, pdf).")] = None,
    json: AsJson = False,
) -> None:
    """What a checkpoint holds, whether it will load, and its memory on a rank. Exit code 1 if it will not load, or
    not be divided among so many ranks."""
    need_backends(backend, moe_backend, missing_input_scale)
    if picture is not None:
        from .picture import need_format

        need_format(picture)
    found, parts = findings(
        folder, backend=backend, moe_backend=moe_backend, missing=missing_input_scale, tp=tp, ep=ep, deep=deep
    )
    if json:
        say_json(found)
    else:
        _show(found)
    if picture is not None and parts:
        from .picture import draw

        with about(picture):
            draw(parts, f"{folder.resolve().name}, TP={tp} EP={ep}, {backend} / {moe_backend}", picture)
        if not json:
            say(f"picture: {picture}")
    if found["will_load"] is False or (found["rank"]["refused"] and tp * ep > 1):
        raise typer.Exit(1)


def findings(
    folder: Path, *, backend: str, moe_backend: str, tp: int, ep: int, deep: bool, missing: str = "refuse"
) -> tuple[dict[str, Any], list[Part]]:
    """All that is known of a folder, and its layers' memory on a rank.

    Raises:
        CheckpointError: no NVFP4 checkpoint, or files that do not check.
    """
    from aliasparam.errors import AliasError

    from ..checkpoint import CheckpointFolder, QuantConfig
    from ..checkpoint.quant_config import read_json
    from .digest import folder_digest
    from .rank_memory import KVHeads, rank_memory, totals
    from .verdict import will_load

    config, tensors = QuantConfig.from_folder(folder), CheckpointFolder(folder)
    with progress() as bar:
        modules = {name.rpartition(".")[0] for name in tensors.tensors}
        scalars = bar.add_task("global scales", total=len(modules))
        on_module, how = (lambda: bar.advance(scalars)), {"backend": backend, "moe_backend": moe_backend, "missing": missing}
        verdict = will_load(folder, config, tensors, on_module, deep=deep, **how)
        if deep:
            bar.add_task("digest", total=None)
        digest = folder_digest(tensors)["digest"] if deep else None
    parts: list[Part] = []
    try:
        heads = KVHeads.of(read_json(folder / "config.json"))
        parts = rank_memory(config, tensors.tensors, tp=tp, ep=ep, backend=backend, moe_backend=moe_backend, kv_heads=heads)
        refused = None
    except AliasError as error:
        refused = str(error)
    found = {
        "folder": str(folder),
        "algorithm": config.algo,
        "group_size": config.group_size,
        "kv_cache": config.kv_cache_algo,
        "stored_by": config.tensors.name,
        "excluded": list(config.exclude),
        "tensors": _kinds(tensors),
        "will_load": verdict.loads,
        "reasons": list(verdict.reasons),
        "digest": digest,
        "rank": {"tp": tp, "ep": ep, "backend": backend, "moe_backend": moe_backend, "refused": refused},
        "memory": {what: {"one_copy": one, "two_copies": two} for what, (one, two) in totals(parts).items()} if parts else None,
    }
    return found, parts


def _kinds(folder: Any) -> list[dict[str, Any]]:
    """Tensors by the last part of their name and their dtype."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for entry in folder.tensors.values():
        key = (entry.name.rpartition(".")[2], str(entry.dtype).removeprefix("torch."))
        kinds.setdefault(key, []).append(entry.nbytes)
    return [{"name": n, "dtype": d, "tensors": len(sizes), "bytes": sum(sizes)} for (n, d), sizes in sorted(kinds.items())]


def _by_layer(modules: list[str]) -> list[str]:
    """One line for all layers: what differs in numbers alone comes once, with how many there are."""
    alike: dict[str, list[str]] = {}
    for name in modules:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return [names[0] if len(names) == 1 else f"{form} ({len(names)})" for form, names in alike.items()]


def _show(found: dict[str, Any]) -> None:
    from .verdict import Verdict

    kv = found["kv_cache"] or "unquantized"
    say(f"{found['folder']}: {found['algorithm']}, group size {found['group_size']}, KV cache {kv}")
    say(f"excluded modules: {', '.join(_by_layer(found['excluded'])) or 'none'}")
    rows = ((k["name"], k["dtype"], str(k["tensors"]), f"{k['bytes'] / (1 << 20):.2f}") for k in found["tensors"])
    table(("name", "dtype", "tensors", "MiB"), rows)
    say(str(Verdict(found["will_load"], tuple(found["reasons"]))))
    if found["digest"]:
        say(f"digest: {found['digest']}")
    rank = found["rank"]
    if rank["refused"]:
        say(f"memory on a rank (TP={rank['tp']}, EP={rank['ep']}): {rank['refused']}")
    if found["memory"]:
        say(f"weights on a rank (TP={rank['tp']}, EP={rank['ep']}, {rank['backend']} / {rank['moe_backend']}), no KV cache:")
        sizes = ((what, mib(m["one_copy"]), mib(m["two_copies"])) for what, m in found["memory"].items())
        table(("", "one copy", "two copies"), sizes)
