# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""Kernels of scaled dot-product attention: one pass over the keys forward, two kernels without atomics backward.

With ``s = scale * query @ key.T + bias`` the forward keeps ``lse = log(sum(exp(s)))`` of every row; the backward
recomputes ``p = exp(s - lse)`` tile by tile and uses, with ``delta = sum(out * grad)``,
``grad_value = p.T @ grad``, ``ds = p * (grad @ value.T - delta)``, ``grad_query = scale * ds @ key`` and
``grad_key = scale * ds.T @ query``. Scores live in base 2 (``exp2``), sums in float32 (float64 for float64).
Every sum has a fixed order, so results are bitwise repeatable.
"""

from __future__ import annotations

import triton.language as tl

from gemskit._jit import jit

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@jit
def _tile(
    base, start, rows, row_stride, cols, col_stride, limit,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows ``start + rows`` below ``limit`` and columns below WIDTH of a matrix, zero elsewhere."""
    if WIDE:  # int64 costs two registers an offset: only where one tile reaches past 2^31 elements
        rows_wide, cols_wide = rows.to(tl.int64), cols.to(tl.int64)
    else:
        rows_wide, cols_wide = rows, cols
    at = base + tl.cast(start, tl.int64) * row_stride + (rows_wide * row_stride + cols_wide * col_stride)
    if EDGE and WIDTH != PADDED:
        tile = tl.load(at, mask=(start + rows < limit) & (cols < WIDTH), other=0.0)
    elif EDGE:
        tile = tl.load(at, mask=start + rows < limit, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(at, mask=cols < WIDTH, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@jit
def _line(base, start, local, limit, EDGE: tl.constexpr):
    if EDGE:
        line = tl.load(base + start + local, mask=start + local < limit, other=0.0)
    else:
        line = tl.load(base + start + local)
    return line


@jit
def _put(base, start, rows, row_stride, cols, col_stride, limit, tile, WIDTH: tl.constexpr):
    """Store the part of ``tile`` that `_tile` would load."""
    at = base + tl.cast(start, tl.int64) * row_stride
    at += rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride
    tl.store(at, tile.to(base.dtype.element_ty), mask=(start + rows < limit) & (cols < WIDTH))


@jit
def _factor(scale, scale_low, TYPE: tl.constexpr):
    """The scale in base 2; a float argument is float32, so float64 takes the remainder in a second one."""
    return (tl.cast(scale, TYPE) + tl.cast(scale_low, TYPE)) * _LOG2E


@jit
def _masked(
    scores, rows, cols, mask, mask_m, mask_n, length, size, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr
):
    """Scores in base 2 with the mask applied: MASK 1 is boolean, 2 is added; EDGE bounds columns and the diagonal."""
    if MASK != 0:
        at = mask + (rows.to(tl.int64) * mask_m + cols.to(tl.int64) * mask_n)
        bias = tl.load(at, mask=(rows < length) & (cols < size), other=0)
        if MASK == 1:
            scores = tl.where(bias != 0, scores, -float("inf"))
        else:
            scores += bias.to(scores.dtype) * _LOG2E
    if EDGE:
        live = cols < size
        if CAUSAL:
            live = live & (cols <= rows)
        scores = tl.where(live, scores, -float("inf"))
    return scores


@jit
def _kept(seed, plane, rows, cols, length, size, dropout):
    """True with probability 1 - dropout; the number belongs to the element, not to the block that asks."""
    return tl.rand(seed, (tl.cast(plane, tl.int64) * length + rows) * size + cols) >= dropout


@jit
def _forward_steps(
    acc, total, peak,
    query, key, k_n, k_d, value, v_n, v_d,
    mask, mask_m, mask_n,
    seed, plane, rows,
    first, last, length, size, factor, dropout,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    for start in range(first, last, N):
        keys = _tile(key, start, local[None, :], k_n, e[:, None], k_d, size, HEAD, E, EDGE, WIDE)
        scores = tl.zeros((rows.shape[0], N), acc.dtype)
        scores = tl.dot(query, keys, scores, input_precision=PRECISION, out_dtype=acc.dtype) * factor
        cols = start + local
        scores = _masked(scores, rows[:, None], cols[None, :], mask, mask_m, mask_n, length, size, MASK, CAUSAL, EDGE)
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN in a row with no key so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if DROPOUT:
            kept = _kept(seed, plane, rows[:, None], cols[None, :], length, size, dropout)
            weights = tl.where(kept, weights, 0.0)
        values = _tile(value, start, local[:, None], v_n, ev[None, :], v_d, size, VALUE, EV, EDGE, WIDE)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        peak = top
    return acc, total, peak


@jit
def attention_forward(
    query, key, value, mask, out, lse, seed,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    mask_b, mask_h, mask_m, mask_n, o_b, o_h, o_m, o_d,
    heads, group, length, size,
    scale, scale_low, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = lse.dtype.element_ty
    tiles = tl.cdiv(length, M)
    plane = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * M  # with the causal rule the last rows have most to do: first
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    query += batch * q_b + head * q_h
    key += batch * k_b + head // group * k_h
    value += batch * v_b + head // group * v_h
    out += batch * o_b + head * o_h
    if MASK != 0:
        mask += batch * mask_b + head * mask_h
    number = plane
    if DROPOUT:
        number = tl.load(seed)
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    rows = start + local
    queries = _tile(query, start, local[:, None], q_m, e[None, :], q_d, length, HEAD, E, True, WIDE)
    factor = _factor(scale, scale_low, TYPE)
    acc, total = tl.zeros((M, EV), TYPE), tl.zeros((M,), TYPE)
    peak = tl.full((M,), -float("inf"), TYPE)
    last, whole = size, size // N * N
    if CAUSAL:
        last = tl.minimum(size, start + M)
        whole = tl.minimum(whole, (start + 1) // N * N)
    acc, total, peak = _forward_steps(
        acc, total, peak,
        queries, key, k_n, k_d, value, v_n, v_d,
        mask, mask_m, mask_n,
        number, plane, rows,
        0, whole, length, size, factor, dropout,
        HEAD, E, VALUE, EV, N,
        MASK, CAUSAL, False,
        DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    acc, total, peak = _forward_steps(
        acc, total, peak,
        queries, key, k_n, k_d, value, v_n, v_d,
        mask, mask_m, mask_n,
        number, plane, rows,
        whole, last, length, size, factor, dropout,
        HEAD, E, VALUE, EV, N,
        MASK, CAUSAL, True,
        DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)  # a row with no key gives 0, as torch's safe softmax
    result = acc * (1.0 / safe)[:, None]
    if DROPOUT:
        result = result * tl.cast(kept_scale, TYPE)
    _put(out, start, local[:, None], o_m, ev[None, :], o_d, length, result, VALUE)
    tl.store(lse + tl.cast(plane, tl.int64) * length + rows, (peak + tl.log2(total)) * _LN2, mask=rows < length)


@jit
def attention_delta(
    out, grad, delta,
    o_b, o_h, o_m, o_d, g_b, g_h, g_m, g_d,
    heads, length,
    VALUE: tl.constexpr, EV: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = delta.dtype.element_ty
    tiles = tl.cdiv(length, M)
    plane, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    local, ev = tl.arange(0, M), tl.arange(0, EV)
    left = _tile(
        out + batch * o_b + head * o_h, start, local[:, None], o_m, ev[None, :], o_d, length, VALUE, EV, True, WIDE
    )
    right = _tile(
        grad + batch * g_b + head * g_h, start, local[:, None], g_m, ev[None, :], g_d, length, VALUE, EV, True, WIDE
    )
    rows = start + local
    total = tl.sum(left.to(TYPE) * right.to(TYPE), 1)
    tl.store(delta + tl.cast(plane, tl.int64) * length + rows, total, mask=rows < length)


@jit
def _weights(scores, lse):
    """exp(score - lse) from base 2 scores and natural lse; a row with no key has lse -inf and weights 0."""
    base = tl.where(lse == -float("inf"), 0.0, lse * _LOG2E)
    return tl.exp2(scores - base)


@jit
def _key_steps(
    grad_key, grad_value, keys, values,
    query, q_h, q_m, q_d, grad, g_h, g_m, g_d,
    mask, mask_h, mask_m, mask_n,
    lse, delta,
    seed, plane, cols, group,
    first, count, diagonal, jump,
    length, size, factor, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, M: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = grad_key.dtype
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    # One loop over heads and row tiles: a nested one would keep a second set of pointers in registers.
    for index in range(group * count):
        member, step = tl.cast(index // count, tl.int64), first + index % count
        queries_at, grads_at, number = query + member * q_h, grad + member * g_h, plane + member
        mask_at = mask
        if MASK != 0:
            mask_at = mask + member * mask_h
        start = step * M
        if EDGE:
            start = tl.where(step < diagonal, step, step + jump) * M
        rows = start + local
        queries = _tile(queries_at, start, local[:, None], q_m, e[None, :], q_d, length, HEAD, E, EDGE, WIDE)
        scores = tl.zeros((cols.shape[0], M), TYPE)
        scores = tl.dot(keys, queries.T, scores, input_precision=PRECISION, out_dtype=TYPE) * factor
        scores = _masked(
            scores, rows[None, :], cols[:, None], mask_at, mask_m, mask_n, length, size, MASK, CAUSAL, EDGE
        )
        weights = _weights(scores, _line(lse + number * length, start, local, length, EDGE)[None, :])
        grads = _tile(grads_at, start, local[:, None], g_m, ev[None, :], g_d, length, VALUE, EV, EDGE, WIDE)
        if DROPOUT:
            kept = _kept(seed, number, rows[None, :], cols[:, None], length, size, dropout)
        if VALUE_GRAD:
            used = tl.where(kept, weights * kept_scale, 0.0) if DROPOUT else weights
            grad_value = tl.dot(used.to(grads.dtype), grads, grad_value, input_precision=PRECISION, out_dtype=TYPE)
        if KEY_GRAD:
            product = tl.zeros((cols.shape[0], M), TYPE)
            product = tl.dot(values, grads.T, product, input_precision=PRECISION, out_dtype=TYPE)
            if DROPOUT:
                product = tl.where(kept, product * kept_scale, 0.0)
            slope = weights * (product - _line(delta + number * length, start, local, length, EDGE)[None, :])
            grad_key = tl.dot(slope.to(queries.dtype), queries, grad_key, input_precision=PRECISION, out_dtype=TYPE)
    return grad_key, grad_value


@jit
def attention_grad_key_value(
    query, key, value, mask, grad, lse, delta,
    grad_key, grad_value, seed,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    mask_b, mask_h, mask_m, mask_n, g_b, g_h, g_m, g_d,
    gk_b, gk_h, gk_n, gk_d, gv_b, gv_h, gv_n, gv_d,
    heads, group, length, size, scale, scale_low, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, summed over the query heads that share them; either can be left out."""
    TYPE: tl.constexpr = lse.dtype.element_ty
    tiles, owners = tl.cdiv(size, N), heads // group
    owner, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * N
    batch, head = owner // owners, (owner % owners).to(tl.int64)
    wide = batch.to(tl.int64)
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    cols = start + local
    keys = _tile(key + wide * k_b + head * k_h, start, local[:, None], k_n, e[None, :], k_d, size, HEAD, E, True, WIDE)
    values = _tile(
        value + wide * v_b + head * v_h, start, local[:, None], v_n, ev[None, :], v_d, size, VALUE, EV, True, WIDE
    )
    factor = _factor(scale, scale_low, TYPE)
    number = owner
    if DROPOUT:
        number = tl.load(seed)
    acc_key, acc_value = tl.zeros((N, E), TYPE), tl.zeros((N, EV), TYPE)
    # Row tiles in units of M: none before `above`, the diagonal up to `first`, unmasked ones up to `whole`, a last one.
    above, first, whole, end = 0, 0, length // M, tl.cdiv(length, M)
    if CAUSAL:
        above, first = start // M, tl.minimum(tl.cdiv(start + N - 1, M), end)
    whole = tl.maximum(whole, first)
    jump = whole - first
    edges = end - jump
    inner = head * group
    plane = wide * heads + inner
    query += wide * q_b + inner * q_h
    grad += wide * g_b + inner * g_h
    if MASK != 0:
        mask += wide * mask_b + inner * mask_h
    acc_key, acc_value = _key_steps(
        acc_key, acc_value, keys, values,
        query, q_h, q_m, q_d, grad, g_h, g_m, g_d,
        mask, mask_h, mask_m, mask_n,
        lse, delta,
        number, plane, cols, group,
        first, whole - first, 0, 0,
        length, size, factor, dropout, kept_scale,
        HEAD, E, VALUE, EV, M,
        MASK, CAUSAL, False,
        DROPOUT, PRECISION, WIDE,
        KEY_GRAD, VALUE_GRAD,
    )  # fmt: skip
    acc_key, acc_value = _key_steps(
        acc_key, acc_value, keys, values,
        query, q_h, q_m, q_d, grad, g_h, g_m, g_d,
        mask, mask_h, mask_m, mask_n,
        lse, delta,
        number, plane, cols, group,
        above, tl.maximum(edges - above, 0), first, jump,
        length, size, factor, dropout, kept_scale,
        HEAD, E, VALUE, EV, M,
        MASK, CAUSAL, True,
        DROPOUT, PRECISION, WIDE,
        KEY_GRAD, VALUE_GRAD,
    )  # fmt: skip
    if KEY_GRAD:
        acc_key *= factor * _LN2
        _put(grad_key + wide * gk_b + head * gk_h, start, local[:, None], gk_n, e[None, :], gk_d, size, acc_key, HEAD)
    if VALUE_GRAD:
        _put(
            grad_value + wide * gv_b + head * gv_h, start, local[:, None], gv_n, ev[None, :], gv_d, size,
            acc_value, VALUE,
        )  # fmt: skip


@jit
def _slopes(
    scores, grads, values, lse, delta,
    seed, plane, rows, cols, length, size, dropout, kept_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the masked, scaled scores (natural units) of one tile; values come transposed."""
    weights = _weights(scores, lse[:, None])
    product = tl.dot(grads, values, tl.zeros_like(scores), input_precision=PRECISION, out_dtype=scores.dtype)
    if DROPOUT:
        kept = _kept(seed, plane, rows[:, None], cols[None, :], length, size, dropout)
        product = tl.where(kept, product * kept_scale, 0.0)
    return weights * (product - delta[:, None])


@jit
def _query_steps(
    acc, queries, grads, lse, delta,
    key, k_n, k_d, value, v_n, v_d,
    mask, mask_m, mask_n,
    seed, plane, rows,
    first, last, length, size, factor, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    local, e, ev = tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    for start in range(first, last, N):
        cols = start + local
        keys = _tile(key, start, local[:, None], k_n, e[None, :], k_d, size, HEAD, E, EDGE, WIDE)
        values = _tile(value, start, local[None, :], v_n, ev[:, None], v_d, size, VALUE, EV, EDGE, WIDE)
        scores = tl.zeros((rows.shape[0], N), acc.dtype)
        scores = tl.dot(queries, keys.T, scores, input_precision=PRECISION, out_dtype=acc.dtype) * factor
        scores = _masked(scores, rows[:, None], cols[None, :], mask, mask_m, mask_n, length, size, MASK, CAUSAL, EDGE)
        slopes = _slopes(
            scores, grads, values, lse, delta,
            seed, plane, rows, cols, length, size, dropout, kept_scale,
            DROPOUT, PRECISION,
        )  # fmt: skip
        acc = tl.dot(slopes.to(keys.dtype), keys, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@jit
def attention_grad_query(
    query, key, value, mask, grad, lse, delta, grad_query, seed,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    mask_b, mask_h, mask_m, mask_n, g_b, g_h, g_m, g_d, gq_b, gq_h, gq_m, gq_d,
    heads, group, length, size, scale, scale_low, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = lse.dtype.element_ty
    tiles = tl.cdiv(length, M)
    plane = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * M
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    key += batch * k_b + head // group * k_h
    value += batch * v_b + head // group * v_h
    if MASK != 0:
        mask += batch * mask_b + head * mask_h
    number = plane
    if DROPOUT:
        number = tl.load(seed)
    local, e, ev = tl.arange(0, M), tl.arange(0, E), tl.arange(0, EV)
    rows = start + local
    queries = _tile(
        query + batch * q_b + head * q_h, start, local[:, None], q_m, e[None, :], q_d, length, HEAD, E, True, WIDE
    )
    grads = _tile(
        grad + batch * g_b + head * g_h, start, local[:, None], g_m, ev[None, :], g_d, length, VALUE, EV, True, WIDE
    )
    line = tl.cast(plane, tl.int64) * length
    row_lse = tl.load(lse + line + rows, mask=rows < length, other=0.0)
    row_delta = tl.load(delta + line + rows, mask=rows < length, other=0.0)
    factor = _factor(scale, scale_low, TYPE)
    last, whole = size, size // N * N
    if CAUSAL:
        last = tl.minimum(size, start + M)
        whole = tl.minimum(whole, (start + 1) // N * N)
    acc = tl.zeros((M, E), TYPE)
    acc = _query_steps(
        acc, queries, grads, row_lse, row_delta,
        key, k_n, k_d, value, v_n, v_d,
        mask, mask_m, mask_n,
        number, plane, rows,
        0, whole, length, size, factor, dropout, kept_scale,
        HEAD, E, VALUE, EV, N,
        MASK, CAUSAL, False,
        DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    acc = _query_steps(
        acc, queries, grads, row_lse, row_delta,
        key, k_n, k_d, value, v_n, v_d,
        mask, mask_m, mask_n,
        number, plane, rows,
        whole, last, length, size, factor, dropout, kept_scale,
        HEAD, E, VALUE, EV, N,
        MASK, CAUSAL, True,
        DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    acc *= factor * _LN2
    _put(grad_query + batch * gq_b + head * gq_h, start, local[:, None], gq_m, e[None, :], gq_d, length, acc, HEAD)


@jit
def attention_grad_mask(
    query, key, value, mask, grad, lse, delta, grad_mask, seed,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    mask_b, mask_h, mask_m, mask_n, g_b, g_h, g_m, g_d, gm_b, gm_h, gm_m, gm_n,
    batches, heads, group, length, size, scale, scale_low, dropout, kept_scale,
    HEAD: tl.constexpr, E: tl.constexpr, VALUE: tl.constexpr, EV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    ONE_BATCH: tl.constexpr, ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
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
    number = rest
    if DROPOUT:
        number = tl.load(seed)
    factor = _factor(scale, scale_low, TYPE)
    m, n, e, ev = tl.arange(0, M), tl.arange(0, N), tl.arange(0, E), tl.arange(0, EV)
    acc = tl.zeros((M, N), TYPE)
    for b in range(batch_first, batch_last):
        for h in range(head_first, head_last):
            batch, head = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
            plane = batch * heads + head
            for i in range(m_first, m_last):
                rows = i * M + m
                queries = _tile(
                    query + batch * q_b + head * q_h, i * M, m[:, None], q_m, e[None, :], q_d, length,
                    HEAD, E, True, WIDE,
                )  # fmt: skip
                grads = _tile(
                    grad + batch * g_b + head * g_h, i * M, m[:, None], g_m, ev[None, :], g_d, length,
                    VALUE, EV, True, WIDE,
                )  # fmt: skip
                row_lse = tl.load(lse + plane * length + rows, mask=rows < length, other=0.0)
                row_delta = tl.load(delta + plane * length + rows, mask=rows < length, other=0.0)
                for j in range(n_first, n_last):
                    cols = j * N + n
                    keys = _tile(
                        key + batch * k_b + head // group * k_h, j * N, n[None, :], k_n, e[:, None], k_d, size,
                        HEAD, E, True, WIDE,
                    )  # fmt: skip
                    values = _tile(
                        value + batch * v_b + head // group * v_h, j * N, n[None, :], v_n, ev[:, None], v_d, size,
                        VALUE, EV, True, WIDE,
                    )  # fmt: skip
                    scores = tl.dot(queries, keys, tl.zeros((M, N), TYPE), input_precision=PRECISION, out_dtype=TYPE)
                    scores = _masked(
                        scores * factor, rows[:, None], cols[None, :],
                        mask + batch * mask_b + head * mask_h, mask_m, mask_n,
                        length, size, 2, CAUSAL, True,
                    )  # fmt: skip
                    acc += _slopes(
                        scores, grads, values, row_lse, row_delta,
                        number, plane, rows, cols, length, size, dropout, kept_scale,
                        DROPOUT, PRECISION,
                    )  # fmt: skip
    base, row, col, limit_m, limit_n = grad_mask, m_first * M, n_first * N, length, size
    if not ONE_BATCH:
        base += tl.cast(batch_first, tl.int64) * gm_b
    if not ONE_HEAD:
        base += tl.cast(head_first, tl.int64) * gm_h
    if ONE_ROW:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], (M, N))
        limit_m = 1
    if ONE_COL:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], (M, N))
        limit_n = 1
    rows, cols = row + m, col + n
    at = base + (rows.to(tl.int64)[:, None] * gm_m + cols.to(tl.int64)[None, :] * gm_n)
    tl.store(at, acc.to(grad_mask.dtype.element_ty), mask=(rows[:, None] < limit_m) & (cols[None, :] < limit_n))
