"""What SGLang's own layers are made from, where they are the oracle."""

from __future__ import annotations

from typing import Any


def nvfp4_config(module: Any) -> Any:
    """Of an NVFP4 checkpoint; ``module`` is SGLang's ``modelopt_quant``."""
    return module.ModelOptFp4Config(
        is_checkpoint_nvfp4_serialized=True,
        kv_cache_quant_algo=None,
        group_size=16,
        exclude_modules=[],
        packed_modules_mapping={},
    )
