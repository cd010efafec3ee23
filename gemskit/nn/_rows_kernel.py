"""The kernel of row-wise operators: statistics of a row, then a formula per element; `gemskit.nn._rows` fills it in.

A row that fits one tile is read once and stays in registers; a longer one is read once per statistic and once for the formula
(not at all for a formula of row values). Without statistics the columns are spread over programs too.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from gemskit._jit import jit
from gemskit._layout import offset

#: Filled in per operator.
OBSERVE: Any = None
STEP: Any = None
COMBINE: Any = None
FORMULA: Any = None
JOIN: Any = None
FOLD: Any = None
GUESS: Any = None
FINISH: Any = None


@jit
def read(
    given, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col,
    TAKE: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Operands as they are stored (halves stay halves, two to a register): those of ``TAKE`` are loaded, others are given.

    ``EVEN`` is 1 where nothing lies outside, 2 where only rows do.
    """
    values = ()
    for k in tl.static_range(len(ins)):
        if not TAKE[k]:
            v = given[k]
        elif ALONG[k] == 3:
            at = offset(row, row_sizes, in_row[k]) + offset(col, col_sizes, in_col[k])
            if EVEN == 1:
                v = tl.load(ins[k] + at, eviction_policy=EVICT)
            elif EVEN == 2:
                v = tl.load(ins[k] + at, row < rows, eviction_policy=EVICT)
            else:
                v = tl.load(ins[k] + at, (row < rows) & (col < cols), eviction_policy=EVICT)
        elif ALONG[k] == 2:
            v = tl.load(ins[k] + offset(row, row_sizes, in_row[k]), row < rows)
        elif EVEN:
            v = tl.load(ins[k] + offset(col, col_sizes, in_col[k]))
        else:
            v = tl.load(ins[k] + offset(col, col_sizes, in_col[k]), col < cols)
        values = values + (v,)
    return values


