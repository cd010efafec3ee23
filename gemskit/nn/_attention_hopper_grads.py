"""Gradients of attention on Hopper's tensor cores, in Gluon: one kernel for keys and values, one for queries, no atomics.

Both have one warp that loads and two groups of four warps with half of a tile each. Their seven products have a fixed order, so
results are bitwise repeatable. Where they need not be, :mod:`gemskit.nn._attention_hopper_together` does with five.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemskit import _layout
from gemskit._gluon import barriers, block_to_shared
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.blas._hopper import lines_of
from gemskit.nn._attention_hopper import _descriptor, _place, _seen, served
from gemskit.nn._attention_tiles import LOG2E, tile, window
from gemskit.nn._hopper_order import number_of_tiles, order, sections, tile_of
from gemskit.pointwise._place import copy
from gemskit.reduce import sum

#: Lines of a tile of queries or keys, half of them for each group.
SIDE = 128
#: Rows whose two numbers (lse and delta) lie side by side.
ROWS: tl.constexpr = tl.constexpr(64)


@jit
def attention_row_numbers(
    out, grad, grad_lse, lse, numbers, sums, o_at, g_at, lse_at, gl_at, heads, length, VALUE: tl.constexpr, EV: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """For each ROWS rows their lse in base 2, then ``sum(out * grad)`` less the gradient of the lse.

    A row that sees no key, or is none, gets an lse of inf, so that all its weights are zero. ``sums``, if there, has E columns
    and becomes zero.
    """
    tiles = tl.cdiv(length, ROWS)
    plane, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    local, ev = tl.arange(0, ROWS), tl.arange(0, EV)[None, :]
    out += batch * o_at[0] + head * o_at[1]
    grad += batch * g_at[0] + head * g_at[1]
    a = tile(out, start, local[:, None], o_at[2], ev, o_at[3], length, VALUE, EV, True, True)
    b = tile(grad, start, local[:, None], g_at[2], ev, g_at[3], length, VALUE, EV, True, True)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    row, inside = (start + local).to(tl.int64), start + local < length
    found = tl.load(lse + batch * lse_at[0] + head * lse_at[1] + row * lse_at[2], mask=inside, other=-float("inf"))
    if grad_lse is not None:
        total -= tl.load(grad_lse + batch * gl_at[0] + head * gl_at[1] + row * gl_at[2], mask=inside, other=0.0)
    to = numbers + tl.program_id(0).to(tl.int64) * (2 * ROWS) + local
    tl.store(to, tl.where(found == -float("inf"), float("inf"), found * LOG2E))
    tl.store(to + ROWS, total)
    if sums is not None:
        line = plane.to(tl.int64) * length + row
        tl.store(sums + line[:, None] * E + tl.arange(0, E)[None, :], tl.zeros((ROWS, E), tl.float32), inside[:, None])


# -- keys and values ----------------------------------------------------------------------------------------------------


@gluon.jit
def _tile_of_keys(
    turn, tiles, tiles_n, planes, section, owners, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Batch, owner and keys of the tile of this ``turn``; the first block of BM rows that sees any of them, and how many do."""
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    plane, n = tile_of(turn, tiles, tiles_n, planes, section, False, ORDER)
    first, last = 0, length
    if SIDES % 2 == 1:
        first = max(n * BN - high, 0) // BM
    if SIDES >= 2:
        last = max(min(length, n * BN + BN - low), 0)
    return plane // owners, plane % owners, n, first, max(gl.cdiv(last, BM) - first, 0)


