"""A stable radix sort of long rows: one pass for every 8 bits of the keys, lowest first.

Count the digits of every tile, scan the counts, then sort every tile by its digit and store each run where it belongs.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit.reduce._block_order import WARPS
from gemskit.reduce._keys import Rows, key_bits, key_of, log2, store_element
from gemskit.reduce._network import in_order, neighbours
from gemskit.reduce._radix_blocks import PER, radix_block_count, radix_block_move
from gemskit.reduce._radix_blocks import TILE as BLOCK

#: Bits of a digit: runs of 11 are too short (H200, 16M float32: a move of sorted tiles 0.27 ms, of 8 bits 0.12).
#: Elements of a tile, and the warps that count and move them.
BITS, TILE, COUNTING, MOVING = 8, 1024, 2, 1


@jit
def _read(words, places, x, start, from_row, col, x_col, live, PACKED: tl.constexpr, DESCENDING: tl.constexpr):
    """Key and place of what stands at ``col`` of a row: of ``x`` in the first pass, else of the words so far."""
    if words is None:
        return key_of(tl.load(x + from_row + col * x_col, live), DESCENDING), col
    else:
        word = tl.load(words + start + col, live)
        if PACKED:
            return (word >> 32).to(tl.int32), word & 0xFFFFFFFF
        elif places is None:
            return word, col
        else:
            return word, tl.load(places + start + col, live)


@jit(do_not_specialize=["shift", "flip"])
def radix_count(
    counts, words, x, row_sizes, x_rows, x_col, cols, tiles, shift, flip,
    PACKED: tl.constexpr, DESCENDING: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """How often each of D digits occurs in a tile of a row, and (times 65536) how many elements have a smaller digit there."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, tile = i // tiles, i % tiles
    col = tile * T + tl.arange(0, T)
    live = col < cols
    key, _ = _read(words, None, x, row * cols, offset(row, row_sizes, x_rows), col, x_col, live, PACKED, DESCENDING)
    digit = ((key >> shift) & (D - 1)).to(tl.int32) ^ flip
    found = tl.histogram(digit, D, live)
    smaller = tl.cumsum(found, 0) - found
    tl.store(counts + (row * D + tl.arange(0, D)) * tiles + tile, found | (smaller << 16))


@jit
def radix_scan(counts, totals, lines, tiles, BD: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr):
    """Turn counts into where, after all smaller digits of the row, the element of place 0 in its sorted tile would go."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    line = i * BD + tl.arange(0, BD)
    before = tl.zeros((BD,), tl.int32)
    for start in range(0, tiles, BP):
        tile = (start + tl.arange(0, BP))[None, :]
        at = counts + line[:, None] * tiles + tile
        live = (line[:, None] < lines) & (tile < tiles)
        both = tl.load(at, live, other=0)
        count = both & 65535
        tl.store(at, tl.cumsum(count, 1) - count + before[:, None] - (both >> 16), live)
        before += tl.sum(count, 1)
    tl.store(totals + line, before, line < lines)


@jit
def radix_base(totals, D: tl.constexpr, WIDE: tl.constexpr):
    """Turn the totals of the digits of a row into how many elements have smaller digits."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    at = totals + i * D + tl.arange(0, D)
    total = tl.load(at)
    tl.store(at, tl.cumsum(total, 0) - total)


