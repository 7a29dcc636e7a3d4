"""Delta folders applied to a live model, inside its kernel bytes.

While the old weights serve, what each tensor that the delta names would become is computed in scratch and digested: a wrong
base, a wrong order or a damaged delta is found before a byte is written. What differs is kept on the host as (position in kernel
memory, old byte, new byte). The commit writes the new bytes; an abort writes the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from .delta_folder import Chain, DeltaFolder, need_order
from .delta_held import Places
from .delta_parts import PartDigests
from .delta_patches import patches_of, patches_of_converted
from .errors import DeltaError
from .observe import Hooks
from .session import ReloadSession
from .sources import SafetensorsFolder


def apply_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain | str | Path,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | Places | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Bring a serving model to the version that ``delta`` makes, or leave it as it is; returns that version.

    The pause is the commit: it writes the bytes that differ, and computes what derives from them. Host memory: 6 bytes for each
    that differs, at most twice the tensor's; device scratch: a few pieces of 8 MiB.

    Args:
        model: of the version that the delta is based on.
        delta: a folder, opened or by path, or a chain of them, which may begin with a full version.
        serving: the version that serves now, if known: a delta on another one is refused before anything is read. (Of tensors
            that a delta does not name there is no checksum.)
        names: name in the folder -> name in the model; without it they are the same. Or :class:`Places`, where tensors are
            held in parts or converted.
        hooks: as for :func:`~aliasparam.reload.reload`.

    Raises:
        DeltaError: wrong version, order, names or checksums, or a malformed delta. The old weights serve.
        SourceError: files changed while they were read. The old weights serve.
        ReloadError: another reload is open.
        AliasError: processing refuses the new values. The old weights serve again.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(DeltaFolder(delta)) if isinstance(delta, (str, Path)) else delta
        with prepare_delta(model, opened, serving=serving, names=names, hooks=hooks) as session:
            session.commit()
        return version_of(opened, serving)


def prepare_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | Places | None = None,
    hooks: Hooks | None = None,
) -> ReloadSession:
    """A prepared session, all checksums verified; the old weights serve until it commits. Else as :func:`apply_delta`."""
    full, deltas = delta.full, delta.deltas
    need_order(deltas, None if full is not None else serving)
    places = names if isinstance(names, Places) else Places(names or {})
    digests = PartDigests(places)
    session = ReloadSession(model, "partial", "delta", "delta", hooks or Hooks())
    session.begin()
    try:
        if full is not None:
            _need_all(session, full, places)
        stored = dict.fromkeys([*(full.tensors if full is not None else ()), *(name for one in deltas for name in one.checksums)])
        for one in places.converted:
            if not stored.keys().isdisjoint(one.sources):
                session.patch(one.targets, lambda lives, one=one: patches_of_converted(one, lives, full, deltas))  # type: ignore[misc]
        apart = {*places.elsewhere, *(name for one in places.converted for name in one.sources)}
        for name in [name for name in stored if name not in apart]:
            for label, box in places.where(name):
                session.patch(
                    [label],
                    lambda lives, name=name, box=box: [patches_of(lives[0].under(box), name, full, deltas, digests)],  # type: ignore[misc]
                )
        digests.check(deltas)
        delta.check_unchanged()
        session.prepare()
    except BaseException:
        session.abort()
        raise
    return session


def version_of(delta: DeltaFolder | Chain, serving: int | None) -> int:
    """What the model is afterwards."""
    if delta.deltas:
        return delta.deltas[-1].version
    return serving or 0 if delta.full is None else int(delta.full.path.name.rpartition("_v")[2])


def _need_all(session: ReloadSession, full: SafetensorsFolder, places: Places) -> None:
    given = {places.here(name) for name in full.tensors} | {name for one in places.converted for name in one.targets}
    missing = sorted(session.expected.keys() - given)
    if missing:
        raise DeltaError("the full version lacks tensors", name=str(full.path), found="no " + ", ".join(missing[:5]))
