"""What a reload costs, by source and policy, beside other engines' ways: ``python benchmarks/reload.py [--device cuda]``.

On a GPU ``--gib 100`` is the size of the declared weights under a delta; the other tables take ``--table-gib`` of host memory
twice. Needs torch, safetensors, rich, zstandard. ``--json FILE`` keeps every figure.

pause: the model refuses, or an engine of this kind must not run. held: what the policy keeps on the host. host, device: peak of
resident memory above the begin (page cache apart), and of the allocator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from reload_cases import Model, TwoCopies, forget_cached, values_of, write_delta, write_folder
from reload_measure import Meter, Row
from safetensors.torch import load_file
from torch import Tensor, nn

from aliasparam import Alias, checkpoint_digest, checkpoint_names, declare, process, reload
from aliasparam.reload import ReloadSession, prepare_delta
from aliasparam.reload.delta_folder import DeltaFolder
from aliasparam.reload.live import Live, flat_bytes
from aliasparam.reload.observe import Hooks
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.sources import SafetensorsFolder

_MIB = 1 << 20


class Bench(Meter):
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(options.device)
        self.options, self.folder = options, folder

    # -- sessions ------------------------------------------------------------------------------------------------------

    def session(self, what: str, policy: PolicyName, model: nn.Module, load: Callable[[ReloadSession], None], **how: Any) -> Row:
        """One reload from begin to end; written values refuse from their first write, staged ones from the commit on."""
        row = Row(what, policy, 0, 0, 0, 0, 0, 0)

        def holds(session: ReloadSession) -> None:
            row.held = session._policy.nbytes

        with self.peaks(row):
            session = reload(model, policy=policy, hooks=Hooks(on_commit=[holds]), **how)
            begun = self.now()
            session.begin()
            opened = self.now()
            load(session)
            session.prepare()
            ready = self.now()
            session.commit()
            ended = self.now()
        refusing = ready if policy.startswith("staged") else opened
        row.prepare, row.pause, row.nbytes = refusing - begun, ended - refusing, session.observed.bytes
        return row

    def delta(self, what: str, model: nn.Module, folder: Path) -> Row:
        row = Row(what, "delta", 0, 0, 0, 0, 0, sum(p.numel() * p.element_size() for p in model.parameters()))
        with self.peaks(row), DeltaFolder(folder) as opened:
            begun = self.now()
            session = prepare_delta(model, opened)
            ready = self.now()
            row.held = session._policy.nbytes
            session.commit()
            ended = self.now()
        row.prepare, row.pause = ready - begun, ended - ready
        return row

    # -- tables --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        where = torch.cuda.get_device_name() if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        self.figures["where"] = f"torch {torch.__version__}, {where}"
        self.console.print(self.figures["where"])
        self.policies()
        self.names()
        if self.cuda:
            torch.cuda.empty_cache()
        self.large_delta()

    def policies(self) -> None:
        model = self.model(self.options.table_gib)
        self.console.print(f"{len(model.layers)} layers, {model.nbytes / 2**30:.2f} GiB of declared weights")
        a, b = (write_folder(self.folder / name, model, seed) for name, seed in (("a", 1), ("b", 2)))
        values = {"a": dict(values_of(model, 1)), "b": dict(values_of(model, 2))}
        self.session("", "write-through", model, lambda s: s.load(values["a"]))  # plans are made, memory is touched
        rows = []
        for policy in get_args(PolicyName):
            rows.append(self.session("state dict", policy, model, lambda s: s.load(values["b"])))
            rows.append(self.session("folder", policy, model, lambda s: load_folder(s, a, self.cuda)))
        near = {name: _few_changed(value, self.options.share) for name, value in values["a"].items()}
        changed = f"state dict, {self.options.share:.1%} new"
        rows.append(self.session(changed, "journal", model, lambda s: s.load(near)))
        write_delta(self.folder / "delta", model, self.options.share, 1)
        rows.append(self.delta(f"delta, {self.options.share:.1%} new", model, self.folder / "delta"))
        rows += self.peers(model, values)
        self.show("Source and policy", rows)
        self.one_percent()
        self.pinned_rate(model)
        self.disk(model, {"a": a, "b": b})
        self.digest(model)

    def peers(self, model: Model, values: dict[str, dict[str, Tensor]]) -> list[Row]:
        rows = []
        for what, keeps in (("in place, then all processed (SGLang)", True), ("fresh, processed, copied back (vLLM)", False)):
            engine = TwoCopies(model, keeps_checkpoint=keeps)
            load = engine.load_in_place if keeps else engine.load_layerwise
            load(values["a"])
            row = Row(what, "-", 0, 0, None, None, None, model.nbytes)
            with self.peaks(row):
                begun = self.now()
                load(values["b"])
                row.pause = self.now() - begun
            if keeps and row.device is not None:
                row.device += sum(tensor.nbytes for tensor in engine.checkpoint.values())  # the second copy, there all the time
            rows.append(row)
            del engine, load
        return rows

    def one_percent(self) -> None:
        """Of 400 layers four, whose values are one layer's: what a partial reload costs in proportion, and per session."""
        model = self.model(layers=400)
        one = {name.removeprefix("layers.0."): value for name, value in values_of(self.model(layers=1), 1)}
        values = {f"layers.{number}.{name}": value for number in range(400) for name, value in one.items()}
        scope = [f"layers.{number}" for number in range(4)]
        part = {name: value for name, value in values.items() if ".".join(name.split(".")[:2]) in scope}
        whole = [self.session("", "write-through", model, lambda s: s.load(values)) for _ in range(5)]
        some = [self.session("", "write-through", model, lambda s: s.load(part), scope=scope) for _ in range(5)]
        pauses, sums = ([statistics.median(of(row) for row in rows) for rows in (some, whole)] for of in (_pause, _sum))
        text = (
            f"1% of {model.nbytes / 2**30:.1f} GiB costs {pauses[0] / pauses[1]:.2%} of the pause, {sums[0] / sums[1]:.2%} of all"
        )
        self.say("part of the tensors", text, share=0.01, pauses=pauses, seconds=sums)

    def pinned_rate(self, model: Model) -> None:
        """The pass of a staged commit beside copies of pinned memory, piece by piece: of this model, and of one of experts."""
        if not self.cuda:
            return
        experts = self.model(self.options.table_gib, experts=True)
        landing = torch.empty(64 * _MIB, dtype=torch.uint8, device=self.device)
        pinned = torch.empty(64 * _MIB, dtype=torch.uint8, pin_memory=True)
        copy = self.seconds(lambda: [landing.copy_(pinned, non_blocking=True) for _ in range(32)]) / 32 / 64 / _MIB
        for kind, one in (("dense layers", model), ("experts", experts)):
            values = dict(values_of(one, 1))
            pauses = [self.session("", "staged", one, lambda s, v=values: s.load(v)).pause for _ in range(3)]  # type: ignore[misc]
            rate, pause = 1 / copy, statistics.median(pauses)
            text = (
                f"{one.nbytes / pause / 1e9:.1f} GB/s, {one.nbytes / pause / rate:.2f} of pinned copies ({rate / 1e9:.1f} GB/s)"
            )
            self.say(f"staged commit, {kind}", text, seconds=pause, nbytes=one.nbytes, pinned_bytes_per_second=rate)

    def disk(self, model: Model, folders: dict[str, Path]) -> None:
        """Ours and load_file + copy in turn, files in the page cache, and dropped from it."""
        plain = {n: torch.empty(p.shape, dtype=p.dtype, device=p.device) for n, p in model.named_parameters()}

        def peer(folder: Path) -> None:
            for file in sorted(folder.glob("*.safetensors")):
                for name, value in load_file(file).items():
                    plain[name].copy_(value)

        def ours(folder: Path) -> None:
            with reload(model, source="folder") as session:
                load_folder(session, folder, self.cuda)

        for cache, drop in (("page cache", False), ("disk", True)):
            seconds: dict[str, list[float]] = {"ours": [], "peer": []}
            for number in range(6):
                folder = folders["ab"[number % 2]]
                for name, load in (("ours", ours), ("peer", peer)):
                    if drop:
                        forget_cached(folder)
                    begun = self.now()
                    load(folder)
                    seconds[name].append(self.now() - begun)
            mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "peer"))
            text = f"{model.nbytes / mine / 1e9:.2f} GB/s, {theirs / mine:.2f} of load_file + copy"
            self.say(f"{cache} to device", text, seconds=mine, load_file_and_copy=theirs, nbytes=model.nbytes)

    def digest(self, model: nn.Module) -> None:
        lives = [Live(tensor) for tensor in checkpoint_names(model).values()]
        memories = [flat_bytes(one.tensor if one.storage is None else one.storage.elements) for one in lives]
        words = [memory[: memory.numel() // 8 * 8].view(torch.int64) for memory in memories]
        read = self.seconds(lambda: [word.sum() for word in words])
        total = sum(memory.numel() for memory in memories)
        for kind in self.options.digests:
            mine = self.seconds(lambda kind=kind: checkpoint_digest(model, kind), 3)  # type: ignore[misc]
            text = f"{total / mine / 1e9:.2f} GB/s, {read / mine:.2f} of reading ({total / read / 1e9:.0f} GB/s)"
            self.say(f"digest {kind}", text, seconds=mine, read=read, nbytes=total)

    def names(self) -> None:
        model = nn.ModuleList()
        for _ in range(4500):
            layer = nn.Module()
            for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                layer.register_parameter(name, nn.Parameter(torch.zeros(8, 8, device=self.device), requires_grad=False))
            declare(layer, Alias("weight", "prepared", "(h r) k -> r h k, h=2"))
            model.append(layer)
        process(model)
        sessions = [reload(model, scope="partial") for _ in range(3)]

        def begin() -> None:
            session = sessions.pop()
            session.begin()
            session.abort()

        seconds = self.seconds(begin, 3)
        self.say("names of 18000 tensors", f"{seconds:.3f} s from begin to abort", seconds=seconds)

    def large_delta(self) -> None:
        model, share = self.model(self.options.gib, experts=self.cuda), self.options.share
        random = torch.Generator(self.device).manual_seed(0)
        for layer in model.layers:
            for name in ("weight_prepared", "weight_scale_prepared"):
                memory = layer.get_buffer(name)
                memory.view(-1).view(torch.int64).random_(generator=random)
            for name in ("weight", "weight_scale"):
                layer.get_parameter(name)._alias_storage.accept()  # type: ignore[attr-defined]
        process(model)
        changed = write_delta(self.folder / "large", model, share, 1)
        before = checkpoint_digest(model).whole
        row = self.delta(f"{changed / _MIB:.1f} MiB of {model.nbytes / 2**30:.1f} GiB", model, self.folder / "large")
        self.show("Delta", [row])
        self.say(
            "delta",
            f"pause {row.pause:.4f} s; the digest is another one: {checkpoint_digest(model).whole != before}",
            **asdict(row),
        )

    def model(self, gib: float = 0, *, layers: int = 0, experts: bool = False) -> Model:
        """``experts``: layers as large as w13 of one rank of Kimi-K2.5 at TP 4."""
        rows, columns = (384 * 1024, 3584) if experts else (8192, 4096) if self.cuda else (1024, 1024)
        return Model(layers or max(1, round(gib * 2**30 / (rows * columns * 9 / 8))), rows, columns, self.device)


def load_folder(session: ReloadSession, folder: Path, pinned: bool) -> None:
    """Piece by piece through one buffer."""
    buffer = torch.empty(64 * _MIB, dtype=torch.uint8, pin_memory=pinned)
    with SafetensorsFolder(folder) as opened:
        names = list(opened.tensors)
        for index, box, value in opened.stream([(name, None) for name in names], buffer):
            session.update(names[index], value, box=box)
        opened.check_unchanged()


def _pause(row: Row) -> float:
    return row.pause


def _sum(row: Row) -> float:
    return row.prepare + row.pause


def _few_changed(value: Tensor, share: float) -> Tensor:
    new = value.clone()
    if new.dtype is torch.uint8:
        new.view(-1)[:: round(1 / share)] ^= 5
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--gib", type=float, default=32 if cuda else 0.06, help="declared weights under the large delta")
    parser.add_argument("--table-gib", type=float, default=4 if cuda else 0.06, help="declared weights of the tables")
    parser.add_argument("--share", type=float, default=0.003, help="of the bytes that a delta changes")
    parser.add_argument("--digests", nargs="*", default=["adler32"])
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written; a temporary folder without")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        bench.run()
    if options.json is not None:
        options.json.write_text(json.dumps(bench.figures, indent=1))


if __name__ == "__main__":
    main()