@jit(do_not_specialize=["shift", "flip"])
def radix_move(
    into, into_places, values, indices, words, places, x, counts, totals,
    row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, cols, tiles, keep, shift, flip,
    PACKED: tl.constexpr, LAST: tl.constexpr, DESCENDING: tl.constexpr, D: tl.constexpr, LOG: tl.constexpr,
    V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Move the elements of a tile to where their digits belong; the LAST pass stores the results."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, tile = i // tiles, i % tiles
    T: tl.constexpr = 2**LOG
    lane = tl.arange(0, T)
    start = row * cols
    from_row = offset(row, row_sizes, x_rows)
    col = tile * T + lane
    live = col < cols
    key, _ = _read(words, None, x, start, from_row, col, x_col, live, PACKED, DESCENDING)
    digit = ((key >> shift) & (D - 1)).to(tl.int32) ^ flip
    word = in_order((tl.where(live, digit, D) << 16) | lane, LOG, V, LANES, OWN)
    digit = word >> 16
    live = digit < D
    to = tl.load(counts + (row * D + digit) * tiles + tile, live, other=0)
    to += tl.load(totals + row * D + digit, live, other=0) + lane
    # Read again in the order of the digits, so that neighbours go to neighbours.
    col = tile * T + (word & 65535)
    key, place = _read(words, places, x, start, from_row, col, x_col, live, PACKED, DESCENDING)
    if LAST:
        live = live & (to < keep)
        to = to.to(i.dtype)
        if values is not None:
            at = from_row + place * x_col
            store_element(values + offset(row, row_sizes, v_rows) + to * v_col, x, key, at, live, DESCENDING)
        if indices is not None:
            tl.store(indices + offset(row, row_sizes, i_rows) + to * i_col, place.to(tl.int64), live)
    elif PACKED:
        tl.store(into + start + to, (key.to(tl.int64) << 32) | place, live)
    else:
        tl.store(into + start + to, key, live)
        if into_places is not None:
            tl.store(into_places + start + to, place, live)


def radix_sort(
    values: Tensor | None, indices: Tensor | None, x: Tensor, layout: Rows, descending: bool, keep: int, bits: int = 0
) -> None:
    """Sort rows of any length; ``bits`` of the keys are known to differ at most, the lowest ones, or all may."""
    rows, cols, device = layout.rows, layout.cols, x.device
    # Zeros and NaNs have equal keys: their bits are looked up.
    located = indices is not None or x.dtype.is_floating_point
    width = key_bits(x.dtype)
    packed = located and width <= 32
    config = backends.arch().config("radix")
    blocks = bool(config["blocks"]) and (packed or not located)
    tile = BLOCK if blocks else TILE
    tiles = _layout.cdiv(cols, tile)
    digits = 2**BITS
    size = (rows * cols,)
    passes = _layout.cdiv(bits or width, BITS)
    words, places = [
        [torch.empty(size, dtype=dtype, device=device) if dtype and passes > 1 else None for _ in range(2)]
        for dtype in (
            torch.int64 if packed or width == 64 else torch.int32,
            None if packed or not located else torch.int32 if cols < 2**31 else torch.int64,
        )
    ]
    counts = torch.empty((rows * digits, tiles), dtype=torch.int32, device=device)
    totals = torch.empty((rows * digits,), dtype=torch.int32, device=device)
    bp = min(_layout.next_power_of_2(tiles), 2048)
    bd = min(digits, 2048 // bp)
    wide = layout.wide or counts.numel() >= 2**30
    meta = dict(PACKED=packed, DESCENDING=descending, D=digits, WIDE=wide)
    x_rows, v_rows, i_rows = layout.by_row
    for k in range(passes):
        first, last = k == 0, k == passes - 1
        # The digit of the sign: negative keys come first.
        flip = digits // 2 if last and not bits else 0
        shift = BITS * k
        source = (None, None) if first else (words[k % 2], places[k % 2])
        into = (None, None) if last else (words[1 - k % 2], places[1 - k % 2])
        results = (values, indices) if last else (None, None)
        read = x if source[0] is None else source[0]
        # Blocks: the elements of 16 bytes, in any order.
        side = min(PER, 16 // read.element_size()) if layout.by_col[0] == 1 or not first else 1
        launch(
            radix_block_count if blocks else radix_count, (rows * tiles,),
            (counts, source[0], x, layout.sizes, x_rows, layout.by_col[0], cols, tiles, shift, flip),
            dict(PACKED=packed, DESCENDING=descending, PER=PER, V=side, WIDE=wide, num_warps=WARPS) if blocks
            else dict(meta, T=tile, num_warps=COUNTING),
        )  # fmt: skip
        launch(
            radix_scan, (_layout.cdiv(rows * digits, bd),), (counts, totals, rows * digits, tiles),
            dict(BD=bd, BP=bp, WIDE=wide, num_warps=4),
        )  # fmt: skip
        launch(radix_base, (rows,), (totals,), dict(D=digits, WIDE=wide, num_warps=4))
        how = (layout.sizes, x_rows, v_rows, i_rows, *layout.by_col, cols, tiles, keep, shift, flip)
        if blocks:
            launch(
                radix_block_move, (rows * tiles,), (into[0], *results, source[0], x, counts, totals, *how),
                dict(PACKED=packed, DESCENDING=descending, LAST=last, PER=PER, WIDE=wide, num_warps=WARPS,
                     maxnreg=config["registers"]),
            )  # fmt: skip
        else:
            launch(
                radix_move, (rows * tiles,), (*into, *results, *source, x, counts, totals, *how),
                dict(meta, LAST=last, LOG=log2(TILE), num_warps=MOVING,
                     **neighbours(read, layout.by_col[0] if first else 1, TILE, MOVING)),
            )  # fmt: skip
