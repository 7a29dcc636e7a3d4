"""``reload_weights(..., is_checkpoint_format=False)``: tensors under the names of this rank's own model, fused and sharded.

A checkpoint name (``model.layers.0.self_attn.qkv_proj.weight``) takes checkpoint order; a kernel name (``...weight_prepared``)
takes the kernel's own, as another rank with the same layout has it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import aliasparam
from aliasparam import AliasedStorage, TensorSpec
from aliasparam.errors import ReloadError
from aliasparam.module.registry import registries

from ..agreement import Agreement
from .options import Options
from .ranks import world
from .ties import follow


def load_runtime_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], chosen: Options) -> None:
    """One transaction over whatever comes: each tensor that is begun must arrive whole.

    Raises:
        ReloadError: an unknown name, another shape or dtype, a name twice, or a tensor without elements.
    """
    kernels = {
        f"{path}.{source.derived}": (f"{path}.{name}", source.storage)
        for path, registry in registries(model)
        for name, source in registry.sources.items()
        if source.derived and source.storage is not None and source.storage.kernel_name is not None
    }
    votes = Agreement(world())
    try:
        with aliasparam.reload(model, scope="partial", policy=chosen.policy, source="vllm") as session:
            for name, value in tensors:
                if name in kernels:
                    name, value = kernels[name][0], checkpoint_values(name, kernels[name][1], value)
                if not value.numel():
                    raise ReloadError(
                        "a tensor without elements: vLLM has packed what the layer computes with, and keeps it out of reach",
                        name=name,
                        remedy="Reload in checkpoint format, which packs it anew.",
                    )
                session.update(name, value)
            session.prepare()
            votes.agree()
            session.switch()
            votes.agree()
        follow(model)
    except BaseException as error:
        votes.refuse(error)
        raise


def checkpoint_values(name: str, storage: AliasedStorage, value: Tensor) -> Tensor:
    """Bytes in kernel order as the checkpoint tensor; padding is left out."""
    assert storage.kernel_name is not None
    expected = TensorSpec.of(storage.kernel_name.memory)
    if TensorSpec.of(value) != expected:
        raise ReloadError("these are no bytes of this kernel name", name=name, expected=expected, found=TensorSpec.of(value))
    with torch.no_grad():
        flat = value.contiguous().view(-1).view(storage.spec.dtype)
        return storage.bound.read(flat, storage.bound.whole)
