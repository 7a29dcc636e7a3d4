"""Deltas of tensors that are others in the model: brought back to what the files say, changed, verified, converted again.

Memory: the tensors of one conversion, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .delta_cursor import Digest
from .delta_folder import DeltaFolder
from .delta_held import Converted
from .errors import DeltaError
from .live import Live, flat_bytes
from .patch import PIECE, Patch, joined, patch_of
from .session import ReloadSession
from .sources import SafetensorsFolder


def patch_converted(session: ReloadSession, one: Converted, full: SafetensorsFolder | None, deltas: list[DeltaFolder]) -> None:
    """Hold what the deltas change in the model's tensors of one conversion.

    Raises:
        DeltaError: as for tensors that are what the files have.
    """
    lives = {name: session.live(name) for name in one.targets}
    versions = {name: live.version for name, live in lives.items()}
    if full is not None:
        stored = {name: full.read(name) for name in one.sources}
    else:
        values = {name: live.bytes(live.box).cpu().view(live.dtype).view(live.shape) for name, live in lives.items()}
        stored = dict(one.revert(values))
    made = one.convert({name: _changed(name, stored[name], deltas) for name in one.sources})
    for name, live in lives.items():
        if live.version != versions[name]:
            raise DeltaError("the live tensor changed while the delta was checked against it", name=name)
        session.patch(name, lambda live, name=name: _patches(live, name, made))  # type: ignore[misc]


def _changed(name: str, value: Tensor, deltas: list[DeltaFolder]) -> Tensor:
    """With the deltas applied, and verified."""
    raw = flat_bytes(value.detach().cpu()).clone()
    touching = [delta for delta in deltas if name in delta.checksums]
    for delta in touching:
        for change in delta.pieces(name, raw.numel()):
            change.apply_(raw)
    if touching:
        digest = Digest(touching[-1].checksum_format)
        digest.add(raw, 0, raw.numel())
        touching[-1].check(name, digest.hexdigest(raw.numel()))
    return raw.view(value.dtype).view(value.shape)


def _patches(live: Live, name: str, made: Mapping[str, Tensor]) -> list[Patch]:
    value = made[name]
    if (value.dtype, tuple(value.shape)) != (live.dtype, live.shape):
        expected, found = f"{live.dtype} {list(live.shape)}", f"{value.dtype} {list(value.shape)}"
        raise DeltaError("the converted tensor does not fit the model", name=name, expected=expected, found=found)
    raw, found_patches = flat_bytes(value), []
    for start, box in live.pieces(PIECE):
        old = live.bytes(box)
        new = raw[start : start + old.numel()].to(old.device)
        patch = patch_of(live, box, old, new, keep_new=True)
        found_patches += [patch] if patch is not None else []
    return joined(found_patches)
