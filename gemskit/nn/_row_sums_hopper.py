"""Rows and sums over them as in :mod:`gemskit.nn._row_sums`, in Gluon: rows are copied ahead into a ring in shared memory.

A thread reads from there twice what it copied itself, for the statistics and for the formula, so that its registers are for the
sums. Plain Triton reads once what it copies ahead and keeps it, in registers that rows of 16,384 columns do not leave.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group, wait_group

from gemskit._gluon import elements_to_shared
from gemskit._layout import offset
from gemskit.nn._rows_kernel import converted

#: Filled in per operator.
OBSERVE: Any = None
STEP: Any = None
SUMS: Any = None
COMBINE: Any = None
FINISH: Any = None


@gluon.jit
def _rings(
    ins, ALONG: gl.constexpr, SLOTS: gl.constexpr, COUNT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, nothing
):
    """Shared memory for every tile of an operand that has columns: a ring of blocks of rows, or one row.

    An allocation for each, as the compiler lets copies into the same one wait for each other.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    made = ()
    for k in gl.static_range(len(ins)):
        tiles = ()
        for _t in gl.static_range(COUNT):
            if ALONG[k] == 3:
                tiles = tiles + (gl.allocate_shared_memory(ins[k].dtype.element_ty, [SLOTS, BM, BN], flat),)
            elif ALONG[k] == 1:
                tiles = tiles + (gl.allocate_shared_memory(ins[k].dtype.element_ty, [1, 1, BN], flat),)
            else:
                tiles = tiles + (nothing,)
        made = made + (tiles,)
    return made


