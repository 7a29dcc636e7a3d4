"""What became of the tensors of a folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_log = logging.getLogger("aliasparam_nvfp4")


@dataclass(frozen=True)
class FolderReport:
    """Names in the files, by what became of them. A loaded model has it as ``model.hf_quantizer.report``.

    Attributes:
        loaded: into the model, as they are or under another name.
        converted: by transformers' operations (a vision tower's ``wqkv``).
        carried: nothing computes with them; they are reloaded and exported.
        dropped: not loaded, by the rule that says so.
        unquantized: modules that the config quantizes and the files do not; they are served as they are.
    """

    loaded: Sequence[str] = ()
    converted: Sequence[str] = ()
    carried: Sequence[str] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    unquantized: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.converted)} converted, {len(self.carried)} carried along"]
        for rule, count in Counter(self.dropped.values()).items():
            first = next(name for name, own in self.dropped.items() if own == rule)
            lines.append(f"{count} dropped: {rule} ({first}, …)")
        if self.unquantized:
            lines.append(f"{len(self.unquantized)} modules are not quantized in the files ({self.unquantized[0]}, …)")
        return "\n".join(lines)

    def say(self, where: str) -> None:
        """Log what a user would not expect."""
        if self.dropped or self.unquantized:
            _log.warning("%s: %s", where, self)
        else:
            _log.info("%s: %s", where, self)
