"""Moving loaded MoE layers to another runner, in place."""

from __future__ import annotations

from torch import nn

from aliasparam import Layout, registry_of
from aliasparam.module.derive import value_of

from ..errors import BackendError
from ..kernels.room import need_room
from .declarations import Declared, unread
from .runners import MoERunner, moe_runner


def retarget_experts(module: nn.Module, runner: str) -> int:
    """Move every NVFP4 MoE layer under ``module`` to another runner, in place; returns how many were moved.

    By blocks that both orders keep together: no reload, no second copy, the same addresses. Scalars
    whose formula is another on the new runner are computed anew in the memory they have. Linear layers stay as they are, see
    :func:`aliasparam_nvfp4.retarget`.

    Raises:
        BackendError: no such runner; one which cannot serve such experts; or one that reads scalars for which the layer has no
            memory (see ``retarget_to``).
        ScaleError: scales that the new runner cannot express.
        PointerError: the new format needs more padding than a layer has room for (see ``retarget_to``).

    Nothing was moved then.
    """
    target = moe_runner(runner)
    found = [_Experts(layer) for layer in module.modules() if "nvfp4_runner" in layer.__dict__]
    wanted = [experts for experts in found if experts.runner.name != target.name]
    for experts in wanted:
        experts.need_movable_to(target)
    for experts in wanted:
        experts.move_to(target)
    return len(wanted)


class _Experts:
    """One layer, and what its method left on it."""

    def __init__(self, layer: nn.Module) -> None:
        registry = registry_of(layer)
        if registry is None:
            raise AssertionError("a layer of experts without declarations")
        self.layer, self.registry = layer, registry
        self.runner: MoERunner = layer.__dict__["nvfp4_runner"]
        self.declared: Declared = layer.__dict__["nvfp4_moe_declared"]

    def formats(self, runner: MoERunner) -> dict[str, Layout]:
        return {source: order for source, (_, order) in self.declared.formats(runner).items()}

    def _new_formats(self, target: MoERunner) -> dict[str, Layout]:
        old = self.formats(self.runner)
        return {source: order for source, order in self.formats(target).items() if order != old[source]}

    def need_movable_to(self, target: MoERunner) -> None:
        """Raise what would go wrong. Nothing is changed."""
        label = self.registry.label
        if (reason := target.refusal(**self.declared.needs)) is not None:
            raise BackendError(f"this runner cannot serve these experts: {reason}", module=label, name=target.name)
        if copies := [n for n in self.formats(target) if not self.registry.sources[n].derived]:
            raise BackendError(
                "a kernel name of this layer has memory of its own, so its format cannot be changed in place",
                module=label,
                name=target.name,
                found=f"copies of {copies}",
                remedy="Create the layer with the runner it shall have.",
            )
        need_room(target, self.registry, self._new_formats(target), label, "NvFp4MoEMethod")
        scalars = self.declared.derivations(target)
        memory = {n: (d.declaration.shape, d.declaration.dtype) for n, d in self.registry.derived.items()}
        if lacking := [d.name for d in scalars if memory.get(d.name) != (d.shape, d.dtype)]:
            raise BackendError(
                "this layer has no memory for scalars which the runner reads",
                module=label,
                name=target.name,
                expected=", ".join(lacking),
                remedy=f'Create it with retarget_to=("{target.name}",).',
            )
        if not self.registry.stale_names():
            for scalar in scalars:
                scalar.function(*(value_of(self.registry, n).clone() for n in scalar.sources))

    def move_to(self, target: MoERunner) -> None:
        loaded = not self.registry.stale_names()
        self.registry.retarget(self._new_formats(target))
        scalars = self.declared.derivations(target)
        read = {d.name for d in scalars}
        self.registry.rederive([*scalars, *(unread(d) for d in self.declared.derivations(self.runner) if d.name not in read)])
        self.layer.__dict__["nvfp4_runner"] = target
        self.registry.about = f"{target.name}: moved by retarget"
        if loaded:
            self.registry.process()
