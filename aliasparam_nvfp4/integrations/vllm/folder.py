"""What the headers of a folder tell before the first write."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint import CheckpointError, CheckpointFolder

#: Tensors that vLLM takes from elsewhere where they are missing.
_TIED = ("lm_head.",)
_SHOWN = 5


def check_folder(serving: str | Path, folder: str | Path) -> None:
    """Hold a folder against the one that serves: every tensor of that must be there, in its shape and dtype.

    Truncated and missing files are found too. Where either is no local folder nothing is known, and nothing refused.

    Raises:
        CheckpointError: what is missing or does not fit. Nothing was loaded.
    """
    if not Path(folder).is_dir():
        if Path(folder).is_absolute():
            raise CheckpointError("there is no such folder; nothing was loaded", name=str(folder))
        return
    if not Path(serving).is_dir() or not any(Path(serving).glob("*.safetensors")) or not any(Path(folder).glob("*.safetensors")):
        return
    old, new = CheckpointFolder(serving), CheckpointFolder(folder)
    try:
        specs = {name: entry.spec for name, entry in new.tensors.items()}
        wrong = [
            f"{name}: expected {entry.spec}, found {specs.get(name, 'nothing')}"
            for name, entry in old.tensors.items()
            if specs.get(name) != entry.spec and not (name not in specs and name.startswith(_TIED))
        ]
    finally:
        old.close()
        new.close()
    if wrong:
        raise CheckpointError(
            "the checkpoint does not fit the one that serves; nothing was loaded",
            name=str(folder),
            expected=f"the {len(old.tensors)} tensors of {serving}",
            found="\n            ".join(
                [*wrong[:_SHOWN], *([f"… and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else [])]
            ),
            remedy="Export it from the same architecture, or start the engine with it.",
        )
