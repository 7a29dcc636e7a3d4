"""A trainer's stream over gloo, between real processes: what arrives, and what serves after everything that can break it."""

from __future__ import annotations

import json
import multiprocessing
import re
import zlib
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from aliasparam import checkpoint_digest
from aliasparam.reload import CheckpointDigest, stream_link
from aliasparam.reload.errors import StreamError
from aliasparam.reload.stream_link import MESSAGE_BYTES, Part, decode, encode, parts_of

from . import folders, stream_process
from .live_models import Whole
from .stream_process import BUCKETS, NEW


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """The trainer's: from its own tensors, by zlib."""
    digests = ((n, t.dtype, t.shape, f"{zlib.adler32(folders.plain(t)):08x}") for n, t in tensors.items())
    return CheckpointDigest.of("adler32", digests).whole


OLD_SERVES = checkpoint_digest(Whole()).whole
NEW_SERVES = digest(NEW)

#: Case -> (the trainer's error, the server's error; None: there is none, "-": it was killed). The server keeps the old weights.
BROKEN: dict[str, tuple[str | None, str | None]] = {
    "the trainer raises": ("out of memory in the trainer", "the trainer gave up.*AliasError: out of memory"),
    "the trainer is killed": ("-", "cannot (send to|receive from) rank 0"),
    "the trainer is late": ("cannot (send to|receive from) rank 1", "cannot (send to|receive from) rank 0.*within 3 s"),
    "a damaged bucket": ("rank 1 refused the weights.*a bucket is damaged", "rank 0, bucket 3: a bucket is damaged"),
    "a bucket twice": ("rank 1 refused", "rank 0, bucket 3: a bucket is missing or came twice"),
    "an entry outside": ("rank 1 refused", r"bucket 3: a bucket's entry is not one.*norm"),
    "an early end": ("cannot send to|rank 1 refused", r"ends with something else.*after 3 buckets.*'end' after None"),
    "a damaged message": ("cannot (send to|receive from) rank 1", "rank 0: a message of the stream is damaged"),
    "too few tensors": ("rank 1 refused the weights.*ReloadError", "tensors did not arrive whole"),
    "an unknown name": ("rank 1 refused", "nrom: the model has no tensor of this name"),
    "another shape": ("rank 1 refused", "norm: the new tensor does not fit"),
    "a dtype without a name": ("not sent", "the trainer gave up.*not sent"),
    "a check refuses": ("rank 1 refused.*.*a bad scale", "a bad scale"),
    "an answer of before": ("rank 1 refused.*an answer to frame 2 in the place of one to 3", "cannot receive from rank 0"),
    "the server is killed": ("cannot (send to|receive from) rank 1", "-"),
    "a small receiver": ("cannot send to rank 1", r"bucket 0: the bucket is larger.*at most 64"),
}


