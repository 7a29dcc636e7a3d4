"""How checkpoints name a linear layer's tensors, and which way their global scales point."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointFormat:
    """Names of one projection's tensors.

    Attributes:
        name: for messages.
        weight: u8 ``[N, K/2]``.
        block_scale: e4m3 ``[N, K/16]``.
        weight_global: f32, one for each projection.
        input_global: f32, one for each projection; absent from W4A16 checkpoints.
        reciprocal: global scales are ``448 * 6 / amax`` instead of ``amax / (448 * 6)``.
        scalar_shape: shape of a projection's global scale in the file.
    """

    name: str
    weight: str
    block_scale: str
    weight_global: str
    input_global: str
    reciprocal: bool
    scalar_shape: tuple[int, ...]


MODELOPT = CheckpointFormat("ModelOpt", "weight", "weight_scale", "weight_scale_2", "input_scale", False, ())
COMPRESSED_TENSORS = CheckpointFormat(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", True, (1,)
)

#: Last parts of the names of KV-cache scales (and biases), which nothing here computes with.
KV_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_bias", "v_bias", "kv_scale", "output_scale")
