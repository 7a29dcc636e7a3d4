"""The one description of how a checkpoint is quantized, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..quantize.format import BLOCK_SIZE
from .format import MODELOPT, CheckpointFormat
from .patterns import Patterns
from .scheme import Scheme, fitting

#: Module names which one fused name stands for, as configs for engines have it.
_FUSED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",), "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",), "w1": ("gate_up_proj", "w13"), "w3": ("gate_up_proj", "w13"), "w2": ("down_proj",),
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What is quantized how.

    Attributes:
        targets: patterns of modules; without one that matches a module is left alone.
        schemes: of each target, by precedence.
        whole: of every linear module, where no target says otherwise.
        ignored: modules that are left alone, whatever else says.
        spreads: a target's name stands for modules under it and for the parts of a fused one.
    """

    targets: Patterns = field(default_factory=lambda: Patterns(()))
    schemes: tuple[tuple[Scheme, ...], ...] = ()
    whole: tuple[Scheme, ...] = ()
    ignored: Patterns = field(default_factory=lambda: Patterns(()))
    spreads: bool = False

    def of(self, module: str) -> tuple[Scheme, ...]:
        """The schemes of a linear module, by precedence; none where it is left alone."""
        if module in self.ignored:
            return ()
        found = [s for name in self._names(module) for number in self.targets.all(name) for s in self.schemes[number]]
        return (*dict.fromkeys(found), *self.whole)

    def _names(self, module: str) -> list[str]:
        """The module's own name, then fused names that stand for it."""
        if not self.spreads:
            return [module]
        parent, _, leaf = module.rpartition(".")
        block, _, number = parent.rpartition(".")
        holders = [parent, block] if number.isdigit() else [parent]  # experts.3.w1 is a part of experts.w13
        return [module, *(f"{holder}.{fused}" for holder in holders for fused in (*_FUSED.get(leaf, ()), leaf))]


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        algo: ModelOpt's name of the algorithm ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION"), whoever wrote the files.
        group_size: values per block scale, 16.
        exclude: patterns of modules which are not quantized, in the dialect of who wrote them (see patterns.py).
        tensors: how the files name a module's tensors.
        rules: what :meth:`schemes_of` goes by.
        kv_cache_algo: quantization of the KV cache, or None.
        raw: the whole dict as it was read.
    """

    algo: str
    group_size: int = BLOCK_SIZE
    exclude: tuple[str, ...] = ()
    tensors: CheckpointFormat = MODELOPT
    rules: Rules = field(default_factory=Rules, compare=False)
    kv_cache_algo: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def schemes_of(self, *names: str) -> tuple[Scheme, ...]:
        """What the config says of one linear module, by precedence; nothing where it is left alone.

        Args:
            names: what the module is called; the files' name first, and the model's own where it differs. Exporters use either.
        """
        found = [self.rules.of(name) for name in dict.fromkeys(names)]
        if not all(found) and any(name in self.rules.ignored for name in names):
            return ()
        return next((schemes for schemes in found if schemes), ())

    def scheme_of(self, *names: str, fp4: bool | None = None, stored: bool | None = None) -> Scheme | None:
        """The one that fits the file's tensors, see :func:`~aliasparam_nvfp4.checkpoint.scheme.fitting`."""
        return fitting(self.schemes_of(*names), fp4=fp4, stored=stored)
