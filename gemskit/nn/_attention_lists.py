"""Which tiles a mask of the user's leaves anything in, so that attention reads only those."""

from __future__ import annotations

import triton.language as tl

from gemskit._jit import jit
from gemskit.nn._attention_tiles import window, within


@jit
def attention_list(
    listed, counts, heads, length, size, left, right, aux,
    M: tl.constexpr, N: tl.constexpr, BY_KEY: tl.constexpr,
    VISIBLE: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """One program writes, in order, the column tiles that a row tile sees (BY_KEY: the row tiles that see a column tile)."""
    down, across = tl.cdiv(length, M), tl.cdiv(size, N)
    if BY_KEY:
        down, across = tl.cdiv(size, N), tl.cdiv(length, M)
    program = tl.program_id(0).to(tl.int64)
    plane, own = program // down, (program % down).to(tl.int32)
    batch, head = plane // heads, plane % heads
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    place = listed + program * across
    count = own * 0
    for other in range(across):
        if BY_KEY:
            rows, cols = other * M + tl.arange(0, M)[:, None], own * N + tl.arange(0, N)[None, :]
        else:
            rows, cols = own * M + tl.arange(0, M)[:, None], other * N + tl.arange(0, N)[None, :]
        live = within(rows, cols, size, low, high, SIDES) & (rows < length)
        live = live & VISIBLE(batch, head, tl.minimum(rows, length - 1), tl.minimum(cols, size - 1), aux)
        # Written whether it counts or not: the next one goes to the same place.
        tl.store(place + count, other)
        count += tl.max(tl.max(live.to(tl.int32), 1), 0)
    tl.store(counts + program, count)
