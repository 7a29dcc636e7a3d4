"""Which tokens an expert gets, in tiles that a grouped kernel's programs take.

A *slot* is one choice of one token: slot ``t * k + j`` is the j-th expert of token t. The plan is one int32 tensor: for each
tile (expert, first, count), then the slots in order of their experts; a tile's slots are ``order[first : first + count]``. There
are as many tiles as the worst routing needs, by shape alone, so nothing is read back to the host; those left over have expert
-1. Experts of other ranks get no tile. Slots of one expert stay in order, so that results are the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Up to so many slots one program makes the plan; more are sorted by torch.
_ONE_PROGRAM = 1024


@dataclass(frozen=True)
class Plan:
    """The tiles of one call.

    Attributes:
        table: int32 ``[3 * tiles + slots]``: see above.
        tiles: how many tiles there are room for.
        tile: slots of a tile, at most.
        likely: how many tiles will have work if every expert is as likely as another.
    """

    table: Tensor
    tiles: int
    tile: int
    likely: int


def plan(topk_ids: Tensor, *, experts: int, first_expert: int, tile: int) -> Plan:
    """Tiles for ``topk_ids`` int32 ``[T, k]`` (global numbers) on a rank with ``experts`` experts from ``first_expert`` on."""
    slots = topk_ids.numel()
    # One begun tile for each expert, besides full ones; also if a padded token names an expert twice.
    tiles = min(experts, slots) + slots // tile
    ids = topk_ids.reshape(-1).to(torch.int32)
    if slots <= _ONE_PROGRAM and (ids.is_cuda or triton.knobs.runtime.interpret):
        table = torch.empty(3 * tiles + slots, dtype=torch.int32, device=ids.device)
        block = min(64, triton.next_power_of_2(slots))
        _plan[(1,)](
            ids, table, slots, first_expert, experts, tiles, TILE=tile, BLOCK=block, EXPERTS=triton.next_power_of_2(experts),
            TILES=triton.next_power_of_2(tiles), num_warps=8,
        )  # fmt: skip
    else:
        table = by_sorting(ids, experts, first_expert, tile, tiles)
    chosen = experts * (1.0 - (1.0 - 1.0 / experts) ** slots)
    return Plan(table, tiles, tile, max(1, round(chosen), slots // tile))


def by_sorting(ids: Tensor, experts: int, first_expert: int, tile: int, tiles: int) -> Tensor:
    """The same table by torch's operators; the specification of the kernel."""
    own = ids - first_expert
    own = torch.where((own >= 0) & (own < experts), own, experts)
    order = own.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, own.long(), torch.ones_like(own))
    counts = counts[:experts]
    tiles_to = ((counts + tile - 1) // tile).cumsum(0)
    slots_to = counts.cumsum(0)
    number = torch.arange(tiles, device=ids.device)
    expert = torch.searchsorted(tiles_to, number, right=True)
    used = expert < experts
    expert = expert.clamp(max=experts - 1)
    within = number - (tiles_to[expert] - (counts[expert] + tile - 1) // tile)
    first = slots_to[expert] - counts[expert] + within * tile
    count = torch.minimum(counts[expert] - within * tile, torch.full_like(number, tile))
    entries = torch.stack([torch.where(used, expert, -1), torch.where(used, first, 0), torch.where(used, count, 0)], 1)
    return torch.cat([entries.reshape(-1).int(), order.int()])


@triton.jit
def _plan(ids_ptr, table_ptr, slots, first_expert, experts, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
          TILES: tl.constexpr):  # fmt: skip
    """One program: count the slots of every expert, then place them block by block."""
    expert = tl.arange(0, EXPERTS)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, slots, BLOCK):
        own = tl.load(ids_ptr + start + lane, mask=start + lane < slots, other=-1) - first_expert
        counts += tl.sum((own[None, :] == expert[:, None]).to(tl.int32), 1)
    counts = tl.where(expert < experts, counts, 0)
    needed = (counts + TILE - 1) // TILE
    first_tile = tl.cumsum(needed, 0) - needed
    offset = tl.cumsum(counts, 0) - counts
    number = tl.arange(0, TILES)
    unused = (number >= tl.sum(needed, 0)) & (number < tiles)
    tl.store(table_ptr + 3 * number, tl.full((TILES,), -1, tl.int32), mask=unused)
    tl.store(table_ptr + 3 * number + 1, tl.zeros((TILES,), tl.int32), mask=unused)
    tl.store(table_ptr + 3 * number + 2, tl.zeros((TILES,), tl.int32), mask=unused)
    others = tl.sum(counts, 0)  # slots of other ranks' experts come last
    for start in range(0, slots, BLOCK):
        slot = start + lane
        own = tl.load(ids_ptr + slot, mask=slot < slots, other=-1) - first_expert
        mine = (own >= 0) & (own < experts) & (slot < slots)
        match = ((own[None, :] == expert[:, None]) & mine[None, :]).to(tl.int32)
        # ``offset`` moves on with what was placed, so it is where this block's slots of an expert begin.
        place = tl.sum(match * (offset[:, None] + tl.cumsum(match, 1) - 1), 0)
        tl.store(table_ptr + 3 * tiles + place, slot, mask=mine)
        foreign = ((slot < slots) & (mine == 0)).to(tl.int32)
        tl.store(table_ptr + 3 * tiles + others + tl.cumsum(foreign, 0) - 1, slot, mask=foreign == 1)
        others += tl.sum(foreign, 0)
        offset += tl.sum(match, 1)
    begin = offset - counts
    for index in range(0, (slots + TILE - 1) // TILE):  # the index-th tile of every expert
        has = index < needed
        entry = table_ptr + 3 * (first_tile + index)
        tl.store(entry, expert, mask=has)
        tl.store(entry + 1, begin + index * TILE, mask=has)
        tl.store(entry + 2, tl.minimum(counts - index * TILE, TILE), mask=has)