@gluon.jit
def _copy(
    rings, ins, row, slot, stop, col, cols, row_sizes, col_sizes, in_row, in_col, TAKE: gl.constexpr, ALONG: gl.constexpr,
    EVEN: gl.constexpr, COUNT: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Begin to copy a block of rows, or the vectors."""
    for k in gl.static_range(len(ins)):
        if ALONG[k] == TAKE:
            for t in gl.static_range(COUNT):
                c = col + t * BN
                at = offset(c, col_sizes, in_col[k])
                if TAKE == 3:
                    at = offset(row, row_sizes, in_row[k]) + at
                    live = row < stop
                    if not EVEN:
                        live = live & (c < cols)
                    elements_to_shared(rings[k][t].index(slot), ins[k] + at, live, eviction_policy="evict_first")
                elif EVEN:
                    elements_to_shared(rings[k][t].index(0), ins[k] + at)
                else:
                    elements_to_shared(rings[k][t].index(0), ins[k] + at, c < cols)


@gluon.jit
def _row_values(ins, row, rows, row_sizes, in_row, nothing, ALONG: gl.constexpr):
    """The operands that have one value in a row."""
    values = ()
    for k in gl.static_range(len(ins)):
        v = nothing
        if ALONG[k] == 2:
            v = gl.load(ins[k] + offset(row, row_sizes, in_row[k]), row < rows)
        values = values + (v,)
    return values


@gluon.jit
def _tile(rings, values, slot, zero, t: gl.constexpr, ALONG: gl.constexpr, TAKE: gl.constexpr, layout: gl.constexpr):
    """The operands of a tile, and the vectors of ``TAKE``."""
    raw = ()
    for k in gl.static_range(len(rings)):
        v = values[k]
        if ALONG[k] == 3:
            v = rings[k][t].index(slot + zero).load(layout)
        elif TAKE[k]:
            v = rings[k][t].index(zero).load(layout)
        raw = raw + (v,)
    return raw


@gluon.jit
def _only(terms, live, EVEN: gl.constexpr):
    kept = ()
    for k in gl.static_range(len(terms)):
        v = terms[k]
        if not EVEN:
            v = gl.where(live, v, 0.0)
        kept = kept + (v,)
    return kept


@gluon.jit
def _zeros(COUNT: gl.constexpr, COMPUTE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    made = ()
    for _k in gl.static_range(COUNT):
        made = made + (gl.zeros([BM, BN], COMPUTE, layout),)
    return made


@gluon.jit
def _grown(total, terms):
    made = ()
    for k in gl.static_range(len(total)):
        made = made + (total[k] + terms[k],)
    return made


@gluon.jit
def ring_sums(
    outs, sums, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols, part,
    COMPUTE: gl.constexpr, ROUND: gl.constexpr, KEEP: gl.constexpr, ALONG: gl.constexpr, OUT_ALONG: gl.constexpr,
    PICK: gl.constexpr, OBSERVED: gl.constexpr, NAMED: gl.constexpr, NONE: gl.constexpr, IDENTITY: gl.constexpr,
    ZEROS: gl.constexpr, EVEN: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    ACROSS: gl.constexpr, WIDE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """ACROSS warps stand side by side in a row. Statistics and sums are sums, of what is zero outside of the rows."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps // ACROSS, ACROSS], [1, 0])
    i = gl.program_id(0)
    if WIDE:
        i = i.to(gl.int64)
    lane = gl.arange(0, BM, gl.SliceLayout(1, layout))[:, None]
    col = gl.arange(0, BN, gl.SliceLayout(0, layout))[None, :]
    first = i * part
    stop = min(first + part, rows)
    rings = _rings(ins, ALONG, STAGES, COUNT, BM, BN, lane)
    _copy(rings, ins, lane, 0, stop, col, cols, row_sizes, col_sizes, in_row, in_col, 1, ALONG, EVEN, COUNT, BN)
    for s in gl.static_range(STAGES):
        _copy(
            rings, ins, first + s * BM + lane, s, stop, col, cols, row_sizes, col_sizes, in_row, in_col, 3, ALONG, EVEN, COUNT, BN
        )  # fmt: skip
        commit_group()
    following = _row_values(ins, first + lane, rows, row_sizes, in_row, lane, ALONG)
    total = ()
    for _t in gl.static_range(COUNT):
        total = total + (_zeros(len(ZEROS[0]), COMPUTE, BM, BN, layout),)
    slot = 0
    for start in range(first, stop, BM):
        wait_group(STAGES - 1)
        row = start + lane
        values = following
        following = _row_values(ins, row + BM, rows, row_sizes, in_row, lane, ALONG)
        stats = ()
        for K in gl.static_range(len(IDENTITY)):
            state = _zeros(len(IDENTITY[K]), COMPUTE, BM, BN, layout)
            for t in gl.static_range(COUNT):
                c = col + t * BN
                raw = _tile(rings, values, slot, 0, t, ALONG, OBSERVED, layout)
                v = converted(raw, COMPUTE, ROUND, KEEP)
                seen = _only(OBSERVE(K, v, stats, s0, s1, s2, s3, c, cols), c < cols, EVEN)
                state = STEP(K, state, (seen,))
            stats = stats + COMBINE(K, state)
        # There is one program along the last axis. The compiler does not know, or would keep what was read before.
        zero = gl.program_id(2)
        grown = ()
        for t in gl.static_range(COUNT):
            c = col + t * BN
            raw = _tile(rings, values, slot, zero, t, ALONG, NAMED, layout)
            FINISH(
                outs, (raw,), ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
                in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NONE, EVEN, t == 0, BM, BN,
            )  # fmt: skip
            v = converted(raw, COMPUTE, ROUND, KEEP)
            terms = _only(SUMS(v, s0, s1, s2, s3, c, cols), (row < stop) & (c < cols), EVEN)
            grown = grown + (_grown(total[t], terms),)
        total = grown
        _copy(
            rings, ins, row + STAGES * BM, slot, stop, col, cols, row_sizes, col_sizes, in_row, in_col, 3, ALONG, EVEN, COUNT, BN
        )  # fmt: skip
        commit_group()
        slot = (slot + 1) % STAGES
    wait_group(0)
    for t in gl.static_range(COUNT):
        for k in gl.static_range(len(sums)):
            c = col + t * BN
            gl.store(sums[k] + i * cols + c, tl.sum(total[t][k], 0, keep_dims=True), c < cols)
