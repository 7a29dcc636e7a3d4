"""How the decode kernel's work is divided: all of it, by shape alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aliasparam_nvfp4.kernels.cut import PIECE_BYTES, cut_for


@given(
    tokens=st.integers(1, 16),
    n=st.integers(1, 1 << 16),
    blocks_of_k=st.integers(1, 2048),
    tiles=st.integers(1, 512),
    processors=st.sampled_from([1, 16, 108, 132]),
)
def test_programs_cover_every_row_and_every_column_and_whole_means_no_more(
    tokens: int, n: int, blocks_of_k: int, tiles: int, processors: int
) -> None:
    half_k = 8 * blocks_of_k
    cut = cut_for(tokens, n, half_k, tiles, processors)
    steps = -(-half_k // (2 * PIECE_BYTES))

    assert cut.rows in (32, 128) and cut.warps * 16 <= cut.rows
    assert cut.blocks * cut.rows >= n > (cut.blocks - 1) * cut.rows
    assert 1 <= cut.split <= 16 and steps % cut.split == 0, "no range of K is empty, and none begins beyond it"
    if cut.whole:
        assert cut.blocks * cut.rows == n and steps * 2 * PIECE_BYTES == half_k


def test_large_layers_give_every_multiprocessor_work() -> None:
    for n, k in ((36864, 7168), (7168, 18432), (4096, 7168)):
        cut = cut_for(1, n, k // 2, 1, 132)
        assert cut.whole and cut.blocks * cut.split >= 132
