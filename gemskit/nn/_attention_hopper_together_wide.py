"""All gradients of attention above head size 128 on Hopper's tensor cores by one kernel in Gluon, in five products.

As :mod:`gemskit.nn._attention_hopper_together`, but sums for 64 keys and as many values, of 256 columns each, are all that fits
into registers, so each of the two groups that multiply has one of them. The first makes weights of scores, its factors in
registers, and sends them to the second, which makes changes of scores of them, its own factors, and sends those back in their
place. Each multiplies the changes by half of the columns of the keys: the first a block later, while the second makes the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemskit._gluon import barriers, block_to_shared
from gemskit.nn._attention_hopper_grads import _put, _seen_from, _tile_of_keys
from gemskit.nn._attention_hopper_together import _add
from gemskit.nn._attention_tiles import window
from gemskit.nn._hopper_order import number_of_tiles


@gluon.jit
def _load_wide(
    query, grad, key, value, numbers, queries, grads, keys, values, lses, deltas,
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """The warp that loads: once keys and values, then queries with their lse, and gradients with their delta."""
    blocks = gl.cdiv(length, BM)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, BN * (E + EV) * 2)
        block_to_shared(key, [batch, owner // shares, n * BN, 0], kv_full, keys)
        block_to_shared(value, [batch, owner // shares, n * BN, 0], kv_full, values)
        for h in range(group):
            for j in range(first, first + count):
                head = owner * group + h
                line = ((batch * (owners * group) + head) * blocks + j) * 2
                stage, held = i % STAGES, i % HELD
                mbarrier.wait(q_empty.index(stage), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(stage), BM * (E * 2 + 4))
                block_to_shared(query, [batch, head, j * BM, 0], q_full.index(stage), queries.index(stage))
                block_to_shared(numbers, [line, 0], q_full.index(stage), lses.index(stage))
                mbarrier.wait(g_empty.index(held), ((i // HELD) & 1) ^ 1)
                mbarrier.expect(g_full.index(held), BM * (EV * 2 + 4))
                block_to_shared(grad, [batch, head, j * BM, 0], g_full.index(held), grads.index(held))
                block_to_shared(numbers, [line + 1, 0], g_full.index(held), deltas.index(held))
                i += 1


@gluon.jit
def _sent(weights, dtype: gl.constexpr):
    """Weights, which are at most 1, as float16 of 256 times them (normal above 2.4e-7), in the type of the memory they lie in.

    In bfloat16 changes would have 1.2 times the error of torch's flash backend.
    """
    return (weights * 256).to(gl.float16).to(gl.int16, bitcast=True).to(dtype, bitcast=True)


@gluon.jit
def _received(sent):
    return sent.to(gl.int16, bitcast=True).to(gl.float16, bitcast=True).to(gl.float32) * (1 / 256)


@gluon.jit
def _sum_values(
    to_query, to_value, queries, grads, keys, lses, factors, place,
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty, sent, changed, value_at,
    tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, HELD: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps with weights, the sum of values, and the left half of the columns of queries' gradients.

    Scores stand with keys down and rows across.
    """
    COLS: gl.constexpr = E // 2
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    of_value: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, EV, 16])
    of_half: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS // 2, 16]
    )
    dtype: gl.constexpr = keys.dtype
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    row = gl.arange(0, BM, gl.SliceLayout(0, over))
    none = gl.zeros([BN, BM], gl.float32, over)
    quarter = gl.zeros([BM, COLS // 2], gl.float32, of_half)
    k = keys.reshape([BN, E])
    mine = k.slice(0, COLS, dim=1)
    left_half, right_half = mine.slice(0, COLS // 2, dim=1), mine.slice(COLS // 2, COLS // 2, dim=1)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        start = n * BN
        col = start + gl.arange(0, BN, gl.SliceLayout(1, over))
        for_value = gl.zeros([BN, EV], gl.float32, of_value)
        # Before its first block a tile multiplies the last changes of the one before once more, and adds that behind all rows.
        head, begin = owner * group, length
        mbarrier.wait(kv_full, turn & 1)
        for h in range(group):
            for j in range(first, first + count):
                stage, held = i % STAGES, i % HELD
                mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)
                q = queries.index(stage).reshape([BM, E])
                scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                lse = lses.index(stage).reshape([BM]).load(gl.SliceLayout(0, over))
                mbarrier.arrive(q_empty.index(stage), count=1)
                last_head, last_begin = head, begin
                head, begin = owner * group + h, j * BM
                scores = _seen_from(scores, col, row, start, begin, size, low, high, BN, BM, SIDES)
                weights = gl.exp2(scores * factor - lse[None, :])
                # Two places in turn: when the last changes come, the ones before, which lie here, were multiplied by both.
                mbarrier.wait(changed, (i & 1) ^ 1)
                factors.index(i % 2).store(_sent(weights, dtype))
                mbarrier.arrive(sent, count=1)
                last = factors.index((i + 1) % 2).permute((1, 0))
                one = warpgroup_mma(last, left_half, quarter, use_acc=False, is_async=True)
                part = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, of_value, k_width=2))
                mbarrier.wait(g_full.index(held), (i // HELD) & 1)
                for_value = warpgroup_mma(part, grads.index(held).reshape([BM, EV]), for_value, is_async=True)
                one = warpgroup_mma_wait(1, deps=(one,))
                _add(to_query, one * scale, place, [batch, last_head, last_begin, 0], BM, COLS // 2)
                # What has a factor in registers and is in flight into the next step makes ptxas wait after every product.
                for_value, part = warpgroup_mma_wait(0, deps=(for_value, part))
                mbarrier.arrive(g_empty.index(held), count=1)
                two = warpgroup_mma(last, right_half, quarter, use_acc=False, is_async=True)
                two = warpgroup_mma_wait(0, deps=(two,))
                _add(to_query, two * scale, place, [batch, last_head, last_begin, COLS // 2], BM, COLS // 2)
                i += 1
        mbarrier.wait(changed, (i & 1) ^ 1)
        last = factors.index((i + 1) % 2).permute((1, 0))
        one = warpgroup_mma(last, left_half, quarter, use_acc=False, is_async=True)
        two = warpgroup_mma(last, right_half, quarter, use_acc=False, is_async=True)
        one, two = warpgroup_mma_wait(0, deps=(one, two))
        mbarrier.arrive(kv_empty, count=1)
        _add(to_query, one * scale, place, [batch, head, begin, 0], BM, COLS // 2)
        _put(for_value, to_value, batch, owner, start, size, value_at, BN, EV, VALUE)
        _add(to_query, two * scale, place, [batch, head, begin, COLS // 2], BM, COLS // 2)
    tma.store_wait(0)


@gluon.jit
def _sum_keys(
    to_query, to_key, queries, grads, keys, values, deltas, factors, place,
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty, sent, changed, key_at,
    tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr,
    STAGES: gl.constexpr, HELD: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps with changes of scores, the sum of keys, and the right half of the columns of queries' gradients."""
    COLS: gl.constexpr = E // 2
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    of_key: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    of_half: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS // 2, 16]
    )
    none = gl.zeros([BN, BM], gl.float32, over)
    quarter = gl.zeros([BM, COLS // 2], gl.float32, of_half)
    v = values.reshape([BN, EV])
    mine = keys.reshape([BN, E]).slice(COLS, COLS, dim=1)
    left_half, right_half = mine.slice(0, COLS // 2, dim=1), mine.slice(COLS // 2, COLS // 2, dim=1)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        for_key = gl.zeros([BN, E], gl.float32, of_key)
        mbarrier.wait(kv_full, turn & 1)
        for h in range(group):
            for j in range(first, first + count):
                stage, held = i % STAGES, i % HELD
                head, begin = owner * group + h, j * BM
                mbarrier.wait(g_full.index(held), (i // HELD) & 1)
                g = grads.index(held).reshape([BM, EV])
                slopes = warpgroup_mma(v, g.permute((1, 0)), none, use_acc=False, is_async=True)
                slopes = warpgroup_mma_wait(0, deps=(slopes,))
                delta = deltas.index(held).reshape([BM]).load(gl.SliceLayout(0, over))
                mbarrier.arrive(g_empty.index(held), count=1)
                mbarrier.wait(sent, i & 1)
                weights = _received(factors.index(i % 2).load(over))
                change = (weights * (slopes - delta[None, :])).to(keys.dtype)
                # In place of the weights.
                factors.index(i % 2).store(change)
                fence_async_shared()
                mbarrier.arrive(changed, count=1)
                change = gl.convert_layout(change, gl.DotOperandLayout(0, of_key, k_width=2))
                mbarrier.wait(changed, i & 1)
                mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)
                changes = factors.index(i % 2).permute((1, 0))
                one = warpgroup_mma(changes, left_half, quarter, use_acc=False, is_async=True)
                for_key = warpgroup_mma(change, queries.index(stage).reshape([BM, E]), for_key, is_async=True)
                one = warpgroup_mma_wait(1, deps=(one,))
                _add(to_query, one * scale, place, [batch, head, begin, COLS], BM, COLS // 2)
                two = warpgroup_mma(changes, right_half, quarter, use_acc=False, is_async=True)
                for_key, change, two = warpgroup_mma_wait(0, deps=(for_key, change, two))
                mbarrier.arrive(q_empty.index(stage), count=1)
                _add(to_query, two * scale, place, [batch, head, begin, COLS + COLS // 2], BM, COLS // 2)
                i += 1
        mbarrier.arrive(kv_empty, count=1)
        _put(for_key * scale, to_key, batch, owner, n * BN, size, key_at, BN, E, HEAD)
    tma.store_wait(0)


@gluon.jit
def attention_hopper_grads_together_wide(
    query, grad, key, value, numbers, to_query, to_key, to_value, key_at, value_at,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, HELD: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """A tile of BN keys and values a turn, and blocks of BM rows of all heads that share them, whose gradients it adds to.

    There is room for STAGES blocks of queries and HELD of ``grad``. ``to_query`` adds a quarter of the columns of a block.
    """
    keys = gl.allocate_shared_memory(key.dtype, key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, value.block_type.shape, value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad.dtype, [HELD] + grad.block_type.shape, grad.layout)
    lses = gl.allocate_shared_memory(numbers.dtype, [STAGES] + numbers.block_type.shape, numbers.layout)
    deltas = gl.allocate_shared_memory(numbers.dtype, [HELD] + numbers.block_type.shape, numbers.layout)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], key.dtype)
    factors = gl.allocate_shared_memory(key.dtype, [2, BN, BM], layout)
    sums = gl.allocate_shared_memory(to_query.dtype, [2] + to_query.block_type.shape, to_query.layout)
    q_full, q_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    g_full, g_empty = barriers(HELD, 1), barriers(HELD, 2)
    kv_full, kv_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    sent, changed = barriers(1, 1).index(0), barriers(1, 1).index(0)
    fence_async_shared()
    gl.warp_specialize([
        (_sum_values, (to_query, to_value, queries, grads, keys, lses, factors, sums.index(0),
                       q_full, q_empty, g_full, g_empty, kv_full, kv_empty, sent, changed, value_at,
                       tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
                       BM, BN, E, EV, VALUE, STAGES, HELD, SIDES, BOTTOM, ORDER)),
        (_sum_keys, (to_query, to_key, queries, grads, keys, values, deltas, factors, sums.index(1),
                     q_full, q_empty, g_full, g_empty, kv_full, kv_empty, sent, changed, key_at,
                     tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale,
                     BM, BN, E, EV, HEAD, STAGES, HELD, SIDES, BOTTOM, ORDER)),
        (_load_wide, (query, grad, key, value, numbers, queries, grads, keys, values, lses, deltas,
                      q_full, q_empty, g_full, g_empty, kv_full, kv_empty,
                      tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
                      BM, BN, E, EV, STAGES, HELD, SIDES, BOTTOM, ORDER)),
    ], [4, 1], [240, 24])  # fmt: skip
