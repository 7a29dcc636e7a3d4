"""Values that wait on the host for the commit, in chunks: laws 1 and 4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from aliasparam.layout.boxes import sizes
from aliasparam.reload import staged
from aliasparam.reload.staged import StagedValues
from aliasparam.reload.targets import find_targets
from aliasparam.testing import same_bytes

_CHUNK = 1 << 12
_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128)
_shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_shapes, st.sampled_from(_DTYPES), st.booleans()), min_size=1, max_size=6), st.integers(0, 9))
def test_law_1_what_comes_out_is_what_went_in(
    device: torch.device, tensors: list[tuple[tuple[int, ...], torch.dtype, bool]], first: int
) -> None:
    model = nn.Module()
    for number, (shape, dtype, _) in enumerate(tensors):
        model.register_buffer(f"b{number}", torch.zeros(shape, dtype=dtype, device=device))
    random, values, want = torch.Generator().manual_seed(first), StagedValues(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK", _CHUNK)
        for target, (shape, dtype, turned) in zip(find_targets(model).values(), tensors, strict=True):
            value = torch.randint(0, 100, shape, generator=random).to(dtype)
            value = value.mT.contiguous().mT if turned and len(shape) > 1 else value
            box = tuple((min(first, n), n) for n in shape)
            part = value[tuple(slice(a, b) for a, b in box)]
            values.add(target, box, part)
            want.append((target, box, part.clone()))
            value.zero_()  # nothing of it is kept
        for _ in range(2):  # a commit that failed is made again
            out = {target.label: torch.zeros_like(target.tensor) for target, _, _ in want}
            for target, box, value in values:
                assert value.shape == sizes(box) and value.device == target.tensor.device and value.nbytes <= _CHUNK
                out[target.label][tuple(slice(a, b) for a, b in box)].copy_(value)
            for target, box, part in want:
                found = out[target.label][tuple(slice(a, b) for a, b in box)].cpu()
                assert same_bytes(found, part), (target.label, box)


def test_law_4_many_small_values_take_few_chunks(device: torch.device) -> None:
    model = nn.Module()
    for number in range(300):
        model.register_buffer(f"b{number}", torch.zeros(1024, device=device))
    values = StagedValues()
    for target in find_targets(model).values():
        values.add(target, ((0, 1024),), torch.zeros(1024))
    assert len(values._chunks) <= 10 and values.nbytes <= 2 * 300 * 4096
