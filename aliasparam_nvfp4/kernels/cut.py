"""How the work of decode.py is divided among programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Bytes of a row that four lanes hold at once.
PIECE_BYTES: Final = 64


@dataclass(frozen=True)
class Cut:
    """How the work is divided among programs.

    Attributes:
        rows: kernel rows of a program: 32 or 128.
        warps: of a program.
        blocks: programs along the rows.
        split: ranges of K.
        whole: every program's rows and columns exist.
    """

    rows: int
    warps: int
    blocks: int
    split: int
    whole: bool


def cut_for(tokens: int, n: int, half_k: int, tiles: int, processors: int) -> Cut:
    """By shape alone, so that a captured graph and a later call compute the same.

    The cost of a division into ``split`` ranges of K is taken as rounds of programs times steps of a program, with two steps for
    its start and a quarter for each range that is added up afterwards; fitted to an H200 and an H100.

    Args:
        tokens: of a tile.
        n: kernel rows.
        half_k: packed bytes of a row.
        tiles: of all experts that will have work, about; 1 for a linear layer.
        processors: multiprocessors.
    """
    small = n < 128 or (tokens <= 8 and tiles == 1 and n * half_k < 8 << 20)
    rows, warps, resident = (32, 2, 10) if small else (128, 4, 3 if tokens <= 8 else 2)
    blocks, steps = -(-n // rows), -(-half_k // (2 * PIECE_BYTES))

    def cost(split: int) -> float:
        rounds = -(-blocks * tiles * split // (resident * processors))
        return rounds * (-(-steps // split) + 2) + split / 4

    splits = [s for s in range(1, min(steps, 16) + 1) if steps % s == 0]
    split = min(splits, key=cost)
    return Cut(rows, warps, blocks, split, n % rows == 0 and half_k % (2 * PIECE_BYTES * split) == 0)