@jit
def read_tiles(
    given, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col,
    TAKE: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``COUNT`` tiles."""
    tiles = ()
    for t in tl.static_range(COUNT):
        raw = read(
            given, ins, row, col + t * BN, rows, cols, row_sizes, col_sizes, in_row, in_col, TAKE, ALONG, EVEN, EVICT
        )  # fmt: skip
        tiles = tiles + (raw,)
    return tiles


@jit
def placeholders(row, ins):
    """A place holder for every operand."""
    values = ()
    for _k in tl.static_range(len(ins)):
        values = values + (row,)
    return values


@jit
def converted(raw, COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr):
    """The operands as formulas get them."""
    values = ()
    for k in tl.static_range(len(raw)):
        v = raw[k]
        if not KEEP[k]:
            v = v.to(ROUND).to(COMPUTE)
        values = values + (v,)
    return values


@jit
def again(tiles, stat, ALONG: tl.constexpr):
    """The same tiles, but not to the compiler: it would keep their elements as floats, in twice the registers.

    There is one program along the last axis; with ``stat`` in it nothing of this can be computed before the statistic.
    """
    zero = (stat.to(tl.int32, bitcast=True) & tl.program_id(2)).to(tl.int16)
    fresh = ()
    for t in tl.static_range(len(tiles)):
        values = ()
        for k in tl.static_range(len(tiles[t])):
            v = tiles[t][k]
            if ALONG[k] == 3 and v.dtype.primitive_bitwidth == 16:
                v = (v.to(tl.int16, bitcast=True) ^ zero).to(v.dtype, bitcast=True)
            values = values + (v,)
        fresh = fresh + (values,)
    return fresh


@jit
def _store(
    outs, results, row, col, rows, cols, row_sizes, col_sizes, row_strides, col_strides,
    ALONG: tl.constexpr, PICK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(len(outs)):
        v = results[PICK[k]].to(outs[k].dtype.element_ty)
        if ALONG[k] == 2:
            if ROWS:
                tl.store(outs[k] + offset(row, row_sizes, row_strides[k]), tl.broadcast_to(v, (BM, 1)), row < rows)
        else:
            at = offset(row, row_sizes, row_strides[k]) + offset(col, col_sizes, col_strides[k])
            if EVEN:
                tl.store(outs[k] + at, tl.broadcast_to(v, (BM, BN)))
            else:
                tl.store(outs[k] + at, tl.broadcast_to(v, (BM, BN)), (row < rows) & (col < cols))


@jit
def identities(IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.full((BM, BN), IDENTITY[K][k], COMPUTE),)
    return state


@jit
def masked(
    fresh, live, IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        if EVEN:
            v = tl.broadcast_to(fresh[k], (BM, BN))
        else:
            v = tl.where(live, fresh[k], tl.full((BM, BN), IDENTITY[K][k], COMPUTE))
        state = state + (v,)
    return state


@jit
def _first(tiles):
    return tiles[0]


@jit
def joined(
    state, tiles, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, K: tl.constexpr,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OBSERVED: tl.constexpr,
    IDENTITY: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The states of lanes after ``tiles``; with ``ONE`` there is one tile and nothing before it."""
    fresh = ()
    for t in tl.static_range(len(tiles)):
        c = col + t * BN
        raw = read(
            tiles[t], ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, OBSERVED, ALONG, EVEN, ""
        )  # fmt: skip
        v = converted(raw, COMPUTE, ROUND, KEEP)
        seen = OBSERVE(K, v, stats, s0, s1, s2, s3, c, cols)
        seen = masked(seen, (row < rows) & (c < cols), IDENTITY, K, COMPUTE, EVEN, BM, BN)
        fresh = fresh + (seen,)
    if not ONE:
        state = STEP(K, state, fresh)
    else:
        state = _first(fresh)
    return state


@jit
def folded(
    kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K: tl.constexpr,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, ELEMENTS: tl.constexpr,
    OBSERVED: tl.constexpr, IDENTITY: tl.constexpr, LOOP: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The values of statistic ``K``; tiles up to column ``whole`` need no masks."""
    state = identities(IDENTITY, K, COMPUTE, BM, BN)
    if LOOP:
        for start in range(HELD * BN, whole, UNROLL * BN):
            tiles = read_tiles(
                none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, True, EVICT,
                UNROLL, BN,
            )  # fmt: skip
            state = JOIN(
                state, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, in_row,
                in_col, K, COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, True, False, BM, BN,
            )  # fmt: skip
        if not EVEN:
            for start in range(whole, cols, BN):
                tiles = read_tiles(
                    none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG,
                    False, EVICT, 1, BN,
                )  # fmt: skip
                state = JOIN(
                    state, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, in_row,
                    in_col, K, COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, False, False, BM, BN,
                )  # fmt: skip
    if HELD > 0:
        state = JOIN(
            state, kept, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, K,
            COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, EVEN, HELD == 1 and not LOOP, BM, BN,
        )  # fmt: skip
    return COMBINE(K, state)


@jit
def finish(
    outs, tiles, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row, in_col,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, NAMED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the results of ``tiles``; row values with the first one if ``ROWS``."""
    ready = read(tiles[0], ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, NAMED, ALONG, EVEN, "")
    for t in tl.static_range(len(tiles)):
        c = col + t * BN
        v = converted(ready, COMPUTE, ROUND, KEEP)
        if t + 1 < len(tiles):
            # Weights of the next tile: a load that comes after a store waits for it.
            ready = read(
                tiles[t + 1], ins, row, c + BN, rows, cols, row_sizes, col_sizes, in_row, in_col, NAMED, ALONG, EVEN, ""
            )  # fmt: skip
        results = FORMULA(v, stats, s0, s1, s2, s3, c, cols)
        _store(
            outs, results, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, EVEN, ROWS and t == 0,
            BM, BN,
        )  # fmt: skip


@jit
def rows_kernel(
    outs, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, ELEMENTS: tl.constexpr, OBSERVED: tl.constexpr, NAMED: tl.constexpr, IDENTITY: tl.constexpr,
    LOOP: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, ROWS_EVEN: tl.constexpr, GATHER_OF: tl.constexpr, GATHER_AT: tl.constexpr,
    GUESSES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # HELD tiles from the first on stay in registers; with LOOP there are others, read once per statistic and once more.
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    col = tl.arange(0, BN)[None, :]
    if WIDE:
        col = col.to(tl.int64)
    if SPLIT:
        blocks = tl.cdiv(cols, BN)
        col += (i % blocks) * BN
        i = i // blocks
    row = (i * BM + tl.arange(0, BM))[:, None]
    none = placeholders(row, ins)
    held = read_tiles(
        none, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, EVEN,
        "evict_first" if LOOP else "", HELD, BN,
    )  # fmt: skip
    EVICT: tl.constexpr = "evict_first" if ONCE else "evict_last"
    whole = cols
    if not EVEN:
        whole = HELD * BN
        if ROWS_EVEN:
            whole += (cols - whole) // (UNROLL * BN) * (UNROLL * BN)
    kept = held
    stats = ()
    for K in tl.static_range(len(IDENTITY)):
        if GUESSES[K]:
            found, sure = GUESS(K, stats, s0, s1, s2, s3, col, cols)
            if tl.min(tl.min(sure.to(tl.int32), 1), 0) == 0:
                found = FOLD(
                    kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K,
                    COMPUTE, ROUND, KEEP, ALONG, ELEMENTS, OBSERVED, IDENTITY, LOOP, HELD, UNROLL, EVEN, EVICT, BM, BN,
                )  # fmt: skip
        else:
            found = FOLD(
                kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K,
                COMPUTE, ROUND, KEEP, ALONG, ELEMENTS, OBSERVED, IDENTITY, LOOP, HELD, UNROLL, EVEN, EVICT, BM, BN,
            )  # fmt: skip
        stats = stats + found
        if HELD > 1:
            kept = again(held, stats[len(stats) - 1], ALONG)
    for g in tl.static_range(len(GATHER_AT)):
        at = tl.load(ins[GATHER_AT[g]] + offset(row, row_sizes, in_row[GATHER_AT[g]]), row < rows).to(tl.int64)
        there = (row < rows) & (at >= 0) & (at < cols)
        at = offset(row, row_sizes, in_row[GATHER_OF[g]]) + offset(at, col_sizes, in_col[GATHER_OF[g]])
        stats = stats + (tl.load(ins[GATHER_OF[g]] + at, there, other=float("nan")).to(ROUND).to(COMPUTE),)
    if ONCE:
        FINISH(
            outs, (none,), ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
            in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, EVEN, True, BM, BN,
        )  # fmt: skip
    else:
        if LOOP:
            # From the end: what was read last is in the cache.
            if not EVEN:
                for start in range(whole, cols, BN):
                    tiles = read_tiles(
                        none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG,
                        False, "evict_first", 1, BN,
                    )  # fmt: skip
                    FINISH(
                        outs, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, out_row,
                        out_col, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, False, HELD == 0, BM, BN,
                    )  # fmt: skip
            for back in range(HELD * BN, whole, UNROLL * BN):
                c = whole - UNROLL * BN - (back - HELD * BN) + col
                tiles = read_tiles(
                    none, ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, True, "evict_first",
                    UNROLL, BN,
                )  # fmt: skip
                FINISH(
                    outs, tiles, ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col,
                    in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, True, HELD == 0, BM, BN,
                )  # fmt: skip
        if HELD > 0:
            FINISH(
                outs, kept, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
                in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, EVEN, True, BM, BN,
            )  # fmt: skip