@pytest.fixture(scope="module")
def became(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any] | None]:
    """What every process of every case found, (case, rank): None where it was killed."""
    folder = tmp_path_factory.mktemp("streams")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.aliasparam.reload.stream_process", "tests.aliasparam.reload.rank_process"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    ranks = {**dict.fromkeys(BROKEN, 2), "every bucket size": 2, "one of two refuses": 3}
    path = {(case, rank): folder / f"{number}-{rank}" for number, case in enumerate(ranks) for rank in range(ranks[case])}
    running = [
        context.Process(target=stream_process.run, args=(store.port, case, rank, ranks[case], str(file)))
        for (case, rank), file in path.items()
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    return {key: json.loads(file.read_text()) if file.exists() else None for key, file in path.items()}


Became = dict[tuple[str, int], dict[str, Any] | None]


def test_law_9_what_is_streamed_serves_in_every_bucket_size(became: Became) -> None:
    trainer, server = became["every bucket size", 0], became["every bucket size", 1]
    total = sum(tensor.nbytes for tensor in NEW.values())
    assert trainer is not None and trainer["sent"] == [total] * len(BUCKETS), trainer
    assert server is not None and server["serves"] == [NEW_SERVES] * len(BUCKETS), server
    assert all(memory <= bucket for memory, bucket in zip(server["memory"], BUCKETS, strict=True)), server


@pytest.mark.parametrize("case", BROKEN)
def test_law_10_a_broken_stream_leaves_the_old_weights(case: str, became: Became) -> None:
    for rank, expected in enumerate(BROKEN[case]):
        found = became[case, rank]
        if expected == "-":
            assert found is None
            continue
        assert found is not None and re.search(expected or "^None$", str(found["error"]), re.DOTALL), found
        if rank == 1:
            assert found["serves"] == OLD_SERVES, found


def test_two_receivers_are_told_and_each_keeps_its_old_weights(became: Became) -> None:
    trainer, one, two = (became["one of two refuses", rank] for rank in range(3))
    assert trainer is not None and one is not None and two is not None
    assert "rank 2 refused the weights" in trainer["error"]
    assert "the trainer gave up" in one["error"] and one["serves"] == OLD_SERVES
    assert "norm: the model has no tensor of this name" in two["error"]


def test_messages_are_of_one_size_and_sealed() -> None:
    message = encode({"frame": "end", "buckets": 3})
    assert message.numel() == MESSAGE_BYTES and decode(message, "here") == {"frame": "end", "buckets": 3}
    for place in (0, 63, 64, 80):
        message = encode({"frame": "end", "buckets": 3})
        message[place] ^= 1
        with pytest.raises(StreamError, match="here: a message of the stream is damaged"):
            decode(message, "here")


@pytest.mark.parametrize("why", ["文" * 900, "\U0001f600" * 900, "\1" * 900, '"' * 900, "file \udc80" + "x" * 900])
def test_whatever_a_receiver_says_is_an_answer_of_one_size(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(stream_link.dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(stream_link.dist, "isend", lambda memory, peer, group: sent.append(memory) or nullcontext)
    monkeypatch.setattr(nullcontext, "wait", lambda deadline: None, raising=False)
    link = stream_link.Link((1,), None, 1.0)
    link.say("refused", [1], why)
    link.say("gave up", [1], why)
    assert [memory.numel() for memory in sent] == [MESSAGE_BYTES, MESSAGE_BYTES]
    for memory in sent:
        said = decode(memory, "here")["why"]
        assert len(said) > 200 and why.encode(errors="replace").decode().startswith(said)


GOOD = [Part("v", torch.uint8, (3,)), Part("w", torch.int16, (2, 6), (1, 0), 16)]


@pytest.mark.parametrize(
    "change",
    [
        None, [], "w", ["w", "I16", [2, 2]], ["w", "I16", [2, 2], None, 0], [1, "I16", [2, 2], None], ["w", "i16", [2, 2], None],
        ["w", ["I16"], [2, 2], None], ["w", "I16", [2, -2], None], ["w", "I16", [2, True], None], ["w", "I16", 4, None],
        ["w", "I16", [2, 2], [0]], ["w", "I16", [2, 2], [0, -1]], ["w", "I16", [2, 2], [0, 0.0]], ["w", "I16", [2, 2], 0],
        ["w", "I16", [2, 2], [0, 0, 0]], ["w", "I16", [2, 2], [[0, 2], [0, 2]]],
        ["w", "I16", [5, 6], None], ["w", "I16", [1 << 63, 0], None], ["w", "I16", [1 << 40, 0, 1 << 40], None],
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_refused(change: Any) -> None:
    good = json.loads(json.dumps([part.fields() for part in GOOD]))
    frame = {"bytes": 40, "tensors": good}
    assert parts_of(frame, "here") == GOOD and parts_of({"bytes": 40, "tensors": []}, "here") == []
    with pytest.raises(StreamError, match="here: a bucket's entry is not one"):  # the second ends at 40
        parts_of({**frame, "bytes": 39}, "here")
    for entries in ([change], [*good, change], change):
        if entries == []:
            continue
        with pytest.raises(StreamError, match="here: a bucket's entry is not one"):
            parts_of({**frame, "tensors": entries}, "here")
