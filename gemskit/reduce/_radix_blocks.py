"""The moves of a radix sort by blocks in shared memory (:mod:`gemskit.reduce._block_order`), where a device has them.

Keys of 32 bits or fewer, or words without places. Rows that fit into a block are sorted there in all their digits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemskit._layout import offset
from gemskit.reduce._block_count import counted, places
from gemskit.reduce._block_order import WARPS, in_order_of, rows_of_32
from gemskit.reduce._keys import key_of, store_element

#: Elements of a thread in a move, and those of its tile.
PER = 16
TILE = WARPS * 32 * PER


@gluon.jit
def _lanes(PER: gl.constexpr):
    """The places (rows, 32) of a program's elements."""
    layout: gl.constexpr = rows_of_32(PER)
    WARPS: gl.constexpr = layout.warps_per_cta[0]
    row = gl.arange(0, WARPS * PER, gl.SliceLayout(1, layout))[:, None]
    return row * 32 + gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]


@gluon.jit(do_not_specialize=["shift", "flip"])
def radix_block_count(
    counts, words, x, row_sizes, x_rows, x_col, cols, tiles, shift, flip,
    PACKED: gl.constexpr, DESCENDING: gl.constexpr, PER: gl.constexpr, V: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """How often each digit occurs in a tile, as ``radix_count`` does; a thread reads V elements side by side."""
    i = gl.program_id(0)
    if WIDE:
        i = i.to(gl.int64)
    row, tile = i // tiles, i % tiles
    place, bin, of_thread = places(PER, V)
    col = tile * (place.shape[1] * PER) + place
    live = col < cols
    if words is not None:
        key = gl.load(words + row * cols + col, live)
        if PACKED:
            key = (key >> 32).to(gl.int32)
    else:
        key = key_of(gl.load(x + offset(row, row_sizes, x_rows) + col * x_col, live), DESCENDING)
    digit = ((key >> shift) & 255).to(gl.int32) ^ flip
    found = counted(gl.where(live, digit, 256), 256, True)
    gl.store(counts + (row * 256 + bin) * tiles + tile, found, of_thread < 1)


@gluon.jit(do_not_specialize=["shift", "flip"])
def radix_block_move(
    into, values, indices, words, x, counts, totals,
    row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, cols, tiles, keep, shift, flip,
    PACKED: gl.constexpr, LAST: gl.constexpr, DESCENDING: gl.constexpr, PER: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Move the elements of a tile to where their digits belong, as ``radix_move`` does; the LAST pass stores the results."""
    i = gl.program_id(0)
    if WIDE:
        i = i.to(gl.int64)
    row, tile = i // tiles, i % tiles
    lane = _lanes(PER)
    start = row * cols
    from_row = offset(row, row_sizes, x_rows)
    col = tile * (lane.shape[0] * 32) + lane
    # What is no element has the last digit and the last places: it stays behind all others.
    live = col < cols
    if words is not None:
        word = gl.load(words + start + col, live)
    else:
        word = key_of(gl.load(x + from_row + col * x_col, live), DESCENDING)
        if PACKED:
            word = (word.to(gl.int64) << 32) | col
    BASE: gl.constexpr = 32 if PACKED else 0
    digit = ((word >> (BASE + shift)) & 255).to(gl.int32) ^ flip
    word = in_order_of(gl.where(live, digit, 255), word, PER)
    digit = ((word >> (BASE + shift)) & 255).to(gl.int32) ^ flip
    to = gl.load(counts + (row * 256 + digit) * tiles + tile, live, other=0)
    to += gl.load(totals + row * 256 + digit, live, other=0) + lane
    if LAST:
        live = live & (to < keep)
        to = to.to(i.dtype)
        if PACKED:
            place = word & 0xFFFFFFFF
            key = (word >> 32).to(gl.int32)
        else:
            place = word
            key = word
        if values is not None:
            at = from_row + place * x_col
            store_element(values + offset(row, row_sizes, v_rows) + to * v_col, x, key, at, live, DESCENDING)
        if indices is not None:
            gl.store(indices + offset(row, row_sizes, i_rows) + to * i_col, place.to(gl.int64), live)
    else:
        gl.store(into + start + to, word, live)


@gluon.jit
def _by_keys(word, bits, LOW: gl.constexpr, PER: gl.constexpr):
    """Words in the order of their keys, signed ints of ``bits`` above LOW others, stably."""
    for shift in range(0, bits, 8):
        digit = ((word >> (LOW + shift)) & 255).to(gl.int32)
        word = in_order_of(digit ^ gl.where(shift + 8 == bits, 128, 0), word, PER)
    return word


@gluon.jit(do_not_specialize=["bits"])
def sort_block_rows(
    values, indices, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, cols, keep, bits,
    DESCENDING: gl.constexpr, NARROW: gl.constexpr, PER: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Sort a row; the first ``keep`` are stored. NARROW: keys of at most 16 bits, so that words have 32."""
    i = gl.program_id(0)
    if WIDE:
        i = i.to(gl.int64)
    lane = _lanes(PER)
    col = lane.to(i.dtype)
    live = col < cols
    from_row = offset(i, row_sizes, x_rows)
    key = key_of(gl.load(x + from_row + col * x_col, live), DESCENDING)
    # What is no element has the largest key and the last places.
    MOST: gl.constexpr = 127 if x.dtype.element_ty.primitive_bitwidth <= 8 else 0x7FFF if NARROW else 0x7FFFFFFF
    key = gl.where(live, key, MOST)
    if NARROW:
        word = (key << 16) | lane
    else:
        word = (key.to(gl.int64) << 32) | lane
    LOW: gl.constexpr = 16 if NARROW else 32
    word = _by_keys(word, bits, LOW, PER)
    key = (word >> LOW).to(gl.int32)
    found = (word & (2**LOW - 1)).to(gl.int32)
    live = col < keep
    if values is not None:
        out = values + offset(i, row_sizes, v_rows) + col * v_col
        store_element(out, x, key, from_row + found.to(i.dtype) * x_col, live, DESCENDING)
    if indices is not None:
        gl.store(indices + offset(i, row_sizes, i_rows) + col * i_col, found.to(gl.int64), live)


@gluon.jit(do_not_specialize=["bits"])
def topk_block_join(
    values, indices, words, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, keep, bits,
    DESCENDING: gl.constexpr, LOW: gl.constexpr, PER: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The elements of ``words``, all of a program's, which are in the order of their places: in order."""
    i = gl.program_id(0)
    if WIDE:
        i = i.to(gl.int64)
    lane = _lanes(PER)
    word = _by_keys(gl.load(words + i * (lane.shape[0] * 32) + lane), bits, LOW, PER)
    live = lane < keep
    col = (word & (2**LOW - 1)).to(gl.int64)
    at = offset(i, row_sizes, x_rows) + col * x_col
    out = values + offset(i, row_sizes, v_rows) + lane * v_col
    store_element(out, x, (word >> LOW).to(gl.int32), at, live, DESCENDING)
    gl.store(indices + offset(i, row_sizes, i_rows) + lane * i_col, col, live)