@gluon.jit
def _load_rows(
    query, grad, key, value, queries, grads, keys, values, full, empty, kv_full, kv_empty,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, STAGES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The warp that loads for keys: once their own tiles, then blocks of rows of every head that shares them.

    Heads that share keys may come in ``shares``, each an owner of its own with a sum of its own.
    """
    HALF: gl.constexpr = BN // 2
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, BN * ((E + EV) if KEYS else E) * 2)
        for half in gl.static_range(2):
            at = [batch, owner // shares, n * BN + half * HALF, 0]
            block_to_shared(key, at, kv_full, keys.index(half))
            if KEYS:
                block_to_shared(value, at, kv_full, values.index(half))
        for j in range(group * count):
            stage = i % STAGES
            at = [batch, owner * group + j // count, (first + j % count) * BM, 0]
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BM * (E + EV) * 2)
            block_to_shared(query, at, full.index(stage), queries.index(stage))
            block_to_shared(grad, at, full.index(stage), grads.index(stage))
            i += 1


@gluon.jit
def _seen_from(
    scores, col, row, start, begin, size, low, high, HALF: gl.constexpr, BM: gl.constexpr, SIDES: gl.constexpr
):  # fmt: skip
    """Scores of keys from ``start`` on (down) and rows from ``begin`` on (across), -inf where a row does not see a key.

    Keys from ``size`` on, if given, are not seen: they are zeros, but a weight of theirs may be inf, and inf x 0 is NaN.
    """
    if SIDES != 0 or size is not None:
        edge = start < 0
        if size is not None:
            edge = start + HALF > size
        if SIDES % 2 == 1:
            edge = edge | (start + HALF - 1 > begin + high)
        if SIDES >= 2:
            edge = edge | (start < begin + BM - 1 + low)
        if edge:
            place = (begin + row)[None, :]
            seen = place >= 0
            if size is not None:
                seen = seen & (col[:, None] < size)
            if SIDES % 2 == 1:
                seen = seen & (col[:, None] <= place + high)
            if SIDES >= 2:
                seen = seen & (col[:, None] >= place + low)
            scores = gl.where(seen, scores, -float("inf"))
    return scores


@gluon.jit
def _sum_rows(
    half: gl.constexpr, numbers, to_key, to_value, queries, grads, keys, values, full, empty, kv_full, kv_empty,
    key_at, value_at, tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps with one ``half`` of the keys of every tile: scores stand with keys down and rows across."""
    HALF: gl.constexpr = BN // 2
    KEYS: gl.constexpr = to_key is not None
    VALUES: gl.constexpr = to_value is not None
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    of_key: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    of_value: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, EV, 16])
    dtype: gl.constexpr = keys.dtype
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    blocks = gl.cdiv(length, ROWS)
    row = gl.arange(0, BM, gl.SliceLayout(0, over))
    none = gl.zeros([HALF, BM], gl.float32, over)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        start = n * BN + half * HALF
        col = start + gl.arange(0, HALF, gl.SliceLayout(1, over))
        mbarrier.wait(kv_full, turn & 1)
        k = keys.index(half).reshape([HALF, E])
        if KEYS:
            v = values.index(half).reshape([HALF, EV])
        for_key = gl.zeros([HALF, E], gl.float32, of_key)
        for_value = gl.zeros([HALF, EV], gl.float32, of_value)
        for j in range(group * count):
            stage = i % STAGES
            begin = (first + j % count) * BM
            head = batch * (owners * group) + owner * group + j // count
            at = numbers + (head.to(gl.int64) * blocks + begin // ROWS) * (2 * ROWS) + row
            if BM < ROWS:
                at += begin % ROWS
            lse = gl.load(at)
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            q, g = queries.index(stage).reshape([BM, E]), grads.index(stage).reshape([BM, EV])
            scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
            if KEYS:
                slopes = warpgroup_mma(v, g.permute((1, 0)), none, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
            else:
                scores = warpgroup_mma_wait(0, deps=(scores,))
            scores = _seen_from(scores, col, row, start, begin, None, low, high, HALF, BM, SIDES)
            weights = gl.exp2(scores * factor - lse[None, :])
            if VALUES:
                part = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, of_value, k_width=2))
                for_value = warpgroup_mma(part, g, for_value, is_async=True)
            if KEYS:
                delta = gl.load(at + ROWS)
                if VALUES:
                    slopes = warpgroup_mma_wait(1, deps=(slopes,))
                else:
                    slopes = warpgroup_mma_wait(0, deps=(slopes,))
                change = gl.convert_layout(
                    (weights * (slopes - delta[None, :])).to(dtype), gl.DotOperandLayout(0, of_key, k_width=2)
                )
                for_key = warpgroup_mma(change, q, for_key, is_async=True)
            # In flight into the next step, with a factor in registers, it would make the compiler wait after every product.
            if KEYS and VALUES:
                for_value, for_key, part, change = warpgroup_mma_wait(0, deps=(for_value, for_key, part, change))
            elif KEYS:
                for_key, change = warpgroup_mma_wait(0, deps=(for_key, change))
            else:
                for_value, part = warpgroup_mma_wait(0, deps=(for_value, part))
            mbarrier.arrive(empty.index(stage), count=1)
            i += 1
        mbarrier.arrive(kv_empty, count=1)
        _put(for_key * scale, to_key, batch, owner, start, size, key_at, HALF, E, HEAD)
        _put(for_value, to_value, batch, owner, start, size, value_at, HALF, EV, VALUE)


