"""The attention forward: one pass over the keys, of dense, packed and paged sequences, whole or split over several programs.

With ``s = scale * query @ key.T``, modified and masked, it writes ``softmax(s) @ value`` and ``lse = log(sum(exp(s)))`` of every
row. Sums are in float32 (float64 for float64), in a fixed order, so that results are bitwise repeatable.
"""

from __future__ import annotations

import triton.language as tl

from gemskit._following import previous
from gemskit._jit import jit
from gemskit.blas._factors import as_factor
from gemskit.nn._attention_tiles import (
    LN2,
    LOG2E,
    cached_tile,
    kept,
    logits,
    masked,
    pages_of,
    put,
    scaled,
    slope_of,
    span,
    window,
)


@jit
def _forward_steps(
    acc, total, peak, queries,
    key, k_at, value, v_at, table, table_step,
    mask, mask_m, mask_n, seed, number, listed,
    batch, head, rows, first, last, length, size, low, high, width,
    scale, dropout, cap, slope, shift, aux,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, SCORE: tl.constexpr, VISIBLE: tl.constexpr, EDGE: tl.constexpr,
    PAGE: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    pages = table
    # Pages are looked up a step before the loads that need them: else those wait, and only one of them is in flight.
    if AHEAD:
        pages = pages_of(table, first, size, table_step, PAGE, N)
    for at in range(first, last, N):
        start = at
        if listed is not None:
            start = tl.load(listed + at // N) * N
        keys = cached_tile(
            key, start, local[None, :], k_at[2], e[:, None], k_at[3], size, pages, table_step, k_at[0], k_at[4],
            HEAD, E, EDGE, WIDE, PAGE, AHEAD, SPLIT, N,
        )  # fmt: skip
        keys = as_factor(keys, queries.dtype)
        product = tl.zeros((rows.shape[0], N), acc.dtype)
        product = tl.dot(queries, keys, product, input_precision=PRECISION, out_dtype=acc.dtype)
        cols = start + local
        scores = logits(
            product, batch, head, rows[:, None], cols[None, :], length, size, scale, cap, slope, shift, aux, SCORE
        )
        scores = masked(
            scores, batch, head, rows[:, None], cols[None, :], mask, mask_m, mask_n, length, size, low, high, aux,
            MASK, SIDES, VISIBLE, EDGE,
        )  # fmt: skip
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN in a row with no key so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if dropout is not None:
            weights = tl.where(kept(seed, number, start, cols, width, dropout), weights, 0.0)
        values = cached_tile(
            value, start, local[:, None], v_at[2], ev[None, :], v_at[3], size, pages, table_step, v_at[0], 0,
            VALUE, EV, EDGE, WIDE, PAGE, AHEAD, 0, N,
        )  # fmt: skip
        values = as_factor(values, queries.dtype)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        peak = top
        if AHEAD:
            pages = pages_of(table, at + N, size, table_step, PAGE, N)
    return acc, total, peak


@jit
def attention_forward(
    query, key, value, mask, out, lse, seed,
    bounds_q, bounds_k, used, table, sinks, slopes, scale_q, scale_k, scale_v, listed, counts, aux,
    q_at, k_at, v_at, mask_at, out_at, lse_at, table_at, slopes_at, scales_at, listed_at, steps,
    heads, group, length, size, splits, left, right, width,
    scale, scale_low, dropout, kept_scale, cap,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr, SCORE: tl.constexpr, VISIBLE: tl.constexpr,
    PACK: tl.constexpr, PAGE: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``*_at`` are strides by batch, head, row and column (``out_at`` and ``lse_at`` end with that of a split).

    With PACK a program serves all query heads of a key head: row r of a tile is head ``r % group`` of token ``r // group``.
    """
    TYPE: tl.constexpr = lse.dtype.element_ty
    most = length
    if PACK:
        most = length * group
    tiles = tl.cdiv(most, M)
    plane = tl.program_id(0) // tiles
    part = 0
    if splits is not None:
        part = plane % splits
        plane = plane // splits
    start = (tiles - 1 - tl.program_id(0) % tiles) * M  # with the causal rule the last rows have most to do: first
    owners = heads
    if PACK:
        owners = heads // group
    batch, owner = (plane // owners).to(tl.int64), (plane % owners).to(tl.int64)
    first_q, tokens = span(bounds_q, steps[0], None, 0, batch, length)
    first_k, keys = span(bounds_k, steps[1], used, steps[2], batch, size)
    shift, low, high = window(keys, tokens, left, right, SIDES, BOTTOM)
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    if PACK:
        rows = (start + local) // group
        head = owner * group + (start + local) % group
        earliest, latest = start // group, tl.minimum((start + M - 1) // group, tokens - 1)
        heads_shown = head[:, None]
        above = owner
        at = first_q * q_at[2] + (rows.to(tl.int64) * q_at[2] + head * q_at[1])[:, None]
        live = (rows < tokens)[:, None] & (e[None, :] < HEAD)
        queries = tl.load(query + batch * q_at[0] + at + e.to(tl.int64)[None, :] * q_at[3], mask=live, other=0.0)
    else:
        rows = start + local
        head = owner
        earliest, latest = start, tl.minimum(start + M, tokens) - 1
        heads_shown = owner
        above = owner // group
        query += batch * q_at[0] + head * q_at[1] + first_q * q_at[2]
        live = (rows < tokens)[:, None] & (e[None, :] < HEAD)
        at = query + tl.cast(start, tl.int64) * q_at[2]
        if WIDE:
            at = at + (local.to(tl.int64)[:, None] * q_at[2] + e.to(tl.int64)[None, :] * q_at[3])
        else:
            at = at + (local[:, None] * q_at[2] + e[None, :] * q_at[3])
        queries = tl.load(at, mask=live, other=0.0)
    pages = table
    if PAGE == 0:
        key += batch * k_at[0] + first_k * k_at[2]
        value += batch * v_at[0] + first_k * v_at[2]
    else:
        pages = table + batch * table_at[0]
    key += above * k_at[1]
    value += above * v_at[1]
    if MASK != 0:
        mask += batch * mask_at[0] + head * mask_at[1]
    # Rows of the whole problem are numbered as their lse lies.
    number = batch * lse_at[0] + head * lse_at[1] + (first_q + rows) * lse_at[2]
    key_of_draws = 0
    if dropout is not None:
        key_of_draws = tl.load(seed)
    slope = None
    if slopes is not None:
        slope = slope_of(slopes, slopes_at[0], slopes_at[1], batch, heads_shown).to(TYPE)
    factor = scaled(scale, scale_low, TYPE)
    if scale_q is not None:
        factor *= tl.load(scale_q + batch * scales_at[0] + above * scales_at[1]).to(TYPE)
    if scale_k is not None:
        factor *= tl.load(scale_k + batch * scales_at[2] + above * scales_at[3]).to(TYPE)
    acc, total = tl.zeros((M, EV), TYPE), tl.zeros((M,), TYPE)
    peak = tl.full((M,), -float("inf"), TYPE)
    if sinks is not None:
        sink = tl.load(sinks + head * steps[3]).to(TYPE) * LOG2E
        if splits is not None:
            sink = tl.where(part == 0, sink, -float("inf"))
        peak = tl.zeros((M,), TYPE) + sink
        total = tl.where(peak == -float("inf"), 0.0, 1.0).to(TYPE)
    # Columns from `first` to `last`; those from `inner` to `whole` are seen by every row of the tile.
    first, inner, last, whole = 0, 0, keys, keys // N * N
    if VISIBLE is not None:
        whole = 0
    if SIDES % 2 == 1:
        last = tl.minimum(keys, latest + high + 1)
        whole = tl.minimum(whole, tl.maximum(earliest + high + 1, 0) // N * N)
    if SIDES >= 2:
        first = tl.maximum(earliest + low, 0) // N * N
        inner = tl.maximum(tl.cdiv(tl.maximum(latest + low, 0), N) * N, first)
    if bounds_q is not None:
        last = tl.where(earliest < tokens, last, 0)
    if splits is not None:
        per = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), N), splits) * N
        first = first + part * per
        last = tl.minimum(last, first + per)
        whole = tl.minimum(whole, first + per)
        inner = tl.maximum(inner, first)
    spot = None
    if listed is not None:
        where = batch * listed_at[0] + head * listed_at[1] + start // M
        spot = listed + where * listed_at[2]
        first, inner, whole, last = 0, 0, 0, tl.load(counts + where) * N
    if SIDES >= 2:
        whole = tl.maximum(whole, inner)
        acc, total, peak = _forward_steps(
            acc, total, peak, queries,
            key, k_at, value, v_at, pages, table_at[1],
            mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
            batch, heads_shown, rows, first, tl.minimum(inner, last), tokens, keys, low, high, width,
            factor, dropout, cap, slope, shift, aux,
            HEAD, E, VALUE, EV, N,
            MASK, SIDES, SCORE, VISIBLE, True,
            PAGE, AHEAD, SPLIT, PRECISION, WIDE,
        )  # fmt: skip
    elif splits is not None:
        inner = first
        whole = tl.maximum(whole, first)
    if VISIBLE is None:
        acc, total, peak = _forward_steps(
            acc, total, peak, queries,
            key, k_at, value, v_at, pages, table_at[1],
            mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
            batch, heads_shown, rows, inner, tl.minimum(whole, last), tokens, keys, low, high, width,
            factor, dropout, cap, slope, shift, aux,
            HEAD, E, VALUE, EV, N,
            MASK, SIDES, SCORE, VISIBLE, False,
            PAGE, AHEAD, SPLIT, PRECISION, WIDE,
        )  # fmt: skip
    acc, total, peak = _forward_steps(
        acc, total, peak, queries,
        key, k_at, value, v_at, pages, table_at[1],
        mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
        batch, heads_shown, rows, whole, last, tokens, keys, low, high, width,
        factor, dropout, cap, slope, shift, aux,
        HEAD, E, VALUE, EV, N,
        MASK, SIDES, SCORE, VISIBLE, True,
        PAGE, AHEAD, SPLIT, PRECISION, WIDE,
    )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)  # a row with no key gives 0, as torch's safe softmax
    result = acc * (1.0 / safe)[:, None]
    if dropout is not None:
        result = result * tl.cast(kept_scale, TYPE)
    if scale_v is not None:
        result = result * tl.load(scale_v + batch * scales_at[4] + above * scales_at[5]).to(TYPE)
    found = (peak + tl.log2(total)) * LN2
    if splits is not None:
        out += tl.cast(part, tl.int64) * out_at[4]
        lse += tl.cast(part, tl.int64) * lse_at[3]
    if PACK:
        at = out + batch * out_at[0] + (head * out_at[1] + (first_q + rows) * out_at[2])[:, None]
        at += ev.to(tl.int64)[None, :] * out_at[3]
        tl.store(at, result.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (ev[None, :] < VALUE))
    else:
        out += batch * out_at[0] + head * out_at[1] + first_q * out_at[2]
        put(out, start, local[:, None], out_at[2], ev[None, :], out_at[3], tokens, result, VALUE)
    tl.store(lse + number, found, mask=rows < tokens)


@jit
def attention_merge(
    parts, parts_lse, out, lse, part_at, lse_at, out_at, heads, length, parts_stride, parts_lse_stride,
    SPLITS: tl.constexpr, S: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The results of one row from SPLITS parts of its keys, weighted by ``exp(lse)``."""
    previous(FOLLOWS)
    TYPE: tl.constexpr = parts_lse.dtype.element_ty
    row = (tl.program_id(0) % length).to(tl.int64)
    plane = (tl.program_id(0) // length).to(tl.int64)
    batch, head = plane // heads, plane % heads
    s, ev = tl.arange(0, S), tl.arange(0, EV)
    at = batch * lse_at[0] + head * lse_at[1] + row * lse_at[2]
    each = tl.load(parts_lse + at + s * parts_lse_stride, mask=s < SPLITS, other=-float("inf"))
    top = tl.max(each, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2((each - base) * LOG2E)
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    place = parts + batch * part_at[0] + head * part_at[1] + row * part_at[2]
    live = (s < SPLITS)[:, None] & (ev < VALUE)[None, :]
    tiles = tl.load(place + s.to(tl.int64)[:, None] * parts_stride + ev[None, :], mask=live, other=0.0)
    # A part without a key holds zeros.
    found = tl.sum(weights[:, None] * tiles.to(TYPE), 0)
    to = out + batch * out_at[0] + head * out_at[1] + row * out_at[2] + ev.to(tl.int64) * out_at[3]
    tl.store(to, found.to(out.dtype.element_ty), mask=ev < VALUE)
    tl.store(lse + at, base + tl.log2(total) * LN2)
