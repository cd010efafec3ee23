"""The kernels behind topk: the largest elements without sorting the rest.

A few: the elements of a piece of a row form groups. The k largest elements lie in the k groups with the largest maxima, so one
pass over the piece keeps the maxima, a sorting network takes k of them, and another one k of the elements of those groups. A
last launch takes k of the winners of all pieces.

Many: a piece stays in registers while a search bit by bit finds its k-th key, which says what is taken. So are k of the winners
of many pieces, until one piece is left, and only those k are sorted.

Words of key and position are all different: ties go to the smaller index.
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
from gemskit.reduce._network import in_order, neighbours, smallest
from gemskit.reduce._radix_blocks import TILE, topk_block_join
from gemskit.reduce._sort import sort_into

#: Largest k that networks choose, and that a search does; more are sorted.
FEW, MOST = 64, 4096
#: Words of a network that a warp holds.
WORDS = 1024
#: Words that one program chooses from at most: maxima of groups, and elements of the groups chosen or winners to join.
GROUPS, CHOICE = 4096, 8192
#: Elements of a piece, at least; about this many programs are wanted.
PIECE, PROGRAMS = 4096, 512
#: Elements of a piece that is searched, and winners of pieces that are searched together, at most.
SEARCH, JOIN = 8192, 16384
#: Elements next to each other that a thread counts by itself when it takes what a search found.
RUN = 4


@jit
def word_of(x, at, place, live, DESCENDING: tl.constexpr, LOW: tl.constexpr):
    """Key and place of elements; what is not live comes last, by its key and then by its place."""
    key = key_of(tl.load(x + at, live), DESCENDING)
    if LOW == 16:
        return (tl.where(live, key, 0x7FFF) << 16) | place
    else:
        return (tl.where(live, key, 0x7FFFFFFF).to(tl.int64) << 32) | place


@jit
def topk_pieces(
    winners, values, indices, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, cols, pieces, keep,
    DESCENDING: tl.constexpr, LOW: tl.constexpr, K: tl.constexpr, M: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr,
    LOGK: tl.constexpr, LOGM: tl.constexpr, LOGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first K of a piece of M * G elements: as words for ``topk_join``, or as the results."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, piece = i // pieces, i % pieces
    from_row = offset(row, row_sizes, x_rows)
    first = piece * (M * G)
    most: tl.constexpr = 2**LOW - 1
    if G > 1:
        # Group j has the elements j, j + M, j + 2 M .. of the piece.
        lane = (tl.arange(0, STEP) * M)[:, None] + tl.arange(0, M)[None, :]
        col = first + lane
        best = word_of(x, from_row + col * x_col, lane, col < cols, DESCENDING, LOW)
        for start in range(STEP * M, G * M, STEP * M):
            col = first + start + lane
            best = tl.minimum(best, word_of(x, from_row + col * x_col, start + lane, col < cols, DESCENDING, LOW))
        group = smallest(tl.min(best, 0), LOGM, LOGK, LOGM)
        group = (group & most).to(tl.int32) % M
        place = tl.reshape(group[:, None] + (tl.arange(0, G) * M)[None, :], (K * G,))
    else:
        place = tl.arange(0, M)
    col = first + place
    word = word_of(x, from_row + col * x_col, place, col < cols, DESCENDING, LOW)
    word = smallest(word, LOGN, LOGK, LOGN)
    pos = tl.arange(0, K)
    if winners is not None:
        tl.store(winners + i * K + pos, word)
    else:
        col = (first + (word & most)).to(i.dtype)
        key = (word >> LOW).to(tl.int32)
        live = pos < keep
        out = values + offset(row, row_sizes, v_rows) + pos * v_col
        store_element(out, x, key, from_row + col * x_col, live, DESCENDING)
        tl.store(indices + offset(row, row_sizes, i_rows) + pos * i_col, col.to(tl.int64), live)


@jit
def topk_join(
    joined, values, indices, winners, x, row_sizes, x_rows, v_rows, i_rows, x_col, v_col, i_col, pieces, groups, keep,
    DESCENDING: tl.constexpr, LOW: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr,
    LOGK: tl.constexpr, LOGN: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first K of the winners of W / K pieces: as words for another join, or as the results.

    The places in words are those in a piece of SIZE elements, and become those in the row; with SIZE 0 they are. With V all
    words are wanted, in order.
    """
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, group = i // groups, i % groups
    at = group * W + tl.arange(0, W)
    live = at < pieces * K
    word = tl.load(winners + row * pieces * K + at, live, other=0)
    low: tl.constexpr = 32 if SIZE else LOW
    if SIZE:
        word = word.to(tl.int64)
        word = ((word >> LOW) << 32) | ((at // K).to(tl.int64) * SIZE + (word & (2**LOW - 1)))
    word = tl.where(live, word, 2 ** (2 * low - 1) - 1)
    if V:
        word = in_order(word, LOGN, V, LANES, OWN)
    else:
        word = smallest(word, LOGN, LOGK, LOGN)
    pos = tl.arange(0, K)
    if joined is not None:
        tl.store(joined + i * K + pos, word)
    else:
        col = (word & (2**low - 1)).to(tl.int64)
        live = pos < keep
        out = values + offset(row, row_sizes, v_rows) + pos * v_col
        at = offset(row, row_sizes, x_rows) + col * x_col
        store_element(out, x, (word >> low).to(tl.int32), at, live, DESCENDING)
        tl.store(indices + offset(row, row_sizes, i_rows) + pos * i_col, col, live)


@jit
def _entry(words, x, row, from_row, col, x_col, cols, DESCENDING: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr):
    """Key and word at ``col`` of a row: of ``words``, or else of ``x``. What is not there comes last, by its key and position."""
    if words is None:
        key = key_of(tl.load(x + from_row + col * x_col, col < cols), DESCENDING)
        key = tl.where(col < cols, key, 2 ** (BITS - 1) - 1)
        if LOW == 16:
            word = (key << 16) | col.to(tl.int32)
        else:
            word = (key.to(tl.int64) << 32) | col
    else:
        word = tl.load(words + row * cols + col, col < cols, other=2 ** (2 * LOW - 1) - 1)
        key = (word >> LOW).to(tl.int32)
    return key, word


@jit
def topk_search(
    winners, words, x, row_sizes, x_rows, x_col, cols, pieces, keep,
    DESCENDING: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first ``keep`` of a piece of N elements, or of N such words, as words in the order of their positions."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, piece = i // pieces, i % pieces
    from_row = offset(row, row_sizes, x_rows)
    first = piece * N
    key, _ = _entry(words, x, row, from_row, first + tl.arange(0, N), x_col, cols, DESCENDING, LOW, BITS)
    # The largest bound that at most ``keep`` keys are less than: if they are not so many, it is the last key to take.
    half: tl.constexpr = 2 ** (BITS - 1)
    bound, step, less = tl.full((), -half, tl.int64), tl.full((), half, tl.int64), tl.full((), 0, tl.int32)
    while (step > 0) & (less < keep):
        count = tl.sum((key < (bound + step).to(tl.int32)).to(tl.int32), 0)
        bound = tl.where(count <= keep, bound + step, bound)
        less = tl.where(count <= keep, count, less)
        step = step >> 1
    last = bound.to(tl.int32)
    # Read again in parts, which takes few registers. One scan counts those less than the last key and, times 65536, those equal.
    # In columns of RUN: of a vector of halves Triton scans a second time, in the layout of the store, by shuffles.
    before = tl.full((), 0, tl.int32)
    for start in range(0, N, PART):
        col = first + start + (tl.arange(0, PART // RUN) * RUN)[None, :] + tl.arange(0, RUN)[:, None]
        part, word = _entry(words, x, row, from_row, col, x_col, cols, DESCENDING, LOW, BITS)
        one = tl.where(part < last, 1, tl.where(part == last, 65536, 0))
        run = tl.sum(one, 0)
        rank = (tl.cumsum(run, 0) - run + before)[None, :] + tl.cumsum(one, 0) - one
        before += tl.sum(run, 0)
        equal = rank >> 16
        taken = (one == 1) | ((one == 65536) & (equal < keep - less))
        tl.store(winners + i * keep + (rank & 65535) + tl.minimum(equal, keep - less), word, taken)


def topk_into(values: Tensor, indices: Tensor, x: Tensor, k: int, dim: int, largest: bool) -> None:
    """The first ``k`` of ``x`` along ``dim``, in order, into ``values`` and ``indices``."""
    if 0 in values.shape:
        return
    layout = Rows.of(x, values, indices, dim)
    width = max(2, _layout.next_power_of_2(k))
    if key_bits(x.dtype) == 64 or width > MOST or layout.cols <= 2 * width:
        sort_into(values, indices, x, dim, largest, k)
    elif width > FEW:
        _topk_many(values, indices, x, k, width, layout, largest)
    else:
        _topk_few(values, indices, x, k, width, layout, largest)


def _topk_few(values: Tensor, indices: Tensor, x: Tensor, k: int, width: int, layout: Rows, largest: bool) -> None:
    """With networks alone: :func:`topk_pieces`, and joins of their winners."""
    rows, cols, device = layout.rows, layout.cols, x.device
    m, g = piece_of(rows, cols, width)
    pieces = _layout.cdiv(cols, m * g)
    low = 16 if key_bits(x.dtype) <= 16 and m * g <= 65536 else 32
    step = min(g, max(1, 2048 // m))
    meta = dict(DESCENDING=largest, K=width, LOGK=log2(width), WIDE=layout.wide)
    how = (layout.sizes, *layout.by_row, *layout.by_col)
    chosen = width * g if g > 1 else m
    choose = dict(
        meta, LOW=low, M=m, G=g, STEP=step, LOGM=log2(m), LOGN=log2(chosen), num_warps=_warps(max(step * m, chosen))
    )
    if pieces == 1:
        return launch(topk_pieces, (rows,), (None, values, indices, x, *how, cols, 1, k), choose)
    words = torch.empty((rows, pieces, width), dtype=torch.int32 if low == 16 else torch.int64, device=device)
    launch(topk_pieces, (rows * pieces,), (words, None, None, x, *how, cols, pieces, k), choose)
    size = m * g
    while True:
        w = min(_layout.next_power_of_2(pieces * width), CHOICE)
        groups = _layout.cdiv(pieces * width, w)
        join = dict(meta, LOW=low, SIZE=size, W=w, LOGN=log2(w), V=0, LANES=0, OWN=0, num_warps=_warps(w))
        if groups == 1:
            return launch(topk_join, (rows,), (None, values, indices, words, x, *how, pieces, 1, k), join)
        joined = torch.empty((rows, groups, width), dtype=torch.int64, device=device)
        launch(topk_join, (rows * groups,), (joined, None, None, words, x, *how, pieces, groups, k), join)
        words, pieces, size, low = joined, groups, 0, 32


def _topk_many(values: Tensor, indices: Tensor, x: Tensor, k: int, width: int, layout: Rows, largest: bool) -> None:
    """With searches, until one piece is left, whose winners are put in order."""
    rows, cols = layout.rows, layout.cols
    n = min(_layout.next_power_of_2(cols), SEARCH)
    # More programs, where there are several pieces and the winners of all still fit into one.
    while cols > n >= 8 * width and rows * cols < PROGRAMS * n and 2 * cols <= JOIN // width * n:
        n //= 2
    bits = key_bits(x.dtype)
    low = 16 if bits <= 16 and _layout.cdiv(cols, n) * n <= 65536 else 32
    meta = dict(DESCENDING=largest, LOW=low, WIDE=layout.wide)
    words = None
    while words is None or cols > width:
        pieces = _layout.cdiv(cols, n)
        winners = torch.empty((rows, pieces, width), dtype=torch.int32 if low == 16 else torch.int64, device=x.device)
        launch(
            topk_search, (rows * pieces,),
            (winners, words, x if words is None else None, layout.sizes, layout.by_row[0], layout.by_col[0],
             cols, pieces, width),
            dict(meta, BITS=bits, N=n, PART=n // 4, RUN=min(RUN, n // 4), num_warps=max(1, min(16, n // 512))),
        )  # fmt: skip
        words, cols = winners, pieces * width
        n = min(_layout.next_power_of_2(cols), JOIN)
    if backends.arch().config("radix")["blocks"] and 32 * WARPS <= width <= TILE:
        return launch(
            topk_block_join, (rows,),
            (values, indices, words, x, layout.sizes, *layout.by_row, *layout.by_col, k, bits),
            dict(meta, PER=width // (32 * WARPS), num_warps=WARPS),
        )  # fmt: skip
    # One warp has fewer instructions, several take less time: of a few rows.
    warps = max(1, width // (WORDS if rows >= PROGRAMS else 256))
    launch(
        topk_join, (rows,),
        (None, values, indices, words, x, layout.sizes, *layout.by_row, *layout.by_col, 1, 1, k),
        dict(meta, K=width, SIZE=0, W=width, LOGK=log2(width), LOGN=log2(width), num_warps=warps,
             **neighbours(words, 1, width, warps)),
    )  # fmt: skip


def piece_of(rows: int, cols: int, width: int) -> tuple[int, int]:
    """Groups of a piece, and elements of a group: as many programs as keep the device busy, and as little as possible
    for each to choose from."""
    size = min(_layout.next_power_of_2(cols), GROUPS * CHOICE // width)
    while size > max(PIECE, 4 * width) and rows * _layout.cdiv(cols, size) < PROGRAMS:
        size //= 2
    ratio = (size // width).bit_length() - 1
    g = 1 << (ratio + 1) // 2 if ratio > 2 else 1
    return size // g, g


def _warps(words: int) -> int:
    return min(16, max(4, words // WORDS)) if words > 2048 else max(1, words // 512)
