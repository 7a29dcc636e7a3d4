"""A trainer and servers as processes over gloo. What became of each is a file of JSON."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aliasparam import checkpoint_digest, checkpoint_state_dict, process, registry_of, reload
from aliasparam.errors import AliasError
from aliasparam.reload.stream import Link, WeightStream, send_weights

from .live_models import Whole, changed

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.3, 0), 0.3, 1)
BUCKETS = [16, 100, 5000, 1 << 20]
CHECKSUMS = ["adler32", "xxh3-128", "blake3"]
SECONDS = 3.0


def run(port: int, case: str, rank: int, ranks: int, path: str) -> None:
    store = dist.PrefixStore(case, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {"error": None}
    try:
        found |= TRAINERS.get(case, send)(ranks) if rank == 0 else SERVERS.get(case, serve)()
    except AliasError as error:
        found["error"] = str(error)
    Path(path).write_text(json.dumps(found))
    os._exit(0)  # a broken group is not waited for


# -- trainers ----------------------------------------------------------------------------------------------------------------


def send(ranks: int, tensors: Any = NEW, bucket_bytes: int = 100, **options: Any) -> dict[str, Any]:
    return {"sent": send_weights(tensors, range(1, ranks), bucket_bytes=bucket_bytes, seconds=SECONDS, **options)}


def send_in_every_bucket_size(ranks: int) -> dict[str, Any]:
    sizes = [send(ranks, NEW.items(), size, checksum=kind)["sent"] for size, kind in _ways()]
    return {"sent": sizes}


def _ways() -> Iterator[tuple[int, str]]:
    for number, size in enumerate(BUCKETS):
        yield size, CHECKSUMS[number % len(CHECKSUMS)]


def half_of(then: Callable[[], Any]) -> Callable[[int], dict[str, Any]]:
    """Send some tensors, then do something in the trainer's iterator."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(NEW.items()):
            if number == len(NEW) // 2:
                then()
            yield item

    return lambda ranks: send(ranks, tensors())


def _raises() -> None:
    raise AliasError("out of memory in the trainer")


def tampered(change: Callable[[str, dict[str, Any]], Any]) -> Callable[[int], dict[str, Any]]:
    """Every frame passes ``change`` before it is sent."""

    def send_tampered(ranks: int) -> dict[str, Any]:
        say = Link.say

        def changed_say(link: Any, frame: str, *peers: Any, **fields: Any) -> None:
            say(link, change(frame, fields) or frame, *peers, **fields)

        Link.say = changed_say  # type: ignore[method-assign]
        return send(ranks)

    return send_tampered


def _flipped(frame: str, fields: dict[str, Any]) -> None:
    if fields.get("number") == 3:
        fields["digest"] = fields["digest"][::-1]


def _again(frame: str, fields: dict[str, Any]) -> None:
    if fields.get("number") == 3:
        fields["number"] = 2


def _outside(frame: str, fields: dict[str, Any]) -> None:
    if fields.get("number") == 3:
        fields["tensors"] = [["norm", "F32", [999], None]]


def _early_end(frame: str, fields: dict[str, Any]) -> str | None:
    if fields.get("number") == 3:
        fields.clear()
        return "end"
    return None


def damaged_message(ranks: int) -> dict[str, Any]:
    encode = Link.say.__globals__["encode"]

    def broken(fields: dict[str, Any]) -> Tensor:
        message: Tensor = encode(fields)
        if fields.get("number") == 3:
            message[80] ^= 1
        return message

    Link.say.__globals__["encode"] = broken
    return send(ranks)


# -- servers -----------------------------------------------------------------------------------------------------------------


@contextmanager
def observed(model: Whole, found: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except AliasError as error:
        found["error"] = str(error)
    found["serves"] = None
    try:
        model()
        found["serves"] = checkpoint_digest(model).whole
    except AliasError:
        pass


def serve(model: Whole | None = None, **options: Any) -> dict[str, Any]:
    model, found = model or Whole(), {"error": None}
    with (
        observed(model, found),
        WeightStream(0, seconds=SECONDS, **options) as stream,
        reload(model, policy="journal", source="stream") as session,
    ):
        session.load(stream)
    return found


def serve_every_bucket_size() -> dict[str, Any]:
    found: dict[str, Any] = {"error": None, "serves": [], "memory": []}
    for _ in BUCKETS:
        model = Whole()
        with WeightStream(0, seconds=SECONDS) as stream, reload(model, source="stream") as session:
            for name, value, box in stream:
                session.update(name, value, box=box)
        model()
        found["serves"].append(checkpoint_digest(model).whole)
        found["memory"].append(stream._memory.numel())
    return found


def serve_one_and_refuse_on_another() -> dict[str, Any]:
    model = Whole()
    if dist.get_rank() == 2:
        del model.norm, model.tied
    return serve(model)


def serve_with_a_check() -> dict[str, Any]:
    model = Whole()
    registry = registry_of(model.padded)
    assert registry is not None

    def check(_: Any) -> None:
        if checkpoint_digest(Whole()).whole and not torch.equal(model.padded.scale + 0, OLD["padded.scale"]):
            raise AliasError("a bad scale")

    registry.checks.append(check)
    process(model)
    return serve(model)


def serve_with_an_old_answer() -> dict[str, Any]:
    say = Link.say

    def late(link: Any, frame: str, *args: Any, number: int) -> None:
        say(link, frame, *args, number=2 if number == 3 else number)

    Link.say = late  # type: ignore[method-assign, assignment]
    return serve()


def serve_and_stop() -> dict[str, Any]:
    model, found = Whole(), {"error": None}
    with observed(model, found), WeightStream(0, seconds=SECONDS) as stream, reload(model, policy="journal") as session:
        for number, (name, value, box) in enumerate(stream):
            session.update(name, value, box=box)
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
    return found


TRAINERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "every bucket size": send_in_every_bucket_size,
    "the trainer raises": half_of(_raises),
    "the trainer is killed": half_of(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "the trainer is late": half_of(lambda: time.sleep(2 * SECONDS)),
    "a damaged bucket": tampered(_flipped),
    "a bucket twice": tampered(_again),
    "an entry outside": tampered(_outside),
    "an early end": tampered(_early_end),
    "a damaged message": damaged_message,
    "too few tensors": lambda ranks: send(ranks, {"norm": NEW["norm"]}),
    "an unknown name": lambda ranks: send(ranks, {"norm": NEW["norm"], "nrom": NEW["norm"]}),
    "another shape": lambda ranks: send(ranks, {"norm": NEW["norm"][:4]}),
    "a dtype without a name": lambda ranks: send(ranks, {"norm": NEW["norm"].to(torch.complex128)}),
}
SERVERS: dict[str, Callable[[], dict[str, Any]]] = {
    "every bucket size": serve_every_bucket_size,
    "one of two refuses": serve_one_and_refuse_on_another,
    "a check refuses": serve_with_a_check,
    "an answer of before": serve_with_an_old_answer,
    "the server is killed": serve_and_stop,
    "a small receiver": lambda: serve(max_bucket_bytes=64),
}