@gluon.jit
def _put(sums, to, batch, head, start, limit, at, ROWS: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr):
    """Store rows from ``start`` on, where there are any to store."""
    if to is not None:
        lines: gl.constexpr = lines_of(ROWS, E)
        result = gl.convert_layout(sums.to(to.dtype.element_ty), lines)
        row = start + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
        col = gl.arange(0, E, gl.SliceLayout(0, lines))
        to += batch.to(gl.int64) * at[0] + head.to(gl.int64) * at[1]
        place = row.to(gl.int64)[:, None] * at[2] + col[None, :] * at[3]
        gl.store(to + place, result, (row < limit)[:, None] & (col < WIDTH)[None, :])


@gluon.jit
def attention_hopper_grad_key_value(
    query, grad, key, value, numbers, to_key, to_value, key_at, value_at,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """A tile of BN keys and values a turn, summed over blocks of BM rows of all heads that share them."""
    KEYS: gl.constexpr = to_key is not None
    keys = gl.allocate_shared_memory(key.dtype, [2] + key.block_type.shape, key.layout)
    values = keys
    if KEYS:
        values = gl.allocate_shared_memory(value.dtype, [2] + value.block_type.shape, value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad.dtype, [STAGES] + grad.block_type.shape, grad.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    kv_full, kv_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    fence_async_shared()
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize([
        (_sum_rows, (upper, numbers, to_key, to_value, queries, grads, keys, values, full, empty, kv_full, kv_empty,
                     key_at, value_at, tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale,
                     factor, BM, BN, E, EV, HEAD, VALUE, STAGES, SIDES, BOTTOM, ORDER)),
        (_sum_rows, (lower, numbers, to_key, to_value, queries, grads, keys, values, full, empty, kv_full, kv_empty,
                     key_at, value_at, tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale,
                     factor, BM, BN, E, EV, HEAD, VALUE, STAGES, SIDES, BOTTOM, ORDER)),
        (_load_rows, (query, grad, key, value, queries, grads, keys, values, full, empty, kv_full, kv_empty,
                      tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
                      BM, BN, E, EV, STAGES, SIDES, BOTTOM, ORDER, KEYS)),
    ], [4, 1], [240, 24])  # fmt: skip


# -- queries --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_keys(
    query, grad, key, value, queries, grads, keys, values, full, empty, q_full, q_empty,
    tiles, tiles_m, planes, section, heads, group, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, STAGES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """The warp that loads for queries: their rows once, then blocks of keys and values."""
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, head, m, first, count = _place(
            turn, tiles, tiles_m, planes, section, heads, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, BM * (E + EV) * 2)
        for half in gl.static_range(2):
            at = [batch, head, m * BM + half * (BM // 2), 0]
            block_to_shared(query, at, q_full, queries.index(half))
            block_to_shared(grad, at, q_full, grads.index(half))
        for j in range(count):
            stage = i % STAGES
            at = [batch, head // group, (first + j) * BN, 0]
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BN * (E + EV) * 2)
            block_to_shared(key, at, full.index(stage), keys.index(stage))
            block_to_shared(value, at, full.index(stage), values.index(stage))
            i += 1


@gluon.jit
def _sum_keys(
    half: gl.constexpr, numbers, to_query, queries, grads, keys, values, full, empty, q_full, q_empty,
    query_at, tiles, tiles_m, planes, section, heads, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps with one ``half`` of the rows of every tile."""
    HALF: gl.constexpr = BM // 2
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    left_hand: gl.constexpr = gl.DotOperandLayout(0, wide, k_width=2)
    dtype: gl.constexpr = keys.dtype
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    blocks = gl.cdiv(length, HALF)
    col = gl.arange(0, BN, gl.SliceLayout(0, over))
    local = gl.arange(0, HALF, gl.SliceLayout(1, over))
    none = gl.zeros([HALF, BN], gl.float32, over)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, head, m, first, count = _place(
            turn, tiles, tiles_m, planes, section, heads, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        start = m * BM + half * HALF
        row = start + local
        at = numbers + ((batch * heads + head).to(gl.int64) * blocks + start // HALF) * (2 * HALF) + local
        lse = gl.load(at, row < length, float("inf"))
        delta = gl.load(at + HALF, row < length, 0.0)
        mbarrier.wait(q_full, turn & 1)
        q, g = queries.index(half).reshape([HALF, E]), grads.index(half).reshape([HALF, EV])
        acc = gl.zeros([HALF, E], gl.float32, wide)
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        k, v = keys.index(stage).reshape([BN, E]), values.index(stage).reshape([BN, EV])
        scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
        slopes = warpgroup_mma(g, v.permute((1, 0)), none, use_acc=False, is_async=True)
        scores, slopes = warpgroup_mma_wait(0, deps=(scores, slopes))
        scores = _seen(scores, row, col, first * BN, start, size, low, high, HALF, BN, SIDES)
        weights = gl.exp2(scores * factor - lse[:, None])
        change = gl.convert_layout((weights * (slopes - delta[:, None])).to(dtype), left_hand)
        for j in range(1, count):
            before = stage
            i += 1
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            k, v = keys.index(stage).reshape([BN, E]), values.index(stage).reshape([BN, EV])
            scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            slopes = warpgroup_mma(g, v.permute((1, 0)), none, use_acc=False, is_async=True)
            acc = warpgroup_mma(change, keys.index(before).reshape([BN, E]), acc, is_async=True)
            scores, slopes = warpgroup_mma_wait(1, deps=(scores, slopes))
            scores = _seen(scores, row, col, (first + j) * BN, start, size, low, high, HALF, BN, SIDES)
            weights = gl.exp2(scores * factor - lse[:, None])
            following = weights * (slopes - delta[:, None])
            acc, change = warpgroup_mma_wait(0, deps=(acc, change))
            mbarrier.arrive(empty.index(before), count=1)
            change = gl.convert_layout(following.to(dtype), left_hand)
        acc = warpgroup_mma(change, keys.index(stage).reshape([BN, E]), acc, is_async=True)
        acc, change = warpgroup_mma_wait(0, deps=(acc, change))
        mbarrier.arrive(empty.index(stage), count=1)
        i += 1
        mbarrier.arrive(q_empty, count=1)
        _put(acc * scale, to_query, batch, head, start, length, query_at, HALF, E, HEAD)


@gluon.jit
def attention_hopper_grad_query(
    query, grad, key, value, numbers, to_query, query_at,
    tiles, tiles_m, planes, section, heads, group, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """A tile of BM rows a turn, summed over blocks of BN keys."""
    queries = gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad.dtype, [2] + grad.block_type.shape, grad.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    q_full, q_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    fence_async_shared()
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize([
        (_sum_keys, (upper, numbers, to_query, queries, grads, keys, values, full, empty, q_full, q_empty, query_at,
                     tiles, tiles_m, planes, section, heads, length, size, left, right, scale, factor,
                     BM, BN, E, EV, HEAD, STAGES, SIDES, BOTTOM, ORDER)),
        (_sum_keys, (lower, numbers, to_query, queries, grads, keys, values, full, empty, q_full, q_empty, query_at,
                     tiles, tiles_m, planes, section, heads, length, size, left, right, scale, factor,
                     BM, BN, E, EV, HEAD, STAGES, SIDES, BOTTOM, ORDER)),
        (_load_keys, (query, grad, key, value, queries, grads, keys, values, full, empty, q_full, q_empty,
                      tiles, tiles_m, planes, section, heads, group, length, size, left, right,
                      BM, BN, E, EV, STAGES, SIDES, BOTTOM, ORDER)),
    ], [4, 1], [232, 32])  # fmt: skip


# ---- the host's part -----------------------------------------------------------------------------------------------


def run(
    p: Any, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, config: Mapping[str, int],
    to_query: Tensor | None, to_key: Tensor | None, to_value: Tensor | None,
) -> bool:  # fmt: skip
    """Launch for the gradients that are not None; False, with nothing launched, where ``p`` is no problem for these kernels."""
    from gemskit.nn import _attention_hopper_together as together
    from gemskit.nn._attention_hopper_together_wide import attention_hopper_grads_together_wide

    widths = served(p, grad, out, *(t for t in (to_query, to_key, to_value) if t is not None))
    if widths is None:
        return False
    e, ev = widths
    tensors = ((p.query, e), (grad, ev), (p.key, e), (p.value, ev))
    # Blocks of 64 lines, and of 32 where two matrices of 128 lines of 256 stay in shared memory.
    whole = {rows: [_descriptor(t, rows, width) for t, width in tensors] for rows in (64, 32)}
    if None in whole[64] + whole[32]:
        return False
    small = max(widths) <= 128
    short, rest, *_ = p.numbers
    scale = short + rest
    rows = _layout.cdiv(p.length, ROWS.value)
    numbers = torch.empty((p.batch * p.heads * rows, 2, ROWS.value), dtype=torch.float32, device=grad.device)
    width = p.shape["VALUE"]
    added = None
    if together.wanted(p, max(widths), config, to_query, to_key, to_value):
        added = torch.empty((p.batch, p.heads, p.length, e), dtype=torch.float32, device=grad.device)
    launch(
        attention_row_numbers, (numbers.shape[0],),
        (out, grad, grad_lse, lse, numbers, added, out.stride(), grad.stride(), lse.stride(),
         (0, 0, 0) if grad_lse is None else grad_lse.stride(), p.heads, p.length),
        dict(VALUE=width, EV=p.shape["EV"], E=e, num_warps=4),
    )  # fmt: skip
    meta = dict(E=e, EV=ev, HEAD=p.shape["HEAD"], SIDES=p.shape["SIDES"], BOTTOM=p.bottom, num_warps=4)
    causal = p.shape["SIDES"] == 1
    sizes = (p.length, p.size, *p.sides, scale, scale * LOG2E.value)
    # The sums of both gradients of 128 keys do not fit into registers together above 128 columns, those of 64 keys do.
    side = SIDE if small or added is None else SIDE // 2
    parts = [(to_key, to_value)] if small or added is not None else [(to_key, None), (None, to_value)]
    for for_key, for_value in parts:
        if for_key is None and for_value is None:
            continue
        # Where values stay in shared memory too there is room for half as many rows.
        block = 32 if for_value is None and not small else 64
        tiles = _layout.cdiv(p.size, side)
        shares = _shares(p.batch * p.owners * tiles, p.group, config["processors"])
        owners, group = p.owners * shares, p.group // shares
        sums = [t if t is None or shares == 1 else _apart(t, shares) for t in (for_key, for_value)]
        planes = p.batch * owners
        section = sections(planes, p.length * group, e + ev, 1)
        programs, how = order(planes, tiles, section, config["processors"], causal)
        inputs: list[Any] = [*whole[block][:2], *whole[64][2:], numbers]
        kernel = attention_hopper_grad_key_value
        extra: dict[str, int] = {}
        if added is not None:
            inputs[2:] = together.halved(inputs[2]), inputs[3], *together.blocks(numbers, added, 2 if small else 4)
            # Causal, 4096 rows of 128 columns 2.68 ms without and 2.74 with, else 5.19 and 4.68; 64 columns 0.48 and 0.47.
            kernel, extra = together.attention_hopper_grads_together, {"AHEAD": not causal or max(widths) == 64}
            if not small:
                # HELD: above 384 columns of both there is room for one block of gradients.
                kernel, extra = attention_hopper_grads_together_wide, {"HELD": 1 if e == ev else 2}
        launch(
            kernel, (programs,),
            (*inputs, *sums, *map(_strides, sums),
             planes * tiles, tiles, planes, section, owners, group, shares, *sizes),
            dict(meta, BM=block, BN=side, VALUE=width, STAGES=2, ORDER=how, **extra),
        )  # fmt: skip
        for t, found in zip((for_key, for_value), sums):
            if t is not None and found is not None and found is not t:
                copy(sum(found.unflatten(1, (p.owners, shares)), 2), t)
    if added is not None:
        assert to_query is not None
        copy(added[..., : to_query.shape[3]], to_query)
    elif to_query is not None:
        planes, tiles = p.batch * p.heads, _layout.cdiv(p.length, SIDE)
        block = 64 if small else 32
        section = sections(planes, p.size, e + ev, p.group)
        programs, how = order(planes, tiles, section, config["processors"], causal)
        launch(
            attention_hopper_grad_query, (programs,),
            (*whole[64][:2], *whole[block][2:], numbers, to_query, _strides(to_query),
             planes * tiles, tiles, planes, section, p.heads, p.group, *sizes),
            dict(meta, BM=SIDE, BN=block, STAGES=3 if small else 2, ORDER=how),
        )  # fmt: skip
    return True


def _shares(tiles: int, group: int, processors: int) -> int:
    """In how many shares the heads of a key head come: as many as give every processor two tiles, if there are so many."""
    return next((n for n in range(1, group) if group % n == 0 and n * tiles >= 2 * processors), group)


def _apart(t: Tensor, shares: int) -> Tensor:
    batch, owners, *rest = t.shape
    return torch.empty((batch, owners * shares, *rest), dtype=torch.float32, device=t.device)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else t.stride()
