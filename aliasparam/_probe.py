"""The laws of a transform, tried on a probe: at declaration, and by authors in their own tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ._transform import TensorSpec, Transform, as_bytes
from .errors import TransformError

_REMEDY = "Declare the step as lossy (lossless = False) so that its source is kept, or mend the inverse."


def check_inverse(transform: Transform, spec: TensorSpec, *, device: torch.device | str = "cpu") -> None:
    """Raise TransformError unless ``transform`` keeps its laws on a probe of ``spec``.

    The probe holds distinct bytes wherever the size allows, so any lost, doubled or moved byte shows. Checked: the promised
    spec, ``inverse(forward(x)) == x`` byte for byte, and that regions and bands convert by themselves.
    """
    probe_bytes = (torch.arange(spec.nbytes, device=device, dtype=torch.int64) * 131 + 7) % 251
    probe = probe_bytes.to(torch.uint8).view(spec.dtype).reshape(spec.shape)
    after = transform.forward(probe.clone()).contiguous()
    promised = transform.output_spec(spec)
    if TensorSpec.of(after) != promised:
        raise TransformError(f"{transform} gives another spec than it promises", expected=promised, found=TensorSpec.of(after))
    back = transform.inverse(after.clone(), spec)
    if TensorSpec.of(back) != spec:
        raise TransformError(f"the inverse of {transform} gives another spec", expected=spec, found=TensorSpec.of(back))
    wrong = as_bytes(back) != as_bytes(probe)
    if bool(wrong.any()):
        raise TransformError(
            f"the inverse of {transform} does not invert",
            expected="inverse(forward(x)) == x for every byte",
            found=f"{int(wrong.sum())} of {spec.nbytes} bytes differ, first at byte {int(wrong.nonzero()[0])} ({spec})",
            remedy=_REMEDY,
        )
    _check_regions(transform, probe, after)
    _check_band(transform, probe, after)


def _check_regions(transform: Transform, probe: Tensor, after: Tensor) -> None:
    lead = max(probe.dim() - transform.core_dims, 0)
    if not lead or probe.shape[0] < 2:
        return
    alone = transform.forward(probe[1].clone())
    if not torch.equal(as_bytes(alone), as_bytes(after[1])):
        raise TransformError(
            f"{transform} mixes its regions",
            expected="forward(x)[e] == forward(x[e]) for every leading index e",
            remedy="Raise core_dims, so that the dimensions it mixes count as one region.",
        )


def _check_band(transform: Transform, probe: Tensor, after: Tensor) -> None:
    band = transform.band(TensorSpec.of(probe))
    lead = max(probe.dim() - transform.core_dims, 0)
    if band is None or probe.dim() < 2 or probe.numel() == 0 or transform.core_dims > 2:
        return
    one = probe.reshape(-1, *probe.shape[lead:])[0]
    whole = after.reshape(-1, *after.shape[lead:])[0]
    if one.dim() < 2 or one.shape[band.dim] <= band.size:
        return
    pieces = [transform.forward(piece.clone()) for piece in torch.split(one, band.size, band.dim)]
    if band.dim == -2:
        joined = torch.cat([as_bytes(piece) for piece in pieces])
    else:
        joined = as_bytes(torch.cat([piece.view(torch.uint8) for piece in pieces], -1))
    if not torch.equal(joined, as_bytes(whole)):
        raise TransformError(f"the {band} of {transform} does not convert by itself", remedy="Return None from band().")
