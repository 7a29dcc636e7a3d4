"""Which part of a layer's experts a rank has."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ShapeError


@dataclass(frozen=True)
class ExpertRanks:
    """Experts divided by number over ``ep_size`` ranks, and each expert's I over ``tp_size``. The default is one process.

    Raises:
        ShapeError: a rank that is not below its size.
    """

    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for what, rank, size in (("ep", self.ep_rank, self.ep_size), ("tp", self.tp_rank, self.tp_size)):
            if not 0 <= rank < size:
                raise ShapeError(f"no such {what} rank", expected=f"0 to {size - 1}", found=rank)

    @property
    def size(self) -> int:
        """How many processes hold parts whose results add up."""
        return self.ep_size * self.tp_size

    def divided(self, experts: int, intermediate: int) -> tuple[int, int]:
        """(experts, I) of one rank.

        Raises:
            ShapeError: they cannot be divided.
        """
        for what, count, size in (("experts", experts, self.ep_size), ("I in blocks of 16", intermediate // 16, self.tp_size)):
            if count % size:
                raise ShapeError(
                    f"{what} cannot be divided among the ranks", expected=f"a multiple of {size}", found=count,
                    remedy="Use as many ranks as divide it.",
                )  # fmt: skip
        return experts // self.ep_size, intermediate // self.tp_size
