"""Where transformers may put a model: whole in each process, on one device."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...checkpoint import CheckpointError


def need_one_device(device_map: Any) -> None:
    """Raise CheckpointError where layers would lie on several devices or on disk: accelerate moves what it finds under a layer's
    names before and after each forward, and kernel names would stay behind.

    ``device_map`` as ``from_pretrained`` gives it: "auto" and the like say nothing yet, and come again as what was made of them.
    """
    if not isinstance(device_map, dict):
        return
    places = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()}
    if len(places) > 1 or "disk" in places:
        raise CheckpointError(
            "NVFP4 layers in kernel order stay where they were made, and are not moved for each forward",
            name="device_map",
            expected="one device for the whole model",
            found=", ".join(sorted(places)),
            remedy='Pass device_map={"": device} with a device that holds all of it. vLLM and SGLang serve over several.',
        )


def need_undivided(model: nn.Module) -> None:
    """Raise CheckpointError where transformers would divide the model: its plans cut plain weights by name, and neither block
    scales nor kernel order. ``from_pretrained`` puts the ``DistributedConfig`` in the config before it makes the model.
    """
    asked = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(asked, name, None) for name in ("tp_size", "pp_size", "dp_size", "fsdp_size")}
    divided = {name: size for name, size in sizes.items() if size is not None and size > 1}
    if asked is not None and (divided or (getattr(asked, "tp_plan", None) is not None and sizes["tp_size"] != 1)):
        raise CheckpointError(
            "transformers' parallel plans cannot divide NVFP4 weights in kernel order",
            module=type(model).__name__,
            expected="a model that is whole in each process",
            found=", ".join(f"{name}={size}" for name, size in divided.items()),
            remedy="Leave tp_plan out; use_backend(ranks=ExpertRanks(...)) divides experts. vLLM and SGLang divide all layers.",
        )
