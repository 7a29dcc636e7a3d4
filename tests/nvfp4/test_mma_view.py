"""Views of swizzled block scales, against their index formulas. The lines have their proofs in their own tests."""

from __future__ import annotations

import pytest
import torch

from aliasparam.errors import LayoutError
from aliasparam_nvfp4.layouts import mma_view, swizzle
from aliasparam_nvfp4.layouts.mma_view import unswizzled


@pytest.mark.parametrize("shape", [(300, 10), (128, 4), (1, 1), (129, 5)])
def test_the_views_move_nothing_and_read_by_their_formula(shape: tuple[int, int]) -> None:
    scales = torch.randint(0, 256, shape, dtype=torch.uint8)
    swizzled = swizzle().bind(shape, torch.uint8).encode(scales)

    view = mma_view(swizzled, *shape)

    assert view.data_ptr() == swizzled.data_ptr()
    r, c = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    assert torch.equal(view[r % 32, (r % 128) // 32, r // 128, c % 4, c // 4, 0], scales)
    assert torch.equal(unswizzled(swizzled, *shape), scales)


def test_bytes_of_no_whole_tiles_are_refused() -> None:
    with pytest.raises(LayoutError, match="whole 128x4 tiles"):
        mma_view(torch.zeros(120, 4, dtype=torch.uint8), 120, 4)
