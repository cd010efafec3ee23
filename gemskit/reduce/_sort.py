"""The kernels behind sorting: rows that fit into one program are sorted there, longer ones by a radix sort.

An element becomes a signed key in the same order (NaN largest, both zeros equal). A short row is one sorting network over
words of key and position, which makes it stable. A long row takes one pass for every 8 bits of the key, lowest first: count
the digits of every tile, scan the counts, then sort every tile by its digit and store each run where it belongs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset

#: Longest row that one program sorts, by the bits of its keys. Those of 64 bits are sorted twice; longer, 90 s to compile.
SHORT = {16: 8192, 32: 4096, 64: 1024}
#: Words that a warp of a sorting network holds, by their bits. H200, 8192 rows of 4096: bf16 0.82 ms with 2048, 1.14 with 1024;
#: float32 1.84 with 1024, 2.03 with 2048.
WORDS = {32: 2048, 64: 1024}
#: Elements of a program of the radix sort, and the warps that count and move them. H200, 16M float32: 1.48 ms with one warp for
#: 1024, 1.78 for 512; two warps for 1024, which need barriers, 1.86.
TILE, COUNTING, MOVING = 1024, 2, 1


# ---- keys ----------------------------------------------------------------------------------------------------------


@jit
def key_of(x, DESCENDING: tl.constexpr):
    """A signed integer in the order of the elements: int64 for elements of 64 bits, else int32."""
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    if x.dtype.is_floating():
        if bits == 64:
            b = x.to(tl.int64, bitcast=True)
            infinity: tl.constexpr = 0x7FF0000000000000
        elif bits == 32:
            b = x.to(tl.int32, bitcast=True)
            infinity: tl.constexpr = 0x7F800000
        else:
            b = x.to(tl.int16, bitcast=True).to(tl.int32)
            infinity: tl.constexpr = 0x7C00 if x.dtype == tl.float16 else 0x7F80
        most: tl.constexpr = 2 ** (bits - 1) - 1
        size = b & most
        key = b ^ ((b >> (bits - 1)) & most)
        key = tl.where(size > infinity, most, tl.where(size == 0, 0, key))
    elif bits == 64:
        key = x
    elif x.dtype == tl.uint8 or x.dtype == tl.int1:
        key = x.to(tl.int32) - 128
    else:
        key = x.to(tl.int32)
    return ~key if DESCENDING else key


@jit
def store_element(out, x, key, at, live, DESCENDING: tl.constexpr):
    """Store to ``out`` the element of ``key``; that at ``x + at`` where the key does not tell (zeros and NaNs)."""
    ty: tl.constexpr = x.dtype.element_ty
    bits: tl.constexpr = ty.primitive_bitwidth
    if bits == 64:
        tl.store(out, tl.load(x + at, live), live)
    else:
        if DESCENDING:
            key = ~key
        if ty.is_floating():
            most: tl.constexpr = 2 ** (bits - 1) - 1
            b = key ^ ((key >> (bits - 1)) & most)
            value = (b if bits == 32 else b.to(tl.int16)).to(ty, bitcast=True)
            value = tl.load(x + at, live & ((key == 0) | (key == most)), other=value)
        elif ty == tl.int1:
            value = key + 128 != 0
        elif ty == tl.uint8:
            value = (key + 128).to(ty)
        else:
            value = key.to(ty)
        tl.store(out, value, live)


# ---- sorting networks ----------------------------------------------------------------------------------------------


@jit
def _bit(rank: tl.constexpr, j: tl.constexpr):
    """Bit ``j`` of the position, in a cube of ``rank`` dimensions of size 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (rank - 1 - j) + [2] + [1] * j)


