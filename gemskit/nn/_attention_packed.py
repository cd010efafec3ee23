"""The tiles of rows of packed sequences, those that see most keys first, for programs that take one after the other.

Sequences differ in length, and how long they are is known on the device alone. The place of a tile in the list is the number of
tiles that come before it; within a sequence a later tile never sees fewer keys, so that each sequence is counted by one division.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.nn._attention_tiles import span, window

#: Numbers of an entry of the list: first row of the sequence, tile, rows, first key, keys; 32 bytes together.
ENTRY = tl.constexpr(8)
#: Tiles of a program, and sequences that it counts at a time.
_TILES, _SEQUENCES = 64, 32


@jit
def _sequence(
    bounds_q, bounds_k, used, steps, which, size, right, most,
    ROWS: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """Where rows and keys begin, how many there are, the last key that row 0 sees, and the number of tiles."""
    first_q, rows = span(bounds_q, steps[0], None, 0, which, 0)
    first_k, keys = span(bounds_k, steps[1], used, steps[2], which, size)
    _, _, high = window(keys, rows, 0, right, SIDES, BOTTOM)
    # No more tiles than the list has room for, whatever the bounds are.
    tiles = tl.minimum(tl.cdiv(tl.maximum(rows, 0), ROWS), most)
    return first_q, rows, first_k, keys, high, tiles


@jit
def _with_more(least, keys, high, tiles, ROWS: tl.constexpr, SIDES: tl.constexpr):
    """How many tiles of a sequence see more than ``least`` keys."""
    fewer = tiles * 0
    if SIDES % 2 == 1:
        fewer = tl.minimum(tl.maximum((least - high) // ROWS, 0), tiles)
    return tl.where(least < 0, tiles, tl.where(keys > least, tiles - fewer, 0))


@jit(do_not_specialize=["sequences", "size", "right", "most", "room"])
def attention_packed_tiles(
    listed, bounds_q, bounds_k, used, steps, sequences, size, right, most, room,
    ROWS: tl.constexpr, TILES: tl.constexpr, SEQUENCES: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """Entries of TILES tiles of one sequence. What stands before the first entry is the number of entries."""
    blocks = tl.cdiv(most, TILES)
    own = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    first_q, rows, first_k, keys, high, tiles = _sequence(
        bounds_q, bounds_k, used, steps, own, size, right, most, ROWS, SIDES, BOTTOM
    )
    sees = m * 0 + keys
    if SIDES % 2 == 1:
        sees = tl.maximum(tl.minimum(keys, (m + 1) * ROWS + high), 0)
    place = tiles - 1 - m
    total = tiles * 0
    for start in range(0, sequences, SEQUENCES):
        which = start + tl.arange(0, SEQUENCES)
        _, _, _, others, last, count = _sequence(
            bounds_q, bounds_k, used, steps, tl.minimum(which, sequences - 1), size, right, most, ROWS, SIDES, BOTTOM
        )
        count = tl.where(which < sequences, count, 0)
        total += tl.sum(count, 0)
        count = tl.where(which == own, 0, count)
        # Of tiles that see as many keys those of an earlier sequence come first.
        least = sees[:, None] - (which < own).to(tl.int32)[None, :]
        place += tl.sum(_with_more(least, others[None, :], last[None, :], count[None, :], ROWS, SIDES), 1)
    live = (m < tiles) & (place < room)
    at = listed + (1 + place) * ENTRY
    tl.store(at, (m * 0 + first_q).to(tl.int32), mask=live)
    tl.store(at + 1, m, mask=live)
    tl.store(at + 2, m * 0 + rows, mask=live)
    tl.store(at + 3, (m * 0 + first_k).to(tl.int32), mask=live)
    tl.store(at + 4, m * 0 + keys, mask=live)
    if tl.program_id(0) == 0:
        tl.store(listed, tl.minimum(total, room))


# ---- the host's part -----------------------------------------------------------------------------------------------


def packed_tiles(p: Any, rows: int) -> tuple[Tensor, int]:
    """The list of the tiles of ``rows`` rows of the problem ``p``, and how many there are at most."""
    room = p.query.shape[2] // rows + p.batch
    most = min(_layout.cdiv(p.length, rows), room)
    listed = torch.empty((room + 1, ENTRY.value), dtype=torch.int32, device=p.query.device)
    launch(
        attention_packed_tiles, (p.batch * _layout.cdiv(most, _TILES),),
        (listed, p.bounds_q, p.bounds_k, p.used, p.steps[:3], p.batch, p.size, p.sides[1], most, room),
        dict(ROWS=rows, TILES=_TILES, SEQUENCES=_SEQUENCES, SIDES=p.shape["SIDES"], BOTTOM=p.bottom, num_warps=4),
    )  # fmt: skip
    return listed, room
