"""NaN among block scales, beside torch's own ``isnan``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam_nvfp4.errors import ScaleError
from aliasparam_nvfp4.quantize.block_scales import first_nan, need_block_scales

CODES = st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0x7F, 0xFF, 0x7E, 0xFE, 0x80, 0])), max_size=40)


@given(st.lists(CODES, max_size=4))
def test_the_first_nan_of_any_sign_is_found_where_it_is(pieces: list[list[int]]) -> None:
    tensors = [torch.tensor(piece, dtype=torch.uint8) for piece in pieces]
    seen = (
        (i, j) for i, t in enumerate(tensors) for j in t.view(torch.float8_e4m3fn).float().isnan().nonzero().view(-1).tolist()
    )

    assert first_nan(tensors) == next(seen, None)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_they_are_refused(code: int) -> None:
    scales = torch.full((4, 4), 0x38, dtype=torch.uint8)
    need_block_scales(scales.view(torch.float8_e4m3fn), signed=False)
    scales[2, 1] = code

    with pytest.raises(ScaleError, match="NaN"):
        need_block_scales(scales.view(torch.float8_e4m3fn))
