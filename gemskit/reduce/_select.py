"""The kernels behind topk: the largest elements without sorting the rest.

The elements of a piece of a row form groups. The k largest elements lie in the k groups with the largest maxima, so one pass
over the piece keeps the maxima, a sorting network takes k of them, and another one k of the elements of those groups. A last
launch takes k of the winners of all pieces. Words of key and position are all different: ties go to the smaller index.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit.reduce._sort import WORDS, Rows, key_bits, key_of, log2, smallest, sort_into, store_element

#: Largest k of the selection; more are sorted.
MOST = 1024
#: Words that one program chooses from at most: maxima of groups, and elements of the groups chosen or winners to join.
GROUPS, CHOICE = 4096, 8192
#: Elements of a piece, at least; about this many programs are wanted.
PIECE, PROGRAMS = 4096, 512


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
        group = smallest(tl.min(best, 0), LOGM, LOGK, LOGM, 0, 0)
        group = (group & most).to(tl.int32) % M
        place = tl.reshape(group[:, None] + (tl.arange(0, G) * M)[None, :], (K * G,))
    else:
        place = tl.arange(0, M)
    col = first + place
    word = word_of(x, from_row + col * x_col, place, col < cols, DESCENDING, LOW)
    word = smallest(word, LOGN, LOGK, LOGN, 0, 0)
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
    LOGK: tl.constexpr, LOGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first K of the winners of W / K pieces: as words for another join, or as the results.

    The places in words are those in a piece of SIZE elements; with SIZE 0, of words that were joined, those in the row.
    """
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row, group = i // groups, i % groups
    at = group * W + tl.arange(0, W)
    live = at < pieces * K
    word = tl.load(winners + row * pieces * K + at, live, other=0).to(tl.int64)
    if SIZE:
        word = ((word >> LOW) << 32) | ((at // K).to(tl.int64) * SIZE + (word & (2**LOW - 1)))
    word = smallest(tl.where(live, word, 0x7FFFFFFFFFFFFFFF), LOGN, LOGK, LOGN, 0, 0)
    pos = tl.arange(0, K)
    if joined is not None:
        tl.store(joined + i * K + pos, word)
    else:
        col = word & 0xFFFFFFFF
        live = pos < keep
        out = values + offset(row, row_sizes, v_rows) + pos * v_col
        at = offset(row, row_sizes, x_rows) + col * x_col
        store_element(out, x, (word >> 32).to(tl.int32), at, live, DESCENDING)
        tl.store(indices + offset(row, row_sizes, i_rows) + pos * i_col, col, live)


def topk_into(values: Tensor, indices: Tensor, x: Tensor, k: int, dim: int, largest: bool) -> None:
    """The first ``k`` of ``x`` along ``dim``, in order, into ``values`` and ``indices``."""
    if 0 in values.shape:
        return
    layout = Rows.of(x, values, indices, dim)
    bits = key_bits(x.dtype)
    width = max(2, _layout.next_power_of_2(k))
    if bits == 64 or width > MOST or layout.cols <= 2 * width:
        return sort_into(values, indices, x, dim, largest, k)
    rows, cols, device = layout.rows, layout.cols, x.device
    m, g = piece_of(rows, cols, width)
    pieces = _layout.cdiv(cols, m * g)
    low = 16 if bits <= 16 and m * g <= 65536 else 32
    step = min(g, max(1, 2048 // m))
    meta = dict(DESCENDING=largest, LOW=low, K=width, LOGK=log2(width), WIDE=layout.wide)
    how = (layout.sizes, *layout.by_row, *layout.by_col)
    chosen = width * g if g > 1 else m
    choose = dict(meta, M=m, G=g, STEP=step, LOGM=log2(m), LOGN=log2(chosen), num_warps=_warps(max(step * m, chosen)))
    if pieces == 1:
        return launch(topk_pieces, (rows,), (None, values, indices, x, *how, cols, 1, k), choose)
    words = torch.empty((rows, pieces, width), dtype=torch.int32 if low == 16 else torch.int64, device=device)
    launch(topk_pieces, (rows * pieces,), (words, None, None, x, *how, cols, pieces, k), choose)
    size = m * g
    while True:
        w = min(_layout.next_power_of_2(pieces * width), CHOICE)
        groups = _layout.cdiv(pieces * width, w)
        join = dict(meta, SIZE=size, W=w, LOGN=log2(w), num_warps=_warps(w))
        if groups == 1:
            return launch(topk_join, (rows,), (None, values, indices, words, x, *how, pieces, 1, k), join)
        joined = torch.empty((rows, groups, width), dtype=torch.int64, device=device)
        launch(topk_join, (rows * groups,), (joined, None, None, words, x, *how, pieces, groups, k), join)
        words, pieces, size = joined, groups, 0


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