@jit
def _step(h, rank: tl.constexpr, j: tl.constexpr, OWN: tl.constexpr):
    """Order each pair of words whose positions differ in bit ``j``."""
    if j < OWN:
        # Within a thread, where most steps are: a minimum and a maximum for each pair, nothing else is left of this.
        low = tl.min(h, rank - 1 - j, keep_dims=True)
        high = tl.max(h, rank - 1 - j, keep_dims=True)
        return tl.where(_bit(rank, j) == 1, high, low)
    else:
        # One shuffle a word, which costs as much as four other instructions.
        other = h ^ tl.xor_sum(h, rank - 1 - j, True)
        return tl.where((h > other) ^ (_bit(rank, j) == 1), other, h)


@jit
def _merge(h, rank: tl.constexpr, stage: tl.constexpr, turn: tl.constexpr, OWN: tl.constexpr):
    """Sort bitonic runs of 2**stage; with ``turn`` every second one in descending order."""
    # Flipping all bits turns the order around: so every step is a plain minimum or maximum.
    if turn:
        h = h ^ (-_bit(rank, stage)).to(h.dtype)
    for i in tl.static_range(stage):
        h = _step(h, rank, stage - 1 - i, OWN)
    if turn:
        h = h ^ (-_bit(rank, stage)).to(h.dtype)
    return h


