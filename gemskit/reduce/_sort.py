"""The kernels behind sorting: rows that fit into one program are sorted there, longer ones by a radix sort.

An element becomes a signed key in the same order (NaN largest, both zeros equal). A short row is one sorting network over
words of key and position, which makes it stable.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit.reduce._block_order import WARPS
from gemskit.reduce._keys import Rows, key_bits, key_of, log2, store_element
from gemskit.reduce._network import neighbours, sorted_words
from gemskit.reduce._radix import radix_sort
from gemskit.reduce._radix_blocks import TILE, sort_block_rows

#: Longest row that one program sorts, by the bits of its keys. Those of 64 bits are sorted twice; longer, 90 s to compile.
SHORT = {16: 8192, 32: 4096, 64: 1024}
#: Words that a warp of a sorting network holds, by their bits. H200, 8192 rows of 4096: bf16 0.69 ms with 2048, 1.23 with 1024;
#: float32 1.78 with 1024, 1.84 with 2048.
WORDS = {32: 2048, 64: 1024}


@jit
def _at(x, index):
    """``x[0, index]`` of one row, by shared memory. A gather of a matrix keeps rows within warps: hundreds of shuffles."""
    if x.shape[0] == 1:
        index = tl.reshape(index.to(tl.int32), (x.shape[1],))
        return tl.reshape(tl.gather(tl.reshape(x, (x.shape[1],)), index, 0), x.shape)
    else:
        return tl.gather(x, index.to(tl.int32), 1)


@jit
def sort_rows(
    values, indices, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, rows, cols, keep,
    DESCENDING: tl.constexpr, NARROW: tl.constexpr, TWICE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LOG: tl.constexpr, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr,
    LOOKUP: tl.constexpr, WIDE: tl.constexpr,
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
        low = _at(low, high & mask)
        key = (high - (high & mask)) + ((low >> half) + (mask // 2 + 1))
        found = low & mask
    elif NARROW:
        word = sorted_words((key << 16) | pos, LOG, RANK, V, LANES, OWN)
        key, found = word >> 16, word & 0xFFFF
    else:
        word = sorted_words((key.to(tl.int64) << 32) | pos, LOG, RANK, V, LANES, OWN)
        key, found = (word >> 32).to(tl.int32), word.to(tl.int32)
    if values is not None:
        out = values + offset(row, row_sizes, v_rows) + col * v_col
        if LOOKUP:
            # The row once more, from the cache: its bits take fewer registers than keys and addresses of what they do not tell.
            whole = tl.load(x + from_row + col * x_col, (row < rows) & (col < cols), eviction_policy="evict_first")
            tl.store(out, _at(whole, found), (row < rows) & (col < keep))
        else:
            at = from_row + found.to(i.dtype) * x_col
            store_element(out, x, key, at, (row < rows) & (col < keep), DESCENDING)
    if indices is not None:
        tl.store(
            indices + offset(row, row_sizes, i_rows) + col * i_col, found.to(tl.int64), (row < rows) & (col < keep)
        )


def sort_into(
    values: Tensor | None, indices: Tensor | None, x: Tensor, dim: int, descending: bool, keep: int | None = None,
    bits: int = 0,
) -> None:  # fmt: skip
    """Sort ``x`` along ``dim``, stably, into ``values`` and ``indices``: the first ``keep``, or all.

    ``bits``: at most so many of the keys differ, the lowest ones; 0 if that is not known.
    """
    if 0 in x.shape or keep == 0:
        return
    layout = Rows.of(x, values, indices, dim)
    keep = layout.cols if keep is None else keep
    rows = backends.arch().config("radix")["rows"]
    if rows and rows < layout.cols <= TILE and key_bits(x.dtype) <= 32:
        _sort_blocks(values, indices, x, layout, descending, keep)
    elif layout.cols <= SHORT[max(16, key_bits(x.dtype))]:
        _sort_short(values, indices, x, layout, descending, keep)
    else:
        radix_sort(values, indices, x, layout, descending, keep, bits)


def _sort_blocks(
    values: Tensor | None, indices: Tensor | None, x: Tensor, layout: Rows, descending: bool, keep: int
) -> None:
    bits = key_bits(x.dtype)
    per = max(1, _layout.next_power_of_2(layout.cols) // (32 * WARPS))
    how = (layout.sizes, *layout.by_row, *layout.by_col, layout.cols, keep, bits)
    registers = backends.arch().config("radix")["registers"]
    meta = dict(
        DESCENDING=descending, NARROW=bits <= 16, PER=per, WIDE=layout.wide, num_warps=WARPS, maxnreg=registers
    )  # fmt: skip
    launch(sort_block_rows, (layout.rows,), (values, indices, x, *how), meta)


def _sort_short(
    values: Tensor | None, indices: Tensor | None, x: Tensor, layout: Rows, descending: bool, keep: int
) -> None:
    bn = max(2, _layout.next_power_of_2(layout.cols))
    bm = min(max(1, 512 // bn), _layout.next_power_of_2(layout.rows))
    bits = key_bits(x.dtype)
    narrow, twice = bits <= 16, bits == 64
    warps = min(16, max(1, bm * bn // WORDS[32 if narrow else 64]))
    # Within a warp a gather is as many shuffles as a thread has words.
    meta = dict(
        LOOKUP=warps > 1, DESCENDING=descending, NARROW=narrow, TWICE=twice, BM=bm, BN=bn, LOG=log2(bn),
        RANK=log2(bm * bn), WIDE=layout.wide, num_warps=warps,
        **(neighbours(x, layout.by_col[0], bn, warps) if bm == 1 else {"V": 0, "LANES": 0, "OWN": 0}),
    )  # fmt: skip
    grid = (_layout.cdiv(layout.rows, bm),)
    how = (layout.sizes, *layout.by_row, *layout.by_col, layout.rows, layout.cols, keep)
    launch(sort_rows, grid, (values, indices, x, *how), meta)
