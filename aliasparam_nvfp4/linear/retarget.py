"""Moving loaded linear layers to another backend, in place."""

from __future__ import annotations

from torch import nn

from aliasparam import AliasRegistry, Layout, Reencoding, registry_of

from ..errors import BackendError
from ..kernels.room import need_room
from .backends import LinearBackend, linear_backend


def retarget(module: nn.Module, backend: str) -> int:
    """Move every NVFP4 linear layer under ``module`` to the kernel format of another backend, in place; returns how many.

    By blocks that both orders keep together: no reload, no second copy, the same addresses. Between backends of
    one format (cutlass, cudnn, cute-dsl, b12x, triton) nothing moves.

    Raises:
        BackendError: no such backend, one that needs activation scales the checkpoint does not have, or a format that cannot be
            reached in place. Nothing was moved.
        ShapeError: dims that the backend cannot take. Nothing was moved.
        PointerError: the new format needs more padding than a layer has room for (see ``retarget_to``). Nothing was moved.
    """
    target = linear_backend(backend)
    layers = [(path, m) for path, m in module.named_modules() if m.__dict__.get("nvfp4_backend", target) is not target]
    moves = [(registry, _new_formats(path, registry, target)) for path, m in layers if (registry := registry_of(m)) is not None]
    for registry, formats in moves:
        if formats:
            loaded = not registry.stale_names()
            registry.retarget(formats)
            if loaded:
                registry.process()
        registry.module.__dict__["nvfp4_backend"] = target
        registry.about = f"{target.name}: moved by retarget"
    return len(moves)


def _new_formats(path: str, registry: AliasRegistry, target: LinearBackend) -> dict[str, Layout]:
    """Checkpoint name to the kernel format that it must be brought to; raises where that cannot be."""
    state, layout, where = registry.module.__dict__, target.layout, path or registry.label
    try:
        target.check_scales(input_scale="input_scale_inv" in registry.derived, dynamic=state["run_time_scales"] is not None)
    except BackendError as error:
        raise error.located(module=where) from None
    target.check_shape(state["nvfp4_shape"])
    if state["nvfp4_backend"].layout is layout:
        return {}
    formats = {"weight_prepared": layout.weight, "weight_scale_interleaved": layout.weight_scale}
    orders = {name: order for name, order in formats.items() if not isinstance(order, Reencoding)}
    wanted = {s.name: orders[s.derived] for s in registry.sources.values() if s.derived in orders}
    copies = sorted(formats.keys() - {s.derived for s in registry.sources.values() if s.derived in orders})
    if copies:
        raise BackendError(
            "one of the two formats re-encodes values and has memory of its own, so the layer cannot change in place",
            module=where,
            name=target.name,
            expected="formats that are orders of the checkpoint's bytes",
            found=f"{', '.join(copies)} from {state['nvfp4_backend'].layout.name} to {layout.name}",
            remedy="Create the layer with the backend it shall have.",
        )
    need_room(target, registry, wanted, where, "NvFp4LinearMethod, use_backend or load_model")
    return wanted