@jit
def smallest(
    x,
    LOG: tl.constexpr,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    OWN: tl.constexpr,
):
    """The 2**KEEP smallest words, in order, of each 2**LOG along the last dimension of a block of 2**RANK.

    One row (LOG = RANK) is first read in another order, in which the 2**OWN words of a thread are neighbours: then most steps
    stay within threads. Where LANES threads loaded V neighbours each, in turns, no word moves for that. Words must be different.
    """
    h = x
    if V:
        h = tl.permute(tl.reshape(h, (2**RANK // (LANES * V), LANES, V)), (1, 0, 2))
    h = tl.reshape(h, [2] * RANK)
    for s in tl.static_range(1, KEEP + 1):
        h = _merge(h, RANK, s, s < LOG, OWN)
    for s in tl.static_range(KEEP + 1, LOG + 1):
        # Of two runs, one in descending order, the smaller halves: those form a bitonic run.
        h = tl.min(h, RANK - s)
        h = _merge(h, RANK - s + KEEP, KEEP, s < LOG, 0 if V == 0 else OWN)
    return tl.reshape(h, x.shape[:-1] + [2**KEEP])


@jit
def in_order(x, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr):
    """All 2**RANK words in order, as by :func:`smallest`: its stages are one loop, which compiles in a fraction of the time."""
    h = tl.permute(tl.reshape(x, (2**RANK // (LANES * V), LANES, V)), (1, 0, 2))
    h = tl.reshape(h, [2] * RANK)
    pos = tl.reshape(tl.arange(0, 2**RANK), [2] * RANK)
    for stage in range(1, RANK + 1):
        turn = (-((pos >> stage) & 1)).to(h.dtype)
        h = h ^ turn
        for i in tl.static_range(RANK):
            if stage > RANK - 1 - i:
                h = _step(h, RANK, RANK - 1 - i, OWN)
        h = h ^ turn
    return tl.reshape(h, x.shape)


@jit
def sorted_words(x, LOG: tl.constexpr, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr):
    """Each 2**LOG words along the last dimension in order: one row by :func:`in_order`, several by :func:`smallest`."""
    if V:
        return in_order(x, RANK, V, LANES, OWN)
    else:
        return smallest(x, LOG, LOG, RANK, V, LANES, OWN)


# ---- rows that fit into a program ----------------------------------------------------------------------------------


@jit
def sort_rows(
    values, indices, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, rows, cols, keep,
    DESCENDING: tl.constexpr, NARROW: tl.constexpr, TWICE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LOG: tl.constexpr, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sort BM rows; the first ``keep`` of each are stored. NARROW: keys of at most 16 bits, so that words have 32."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row = (i * BM + tl.arange(0, BM))[:, None]
    pos = tl.broadcast_to(tl.arange(0, BN)[None, :], (BM, BN))
    col = pos.to(i.dtype)
    live = (row < rows) & (col < cols)
    from_row = offset(row, row_sizes, x_rows)
    key = key_of(tl.load(x + from_row + col * x_col, live), DESCENDING)
    # What is no element comes last: it has the largest key and the last positions.
    bits: tl.constexpr = 16 if NARROW else key.dtype.primitive_bitwidth
    most: tl.constexpr = 2 ** (bits - 1) - 1
    key = tl.where(live, key, most)
    if TWICE:
        # By the lower half of the key, then by the upper one: words of the size of the key.
        half: tl.constexpr = bits // 2
        mask: tl.constexpr = 2**half - 1
        low = sorted_words((((key & mask) - (mask // 2 + 1)) << half) | pos, LOG, RANK, V, LANES, OWN)
        found = (low & mask).to(i.dtype)
        live = (row < rows) & (found < cols)
        key = tl.where(live, key_of(tl.load(x + from_row + found * x_col, live), DESCENDING), most)
        high = sorted_words(((key >> half) << half) | pos, LOG, RANK, V, LANES, OWN)
        low = tl.gather(low, (high & mask).to(tl.int32), 1)
        key = (high - (high & mask)) + ((low >> half) + (mask // 2 + 1))
        found = low & mask
    elif NARROW:
        word = sorted_words((key << 16) | pos, LOG, RANK, V, LANES, OWN)
        key, found = word >> 16, word & 0xFFFF
    else:
        word = sorted_words((key.to(tl.int64) << 32) | pos, LOG, RANK, V, LANES, OWN)
        key, found = (word >> 32).to(tl.int32), word.to(tl.int32)
    live = (row < rows) & (col < keep)
    found = found.to(i.dtype)
    if values is not None:
        out = values + offset(row, row_sizes, v_rows) + col * v_col
        store_element(out, x, key, from_row + found * x_col, live, DESCENDING)
    if indices is not None:
        tl.store(indices + offset(row, row_sizes, i_rows) + col * i_col, found.to(tl.int64), live)


# ---- radix sort ----------------------------------------------------------------------------------------------------


@jit
def entry(source, x, start, from_row, col, x_col, live, FIRST: tl.constexpr, DESCENDING: tl.constexpr):
    """Key and index of what stands at ``col`` of a row: of the input in the FIRST pass, else of the words so far."""
    wide: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 64
    if FIRST:
        index = col
        key = key_of(tl.load(x + from_row + col * x_col, live), DESCENDING)
    else:
        word = tl.load(source + start + col, live)
        if wide:
            # No room for the key: words are indices, and the element is looked up.
            index = word
            key = key_of(tl.load(x + from_row + index * x_col, live), DESCENDING)
        else:
            index = word & 0xFFFFFFFF
            key = (word >> 32).to(tl.int32)
    return key, index


@jit(do_not_specialize=["shift", "flip"])
def radix_count(
    counts, source, x, row_sizes, x_rows, x_col, cols, tiles, shift, flip,
    FIRST: tl.constexpr, DESCENDING: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """How often each digit occurs in a tile of a row, and (times 65536) how many elements have a smaller digit there."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, tile = i // tiles, i % tiles
    col = tile * T + tl.arange(0, T)
    live = col < cols
    key, _ = entry(source, x, row * cols, offset(row, row_sizes, x_rows), col, x_col, live, FIRST, DESCENDING)
    digit = ((key >> shift) & 255).to(tl.int32) ^ flip
    found = tl.histogram(digit, 256, live)
    smaller = tl.cumsum(found, 0) - found
    tl.store(counts + (row * 256 + tl.arange(0, 256)) * tiles + tile, found | (smaller << 16))


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
def radix_base(totals, WIDE: tl.constexpr):
    """Turn the totals of the digits of a row into how many elements have smaller digits."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    at = totals + i * 256 + tl.arange(0, 256)
    total = tl.load(at)
    tl.store(at, tl.cumsum(total, 0) - total)


@jit(do_not_specialize=["shift", "flip"])
def radix_move(
    target, values, indices, source, x, counts, totals,
    row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, cols, tiles, keep, shift, flip,
    FIRST: tl.constexpr, LAST: tl.constexpr, DESCENDING: tl.constexpr, T: tl.constexpr, LOG: tl.constexpr,
    V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Move the elements of a tile to where their digits belong; the LAST pass stores the results."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, tile = i // tiles, i % tiles
    lane = tl.arange(0, T)
    col = tile * T + lane
    live = col < cols
    start, from_row = row * cols, offset(row, row_sizes, x_rows)
    key, _ = entry(source, x, start, from_row, col, x_col, live, FIRST, DESCENDING)
    digit = ((key >> shift) & 255).to(tl.int32) ^ flip
    word = sorted_words((tl.where(live, digit, 256) << 16) | lane, LOG, LOG, V, LANES, OWN)
    digit = word >> 16
    live = digit < 256
    to = tl.load(counts + (row * 256 + digit) * tiles + tile, live, other=0)
    to += tl.load(totals + row * 256 + digit, live, other=0) + lane
    # Read again in the order of the digits, so that neighbours go to neighbours.
    col = tile * T + (word & 65535)
    key, index = entry(source, x, start, from_row, col, x_col, live, FIRST, DESCENDING)
    if LAST:
        live = live & (to < keep)
        to = to.to(i.dtype)
        if values is not None:
            at = from_row + index * x_col
            store_element(values + offset(row, row_sizes, v_rows) + to * v_col, x, key, at, live, DESCENDING)
        if indices is not None:
            tl.store(indices + offset(row, row_sizes, i_rows) + to * i_col, index.to(tl.int64), live)
    elif x.dtype.element_ty.primitive_bitwidth == 64:
        tl.store(target + start + to, index.to(tl.int64), live)
    else:
        tl.store(target + start + to, (key.to(tl.int64) << 32) | index, live)


# ---- the host's part -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """``x`` as rows along ``dim``, and the results beside it."""

    rows: int
    cols: int
    sizes: tuple[int, ...]
    #: Strides of the rows of x, values and indices, and those along them.
    by_row: tuple[tuple[int, ...], ...]
    by_col: tuple[int, ...]
    wide: bool

    @classmethod
    def of(cls, x: Tensor, values: Tensor | None, indices: Tensor | None, dim: int) -> Rows:
        """The results may be shorter along ``dim`` (topk) or missing."""
        shape = tuple(x.shape) or (1,)
        dim %= len(shape)
        strides = [(0,) * len(shape) if t is None else tuple(t.stride()) or (1,) for t in (x, values, indices)]
        kept = [d for d in range(len(shape)) if d != dim]
        sizes, by_row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in strides])
        # Row numbers times 256 digits count the counts.
        wide = _layout.is_wide(shape, strides) or math.prod(shape) >= 2**30
        return cls(math.prod(sizes), shape[dim], sizes, tuple(by_row), tuple(s[dim] for s in strides), wide)


def key_bits(dtype: torch.dtype) -> int:
    """How many bits of a key differ."""
    return dtype.itemsize * 8


def sort_into(
    values: Tensor | None, indices: Tensor | None, x: Tensor, dim: int, descending: bool, keep: int | None = None
) -> None:
    """Sort ``x`` along ``dim``, stably, into ``values`` and ``indices``: the first ``keep``, or all."""
    if 0 in x.shape or keep == 0:
        return
    layout = Rows.of(x, values, indices, dim)
    keep = layout.cols if keep is None else keep
    bits = key_bits(x.dtype)
    if layout.cols <= SHORT[max(16, bits)]:
        _sort_short(values, indices, x, layout, descending, keep)
    else:
        _sort_long(values, indices, x, layout, descending, keep)


def neighbours(x: Tensor, step: int, words: int, warps: int) -> dict[str, int]:
    """How a row is loaded: V elements by each of LANES threads in turns, 2**OWN in all, as :func:`smallest` takes it."""
    lanes = 32 * warps
    each = min(16 // x.element_size() if step == 1 else 1, words // lanes)
    return {"V": each, "LANES": lanes, "OWN": log2(words // lanes)}


def _sort_short(
    values: Tensor | None, indices: Tensor | None, x: Tensor, layout: Rows, descending: bool, keep: int
) -> None:
    bn = max(2, _layout.next_power_of_2(layout.cols))
    bm = min(max(1, 512 // bn), _layout.next_power_of_2(layout.rows))
    bits = key_bits(x.dtype)
    narrow, twice = bits <= 16, bits == 64
    warps = min(16, max(1, bm * bn // WORDS[32 if narrow else 64]))
    meta = dict(
        DESCENDING=descending, NARROW=narrow, TWICE=twice, BM=bm, BN=bn, LOG=log2(bn), RANK=log2(bm * bn), WIDE=layout.wide,
        num_warps=warps, **(neighbours(x, layout.by_col[0], bn, warps) if bm == 1 else {"V": 0, "LANES": 0, "OWN": 0}),
    )  # fmt: skip
    grid = (_layout.cdiv(layout.rows, bm),)
    how = (layout.sizes, *layout.by_row, *layout.by_col, layout.rows, layout.cols, keep)
    launch(sort_rows, grid, (values, indices, x, *how), meta)


def _sort_long(
    values: Tensor | None, indices: Tensor | None, x: Tensor, layout: Rows, descending: bool, keep: int
) -> None:
    rows, cols, tile = layout.rows, layout.cols, TILE
    tiles = _layout.cdiv(cols, tile)
    passes = key_bits(x.dtype) // 8
    words: Sequence[Tensor | None] = (None, None)
    if passes > 1:
        words = torch.empty((2, rows * cols), dtype=torch.int64, device=x.device).unbind()
    counts = torch.empty((rows * 256, tiles), dtype=torch.int32, device=x.device)
    totals = torch.empty((rows * 256,), dtype=torch.int32, device=x.device)
    bp = min(_layout.next_power_of_2(tiles), 2048)
    bd = min(256, 2048 // bp)
    wide = layout.wide or counts.numel() >= 2**30
    meta = dict(DESCENDING=descending, T=tile, WIDE=wide)
    x_rows, v_rows, i_rows = layout.by_row
    for k in range(passes):
        source, target = words[k % 2], words[1 - k % 2]
        first, last = k == 0, k == passes - 1
        into = (None, values, indices) if last else (target, None, None)
        read = x if first else source
        assert read is not None
        # The digit of the sign: negative keys come first.
        digit = (8 * k, 128 if last else 0)
        launch(
            radix_count, (rows * tiles,),
            (counts, None if first else source, x, layout.sizes, x_rows, layout.by_col[0], cols, tiles, *digit),
            dict(meta, FIRST=first, num_warps=COUNTING),
        )  # fmt: skip
        launch(
            radix_scan, (_layout.cdiv(rows * 256, bd),), (counts, totals, rows * 256, tiles),
            dict(BD=bd, BP=bp, WIDE=wide, num_warps=4),
        )  # fmt: skip
        launch(radix_base, (rows,), (totals,), dict(WIDE=wide, num_warps=4))
        launch(
            radix_move, (rows * tiles,),
            (*into, None if first else source, x, counts, totals, layout.sizes, x_rows, v_rows, i_rows, *layout.by_col,
             cols, tiles, keep, *digit),
            dict(meta, FIRST=first, LAST=last, LOG=log2(tile), num_warps=MOVING,
                 **neighbours(read, layout.by_col[0] if first else 1, tile, MOVING)),
        )  # fmt: skip


def log2(n: int) -> int:
    """Of a power of 2."""
    return n.bit_length() - 1
