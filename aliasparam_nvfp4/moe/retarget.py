"""Moving loaded MoE layers to another runner, in place."""

from __future__ import annotations

from torch import nn

from aliasparam import Derivation, Layout, registry_of

from ..checkpoint.format import CheckpointFormat
from ..errors import BackendError
from ..kernels.room import need_room
from ..quantize.missing import Missing, is_dynamic
from .declarations import formats, unread
from .runners import MoERunner, MoEShape, Needs, moe_runner
from .stored import Stored


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
        self.shape: MoEShape = layer.__dict__["nvfp4_moe_shape"]
        checkpoint, input_scale = layer.__dict__["nvfp4_moe_checkpoint"]
        stored, bias = layer.__dict__["nvfp4_moe_stored"]
        self.checkpoint: CheckpointFormat = checkpoint
        self.input_scale: bool = input_scale
        self.stored: Stored = stored
        self.bias: bool = bias
        self.missing: Missing = layer.__dict__["nvfp4_moe_missing"]

    def scalars(self, runner: MoERunner) -> list[Derivation]:
        return runner.scales(self.shape, self.checkpoint, input_scale=self.input_scale, missing=self.missing).derivations()

    def formats(self, runner: MoERunner) -> dict[str, Layout]:
        layout = runner.layout.of(self.shape.expert_activation)
        found = formats(self.checkpoint, layout, self.stored, gated=self.shape.expert_activation.gated)
        return {source: order for source, (_, order) in found.items()}

    def _new_formats(self, target: MoERunner) -> dict[str, Layout]:
        old = self.formats(self.runner)
        return {source: order for source, order in self.formats(target).items() if order != old[source]}

    def need_movable_to(self, target: MoERunner) -> None:
        """Raise what would go wrong. Nothing is changed."""
        label = self.registry.label
        needs: Needs = {
            "activation": self.shape.expert_activation,
            "input_scale": self.input_scale,
            "dynamic": is_dynamic(self.missing),
            "bias": self.bias,
        }
        if (reason := target.refusal(**needs)) is not None:
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
        scalars = self.scalars(target)
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
                scalar.function(*(self.registry.value(n).clone() for n in scalar.sources))

    def move_to(self, target: MoERunner) -> None:
        loaded = not self.registry.stale_names()
        self.registry.retarget(self._new_formats(target))
        scalars = self.scalars(target)
        read = {d.name for d in scalars}
        self.registry.rederive([*scalars, *(unread(d) for d in self.scalars(self.runner) if d.name not in read)])
        self.layer.__dict__["nvfp4_runner"] = target
        self.registry.about = f"{target.name}: moved by retarget"
        if loaded:
            self.registry.process()
