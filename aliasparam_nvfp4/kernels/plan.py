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

#: Slots that one program compares with each other, and up to which programs do; more are sorted by torch.
_BLOCK = 128
_BY_COMPARING = 2048


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
    if slots <= _BY_COMPARING and (ids.is_cuda or triton.knobs.runtime.interpret):
        table = torch.empty(3 * tiles + slots, dtype=torch.int32, device=ids.device)
        _by_comparing(ids, table, slots, experts, first_expert, tile, tiles)
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


def _by_comparing(ids: Tensor, table: Tensor, slots: int, experts: int, first_expert: int, tile: int, tiles: int) -> None:
    """Every slot with every other: one launch for a block of slots, two for more."""
    unused = triton.next_power_of_2(tiles)
    if slots <= _BLOCK:
        block = max(16, triton.next_power_of_2(slots))
        _one_block[(1,)](ids, table, slots, first_expert, experts, tiles, TILE=tile, BLOCK=block, TILES=unused)
        return
    ranks = torch.empty_like(ids)
    grid = (triton.cdiv(slots, _BLOCK),)
    _order[grid](ids, table, ranks, slots, first_expert, experts, tiles, BLOCK=_BLOCK, num_warps=8)
    _tiles[grid](ids, table, ranks, slots, first_expert, experts, tiles, TILE=tile, BLOCK=_BLOCK, TILES=unused, num_warps=8)


@triton.jit
def _own(ids_ptr, slot, slots, first_expert, experts):
    """A slot's expert on this rank; ``experts`` for one of another rank, one more where there is no slot."""
    own = tl.load(ids_ptr + slot, mask=slot < slots, other=0) - first_expert
    own = tl.where((own >= 0) & (own < experts), own, experts)
    return tl.where(slot < slots, own, experts + 1)


@triton.jit
def _one_block(ids_ptr, table_ptr, slots, first_expert, experts, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    slot = tl.arange(0, BLOCK)
    own = _own(ids_ptr, slot, slots, first_expert, experts)
    same = own[:, None] == own[None, :]
    less = own[None, :] < own[:, None]
    rank = tl.sum((same & (slot[None, :] < slot[:, None])).to(tl.int32), 1)
    other_rank = tl.sum((same & (slot[:, None] < slot[None, :])).to(tl.int32), 0)
    tl.store(table_ptr + 3 * tiles + tl.sum(less.to(tl.int32), 1) + rank, slot, mask=slot < slots)
    begins = ((other_rank % TILE == 0) & (own < experts)).to(tl.int32)
    tile = tl.sum(tl.where(less, begins[None, :], 0), 1) + rank // TILE
    _store(table_ptr, tile, own, rank, tl.sum(less.to(tl.int32), 1), tl.sum(same.to(tl.int32), 1), experts, TILE)
    _store_unused(table_ptr, tl.sum(begins, 0), tiles, TILES)


@triton.jit
def _order(ids_ptr, table_ptr, ranks_ptr, slots, first_expert, experts, tiles, BLOCK: tl.constexpr):
    """Places a block of slots in the order of their experts, and keeps each one's rank among its expert's."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = _own(ids_ptr, slot, slots, first_expert, experts)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, slots, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = _own(ids_ptr, other, slots, first_expert, experts)
        rank += tl.sum(((own[:, None] == theirs[None, :]) & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        before += tl.sum((theirs[None, :] < own[:, None]).to(tl.int32), 1)
    tl.store(ranks_ptr + slot, rank, mask=slot < slots)
    tl.store(table_ptr + 3 * tiles + before + rank, slot, mask=slot < slots)


@triton.jit
def _tiles(ids_ptr, table_ptr, ranks_ptr, slots, first_expert, experts, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr,
           TILES: tl.constexpr):  # fmt: skip
    """Writes the tiles which begin with a slot of this block."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = _own(ids_ptr, slot, slots, first_expert, experts)
    rank = tl.load(ranks_ptr + slot, mask=slot < slots, other=0)
    tile = rank // TILE
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    every = 0
    for start in range(0, slots, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = _own(ids_ptr, other, slots, first_expert, experts)
        less = theirs[None, :] < own[:, None]
        begins = (tl.load(ranks_ptr + other, mask=other < slots, other=1) % TILE == 0) & (theirs < experts)
        tile += tl.sum(tl.where(less, begins.to(tl.int32)[None, :], 0), 1)
        before += tl.sum(less.to(tl.int32), 1)
        count += tl.sum((own[:, None] == theirs[None, :]).to(tl.int32), 1)
        every += tl.sum(begins.to(tl.int32), 0)
    _store(table_ptr, tile, own, rank, before, count, experts, TILE)
    if tl.program_id(0) == 0:
        _store_unused(table_ptr, every, tiles, TILES)


@triton.jit
def _store(table_ptr, tile, own, rank, before, count, experts, TILE: tl.constexpr):
    """(expert, first, count) of the tile that begins with each slot, if one does."""
    begins = (own < experts) & (rank % TILE == 0)
    entry = table_ptr + 3 * tile
    tl.store(entry, own, mask=begins)
    tl.store(entry + 1, before + rank, mask=begins)
    tl.store(entry + 2, tl.minimum(count - rank, TILE), mask=begins)


@triton.jit
def _store_unused(table_ptr, used, tiles, TILES: tl.constexpr):
    number = tl.arange(0, TILES)
    entry = table_ptr + 3 * number
    unused = (number >= used) & (number < tiles)
    tl.store(entry, tl.full((TILES,), -1, tl.int32), mask=unused)
    tl.store(entry + 1, tl.zeros((TILES,), tl.int32), mask=unused)
    tl.store(entry + 2, tl.zeros((TILES,), tl.int32), mask=unused)
