"""The attention backward: one kernel for keys and values, one for queries, one for an added mask; no atomics.

They recompute ``p = exp(s - lse)`` tile by tile and use, with ``delta = sum(out * grad)``, ``grad_value = p.T @ grad``,
``ds = p * (grad @ value.T - delta)``, ``grad_query = scale * ds @ key`` and ``grad_key = scale * ds.T @ query``, where ds
passes through what modified the scores. Every sum has a fixed order, so results are bitwise repeatable.
"""

from __future__ import annotations

import triton.language as tl

from gemskit._jit import jit
from gemskit.nn._attention_tiles import (
    back_through,
    exponentials,
    kept,
    line,
    logits,
    masked,
    put,
    scaled,
    slope_of,
    span,
    tile,
    window,
)


@jit
def attention_delta(
    out, grad, grad_lse, delta, bounds_q, o_at, g_at, lse_at, gl_at, steps, heads, length,
    VALUE: tl.constexpr, EV: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``sum(out * grad)`` of every row, less the gradient of its lse, which acts on the scores alike."""
    TYPE: tl.constexpr = delta.dtype.element_ty
    tiles = tl.cdiv(length, M)
    plane, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    first, rows = span(bounds_q, steps[0], None, 0, batch, length)
    local, ev = tl.arange(0, M)[:, None], tl.arange(0, EV)[None, :]
    out += batch * o_at[0] + head * o_at[1] + first * o_at[2]
    grad += batch * g_at[0] + head * g_at[1] + first * g_at[2]
    left = tile(out, start, local, o_at[2], ev, o_at[3], rows, VALUE, EV, True, WIDE)
    right = tile(grad, start, local, g_at[2], ev, g_at[3], rows, VALUE, EV, True, WIDE)
    total = tl.sum(left.to(TYPE) * right.to(TYPE), 1)
    place = start + tl.arange(0, M)
    at = batch * lse_at[0] + head * lse_at[1] + (first + place) * lse_at[2]
    if grad_lse is not None:
        to = grad_lse + batch * gl_at[0] + head * gl_at[1] + (first + place) * gl_at[2]
        total -= tl.load(to, mask=place < rows, other=0.0).to(TYPE)
    tl.store(delta + at, total, mask=place < rows)


@jit
def _key_steps(
    grad_key, grad_value, keys, values,
    query, q_at, grad, g_at, mask, mask_at, lse, delta, lse_at,
    seed, number, listed, batch, head, start_cols, cols, group,
    first, count, diagonal, jump,
    length, size, low, high, width, scale, dropout, kept_scale, cap, slopes, slope_batch, slope_head, shift, aux,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, M: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, SCORE: tl.constexpr, SLOPE: tl.constexpr, VISIBLE: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = grad_key.dtype
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    # One loop over heads and row tiles: a nested one would keep a second set of pointers in registers.
    for index in range(group * count):
        member, step = tl.cast(index // count, tl.int64), first + index % count
        queries_at, grads_at, line_at = query + member * q_at[1], grad + member * g_at[1], number + member * lse_at[1]
        mask_from = mask
        if MASK != 0:
            mask_from = mask + member * mask_at[1]
        start = step * M
        if listed is not None:
            start = tl.load(listed + step) * M
        elif EDGE:
            start = tl.where(step < diagonal, step, step + jump) * M
        slope = None
        if slopes is not None:
            slope = slope_of(slopes, slope_batch, slope_head, batch, head + member).to(TYPE)
        rows = start + local
        across, down = rows[None, :], cols[:, None]
        queries = tile(queries_at, start, local[:, None], q_at[2], e[None, :], q_at[3], length, HEAD, E, EDGE, WIDE)
        product = tl.zeros((cols.shape[0], M), TYPE)
        product = tl.dot(keys, queries.T, product, input_precision=PRECISION, out_dtype=TYPE)
        scores = logits(product, batch, head + member, across, down, length, size, scale, cap, slope, shift, aux, SCORE)
        scores = masked(
            scores, batch, head + member, across, down, mask_from, mask_at[2], mask_at[3], length, size, low, high, aux,
            MASK, SIDES, VISIBLE, EDGE,
        )  # fmt: skip
        if SCORE is None:
            row_lse = line(lse + line_at, start, local, lse_at[2], length, 0.0, EDGE)
        else:  # rows past the end have any score, and weight 0 (12 registers, which head size 128 has not)
            row_lse = line(lse + line_at, start, local, lse_at[2], length, float("inf"), EDGE)
        weights = exponentials(scores, row_lse[None, :])
        grads = tile(grads_at, start, local[:, None], g_at[2], ev[None, :], g_at[3], length, VALUE, EV, EDGE, WIDE)
        used = weights
        if dropout is not None:
            stay = kept(seed, line_at + rows * lse_at[2], start_cols, cols, width, dropout).T
            used = tl.where(stay, weights * kept_scale, 0.0)
        if VALUE_GRAD:
            grad_value = tl.dot(used.to(grads.dtype), grads, grad_value, input_precision=PRECISION, out_dtype=TYPE)
        if KEY_GRAD:
            change = tl.zeros((cols.shape[0], M), TYPE)
            change = tl.dot(values, grads.T, change, input_precision=PRECISION, out_dtype=TYPE)
            if dropout is not None:
                change = tl.where(stay, change * kept_scale, 0.0)
            change = weights * (change - line(delta + line_at, start, local, lse_at[2], length, 0.0, EDGE)[None, :])
            change = back_through(
                change, product, batch, head + member, across, down, length, size, scale, cap, slope, shift, aux,
                SCORE, SLOPE,
            )  # fmt: skip
            grad_key = tl.dot(change.to(queries.dtype), queries, grad_key, input_precision=PRECISION, out_dtype=TYPE)
    return grad_key, grad_value


@jit
def attention_grad_key_value(
    query, key, value, mask, grad, lse, delta, seed,
    bounds_q, bounds_k, used, slopes, listed, counts, aux,
    grad_key, grad_value,
    q_at, k_at, v_at, mask_at, g_at, lse_at, slopes_at, listed_at, steps, gk_at, gv_at,
    heads, group, length, size, left, right, width,
    scale, scale_low, dropout, kept_scale, cap,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, summed over the query heads that share them; either can be left out."""
    TYPE: tl.constexpr = lse.dtype.element_ty
    tiles, owners = tl.cdiv(size, N), heads // group
    owner, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * N
    batch, head = (owner // owners).to(tl.int64), (owner % owners).to(tl.int64)
    first_q, tokens = span(bounds_q, steps[0], None, 0, batch, length)
    first_k, keys_here = span(bounds_k, steps[1], used, steps[2], batch, size)
    shift, low, high = window(keys_here, tokens, left, right, SIDES, BOTTOM)
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    cols = start + local
    key += batch * k_at[0] + head * k_at[1] + first_k * k_at[2]
    value += batch * v_at[0] + head * v_at[1] + first_k * v_at[2]
    keys = tile(key, start, local[:, None], k_at[2], e[None, :], k_at[3], keys_here, HEAD, E, True, WIDE)
    values = tile(value, start, local[:, None], v_at[2], ev[None, :], v_at[3], keys_here, VALUE, EV, True, WIDE)
    factor = scaled(scale, scale_low, TYPE)
    key_of_draws = 0
    if dropout is not None:
        key_of_draws = tl.load(seed)
    acc_key, acc_value = tl.zeros((N, E), TYPE), tl.zeros((N, EV), TYPE)
    # Row tiles in units of M: none before `above`, edges up to `first`, whole ones up to `whole`, edges up to `end`.
    above, first, whole, end = 0, 0, tokens // M, tl.cdiv(tokens, M)
    if SIDES % 2 == 1:
        above = tl.maximum(start - high, 0) // M
        first = tl.minimum(tl.cdiv(tl.maximum(start + N - 1 - high, 0), M), end)
    if SIDES >= 2:
        # Row r sees columns from r + low on: the last that sees this tile, and the first that misses a part of it.
        end = tl.minimum(end, tl.cdiv(tl.maximum(start + N - low, 0), M))
        whole = tl.minimum(whole, tl.maximum(start - low + 1, 0) // M)
        first = tl.minimum(first, end)
    if bounds_k is not None or used is not None:
        end = tl.where(start < keys_here, end, 0)
        whole = tl.where(start < keys_here, whole, 0)
        first = tl.minimum(first, end)
    whole = tl.maximum(whole, first)
    jump = whole - first
    edges = end - jump
    inner = head * group
    number = batch * lse_at[0] + inner * lse_at[1] + first_q * lse_at[2]
    query += batch * q_at[0] + inner * q_at[1] + first_q * q_at[2]
    grad += batch * g_at[0] + inner * g_at[1] + first_q * g_at[2]
    if MASK != 0:
        mask += batch * mask_at[0] + inner * mask_at[1]
    if listed is not None:
        for member in range(group):
            wide = tl.cast(member, tl.int64)
            where = batch * listed_at[0] + (inner + wide) * listed_at[1] + start // N
            acc_key, acc_value = _key_steps(
                acc_key, acc_value, keys, values,
                query + wide * q_at[1], q_at, grad + wide * g_at[1], g_at, mask, mask_at, lse, delta, lse_at,
                key_of_draws, number + wide * lse_at[1], listed + where * listed_at[2], batch, inner + wide,
                start, cols, 1,
                0, tl.load(counts + where), 0, 0,
                tokens, keys_here, low, high, width, factor, dropout, kept_scale, cap,
                slopes, slopes_at[0], slopes_at[1], shift, aux,
                HEAD, E, VALUE, EV, M,
                MASK, SIDES, SCORE, SLOPE, VISIBLE, True, PRECISION, WIDE,
                KEY_GRAD, VALUE_GRAD,
            )  # fmt: skip
    else:
        acc_key, acc_value = _key_steps(
            acc_key, acc_value, keys, values,
            query, q_at, grad, g_at, mask, mask_at, lse, delta, lse_at,
            key_of_draws, number, None, batch, inner, start, cols, group,
            first, whole - first, 0, 0,
            tokens, keys_here, low, high, width, factor, dropout, kept_scale, cap,
            slopes, slopes_at[0], slopes_at[1], shift, aux,
            HEAD, E, VALUE, EV, M,
            MASK, SIDES, SCORE, SLOPE, VISIBLE, False, PRECISION, WIDE,
            KEY_GRAD, VALUE_GRAD,
        )  # fmt: skip
        acc_key, acc_value = _key_steps(
            acc_key, acc_value, keys, values,
            query, q_at, grad, g_at, mask, mask_at, lse, delta, lse_at,
            key_of_draws, number, None, batch, inner, start, cols, group,
            above, tl.maximum(edges - above, 0), first, jump,
            tokens, keys_here, low, high, width, factor, dropout, kept_scale, cap,
            slopes, slopes_at[0], slopes_at[1], shift, aux,
            HEAD, E, VALUE, EV, M,
            MASK, SIDES, SCORE, SLOPE, VISIBLE, True, PRECISION, WIDE,
            KEY_GRAD, VALUE_GRAD,
        )  # fmt: skip
    limit = keys_here
    if used is not None and bounds_k is None:
        limit = size  # keys past the used ones get zeros
        acc_key = tl.where((cols < keys_here)[:, None], acc_key, 0.0)
        acc_value = tl.where((cols < keys_here)[:, None], acc_value, 0.0)
    if KEY_GRAD:
        grad_key += batch * gk_at[0] + head * gk_at[1] + first_k * gk_at[2]
        put(grad_key, start, local[:, None], gk_at[2], e[None, :], gk_at[3], limit, acc_key * factor, HEAD)
    if VALUE_GRAD:
        grad_value += batch * gv_at[0] + head * gv_at[1] + first_k * gv_at[2]
        put(grad_value, start, local[:, None], gv_at[2], ev[None, :], gv_at[3], limit, acc_value, VALUE)


@jit
def _slopes(
    product, grads, values, row_lse, row_delta,
    mask, mask_m, mask_n, seed, number, batch, head, rows, start, cols, length, size, low, high, width,
    scale, dropout, kept_scale, cap, slope, shift, aux,
    MASK: tl.constexpr, SIDES: tl.constexpr, SCORE: tl.constexpr, SLOPE: tl.constexpr, VISIBLE: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """Gradient of the masked scores (natural units) of a tile, with THROUGH of the scaled product; values come transposed."""
    down, across = rows[:, None], cols[None, :]
    scores = logits(product, batch, head, down, across, length, size, scale, cap, slope, shift, aux, SCORE)
    scores = masked(
        scores, batch, head, down, across, mask, mask_m, mask_n, length, size, low, high, aux,
        MASK, SIDES, VISIBLE, EDGE,
    )  # fmt: skip
    weights = exponentials(scores, row_lse[:, None])
    change = tl.dot(grads, values, tl.zeros_like(product), input_precision=PRECISION, out_dtype=product.dtype)
    if dropout is not None:
        change = tl.where(kept(seed, number, start, cols, width, dropout), change * kept_scale, 0.0)
    change = weights * (change - row_delta[:, None])
    if THROUGH:
        change = back_through(
            change, product, batch, head, down, across, length, size, scale, cap, slope, shift, aux, SCORE, SLOPE
        )
    return change


@jit
def _query_steps(
    acc, queries, grads, row_lse, row_delta,
    key, k_n, k_d, value, v_n, v_d,
    mask, mask_m, mask_n, seed, number, listed,
    batch, head, rows, first, last, length, size, low, high, width,
    scale, dropout, kept_scale, cap, slope, shift, aux,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, SCORE: tl.constexpr, SLOPE: tl.constexpr, VISIBLE: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    for at in range(first, last, N):
        start = at
        if listed is not None:
            start = tl.load(listed + at // N) * N
        cols = start + local
        keys = tile(key, start, local[:, None], k_n, e[None, :], k_d, size, HEAD, E, EDGE, WIDE)
        values = tile(value, start, local[None, :], v_n, ev[:, None], v_d, size, VALUE, EV, EDGE, WIDE)
        product = tl.zeros((rows.shape[0], N), acc.dtype)
        product = tl.dot(queries, keys.T, product, input_precision=PRECISION, out_dtype=acc.dtype)
        change = _slopes(
            product, grads, values, row_lse, row_delta,
            mask, mask_m, mask_n, seed, number, batch, head, rows, start, cols, length, size, low, high, width,
            scale, dropout, kept_scale, cap, slope, shift, aux,
            MASK, SIDES, SCORE, SLOPE, VISIBLE, EDGE, PRECISION, True,
        )  # fmt: skip
        acc = tl.dot(change.to(keys.dtype), keys, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@jit
def attention_grad_query(
    query, key, value, mask, grad, lse, delta, seed,
    bounds_q, bounds_k, used, slopes, listed, counts, aux,
    grad_query,
    q_at, k_at, v_at, mask_at, g_at, lse_at, slopes_at, listed_at, steps, gq_at,
    heads, group, length, size, left, right, width,
    scale, scale_low, dropout, kept_scale, cap,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SIDES: tl.constexpr, BOTTOM: tl.constexpr,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = lse.dtype.element_ty
    tiles = tl.cdiv(length, M)
    plane = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * M
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    first_q, tokens = span(bounds_q, steps[0], None, 0, batch, length)
    first_k, keys = span(bounds_k, steps[1], used, steps[2], batch, size)
    shift, low, high = window(keys, tokens, left, right, SIDES, BOTTOM)
    key += batch * k_at[0] + head // group * k_at[1] + first_k * k_at[2]
    value += batch * v_at[0] + head // group * v_at[1] + first_k * v_at[2]
    if MASK != 0:
        mask += batch * mask_at[0] + head * mask_at[1]
    key_of_draws = 0
    if dropout is not None:
        key_of_draws = tl.load(seed)
    slope = None
    if slopes is not None:
        slope = slope_of(slopes, slopes_at[0], slopes_at[1], batch, head).to(TYPE)
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    rows = start + local
    query += batch * q_at[0] + head * q_at[1] + first_q * q_at[2]
    grad += batch * g_at[0] + head * g_at[1] + first_q * g_at[2]
    queries = tile(query, start, local[:, None], q_at[2], e[None, :], q_at[3], tokens, HEAD, E, True, WIDE)
    grads = tile(grad, start, local[:, None], g_at[2], ev[None, :], g_at[3], tokens, VALUE, EV, True, WIDE)
    number = batch * lse_at[0] + head * lse_at[1] + (first_q + rows) * lse_at[2]
    row_lse = tl.load(lse + number, mask=rows < tokens, other=float("inf"))
    row_delta = tl.load(delta + number, mask=rows < tokens, other=0.0)
    factor = scaled(scale, scale_low, TYPE)
    first, inner, last, whole = 0, 0, keys, keys // N * N
    latest = tl.minimum(start + M, tokens) - 1
    if VISIBLE is not None:
        whole = 0
    if SIDES % 2 == 1:
        last = tl.minimum(keys, latest + high + 1)
        whole = tl.minimum(whole, tl.maximum(start + high + 1, 0) // N * N)
    if SIDES >= 2:
        first = tl.maximum(start + low, 0) // N * N
        inner = tl.maximum(tl.cdiv(tl.maximum(latest + low, 0), N) * N, first)
    if bounds_q is not None:
        last = tl.where(start < tokens, last, 0)
    spot = None
    if listed is not None:
        where = batch * listed_at[0] + head * listed_at[1] + start // M
        spot = listed + where * listed_at[2]
        first, inner, whole, last = 0, 0, 0, tl.load(counts + where) * N
    acc = tl.zeros((M, E), TYPE)
    if SIDES >= 2:
        whole = tl.maximum(whole, inner)
        acc = _query_steps(
            acc, queries, grads, row_lse, row_delta,
            key, k_at[2], k_at[3], value, v_at[2], v_at[3],
            mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
            batch, head, rows, first, tl.minimum(inner, last), tokens, keys, low, high, width,
            factor, dropout, kept_scale, cap, slope, shift, aux,
            HEAD, E, VALUE, EV, N,
            MASK, SIDES, SCORE, SLOPE, VISIBLE, True, PRECISION, WIDE,
        )  # fmt: skip
    if VISIBLE is None:
        acc = _query_steps(
            acc, queries, grads, row_lse, row_delta,
            key, k_at[2], k_at[3], value, v_at[2], v_at[3],
            mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
            batch, head, rows, inner, tl.minimum(whole, last), tokens, keys, low, high, width,
            factor, dropout, kept_scale, cap, slope, shift, aux,
            HEAD, E, VALUE, EV, N,
            MASK, SIDES, SCORE, SLOPE, VISIBLE, False, PRECISION, WIDE,
        )  # fmt: skip
    acc = _query_steps(
        acc, queries, grads, row_lse, row_delta,
        key, k_at[2], k_at[3], value, v_at[2], v_at[3],
        mask, mask_at[2], mask_at[3], key_of_draws, number, spot,
        batch, head, rows, whole, last, tokens, keys, low, high, width,
        factor, dropout, kept_scale, cap, slope, shift, aux,
        HEAD, E, VALUE, EV, N,
        MASK, SIDES, SCORE, SLOPE, VISIBLE, True, PRECISION, WIDE,
    )  # fmt: skip
    grad_query += batch * gq_at[0] + head * gq_at[1] + first_q * gq_at[2]
    put(grad_query, start, local[:, None], gq_at[2], e[None, :], gq_at[3], tokens, acc * factor, HEAD)


@jit
def attention_grad_mask(
    query, key, value, mask, grad, lse, delta, seed, grad_mask,
    q_at, k_at, v_at, mask_at, g_at, lse_at, gm_at,
    batches, heads, group, length, size, left, right, width,
    scale, scale_low, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    ONE_BATCH: tl.constexpr, ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
    SIDES: tl.constexpr, BOTTOM: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of an added mask: one program an output tile, which sums over every axis that the mask broadcasts."""
    TYPE: tl.constexpr = lse.dtype.element_ty
    rounds_m, rounds_n = tl.cdiv(length, M), tl.cdiv(size, N)
    batch_first, head_first, m_first, n_first = 0, 0, 0, 0
    batch_last, head_last, m_last, n_last = batches, heads, rounds_m, rounds_n
    rest = tl.program_id(0)
    if not ONE_COL:
        n_first, rest = rest % rounds_n, rest // rounds_n
        n_last = n_first + 1
    if not ONE_ROW:
        m_first, rest = rest % rounds_m, rest // rounds_m
        m_last = m_first + 1
    if not ONE_HEAD:
        head_first, rest = rest % heads, rest // heads
        head_last = head_first + 1
    if not ONE_BATCH:
        batch_first = rest
        batch_last = batch_first + 1
    key_of_draws = 0
    if dropout is not None:
        key_of_draws = tl.load(seed)
    shift, low, high = window(size, length, left, right, SIDES, BOTTOM)
    factor = scaled(scale, scale_low, TYPE)
    m, n, e, ev = tl.arange(0, M), tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    acc = tl.zeros((M, N), TYPE)
    for b in range(batch_first, batch_last):
        for h in range(head_first, head_last):
            batch, head = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
            queries_at, grads_at = query + batch * q_at[0] + head * q_at[1], grad + batch * g_at[0] + head * g_at[1]
            keys_at = key + batch * k_at[0] + head // group * k_at[1]
            values_at = value + batch * v_at[0] + head // group * v_at[1]
            for i in range(m_first, m_last):
                rows = i * M + m
                queries = tile(queries_at, i * M, m[:, None], q_at[2], e[None, :], q_at[3], length, HEAD, E, True, WIDE)
                grads = tile(grads_at, i * M, m[:, None], g_at[2], ev[None, :], g_at[3], length, VALUE, EV, True, WIDE)
                number = batch * lse_at[0] + head * lse_at[1] + rows.to(tl.int64) * lse_at[2]
                row_lse = tl.load(lse + number, mask=rows < length, other=float("inf"))
                row_delta = tl.load(delta + number, mask=rows < length, other=0.0)
                for j in range(n_first, n_last):
                    keys = tile(keys_at, j * N, n[None, :], k_at[2], e[:, None], k_at[3], size, HEAD, E, True, WIDE)
                    values = tile(
                        values_at, j * N, n[None, :], v_at[2], ev[:, None], v_at[3], size, VALUE, EV, True, WIDE
                    )
                    product = tl.dot(queries, keys, tl.zeros((M, N), TYPE), input_precision=PRECISION, out_dtype=TYPE)
                    acc += _slopes(
                        product, grads, values, row_lse, row_delta,
                        mask + batch * mask_at[0] + head * mask_at[1], mask_at[2], mask_at[3],
                        key_of_draws, number, batch, head, rows, j * N, j * N + n, length, size, low, high, width,
                        factor, dropout, kept_scale, None, None, shift, None,
                        2, SIDES, None, None, None, True, PRECISION, False,
                    )  # fmt: skip
    base, row, col, limit_m, limit_n = grad_mask, m_first * M, n_first * N, length, size
    if not ONE_BATCH:
        base += tl.cast(batch_first, tl.int64) * gm_at[0]
    if not ONE_HEAD:
        base += tl.cast(head_first, tl.int64) * gm_at[1]
    if ONE_ROW:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], (M, N))
        limit_m = 1
    if ONE_COL:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], (M, N))
        limit_n = 1
    rows, cols = row + m, col + n
    at = base + (rows.to(tl.int64)[:, None] * gm_at[2] + cols.to(tl.int64)[None, :] * gm_at[3])
    tl.store(at, acc.to(grad_mask.dtype.element_ty), mask=(rows[:, None] < limit_m) & (cols[None, :] < limit_n))
