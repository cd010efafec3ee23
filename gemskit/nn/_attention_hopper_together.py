"""All gradients of attention on Hopper's tensor cores by one kernel in Gluon, in five products.

Tiles of keys as in :mod:`gemskit.nn._attention_hopper_grads`, which needs seven with its two kernels. Here what a tile gives to
queries' gradients is added up in float32 in global memory by the copy engine, in an order that changes: results are not bitwise
repeatable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemskit._gluon import add_block, barriers, block_to_shared
from gemskit._tensor_map import Descriptor
from gemskit.nn._attention_hopper_grads import ROWS, _put, _seen_from, _tile_of_keys
from gemskit.nn._attention_tiles import window
from gemskit.nn._hopper_order import number_of_tiles


@gluon.jit
def _load_all(
    query, grad, key, value, numbers, queries, grads, keys, values, pairs, full, empty, kv_full, kv_empty,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, STAGES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """The warp that loads: once keys and values, then blocks of rows with their numbers of every head that shares them."""
    HALF: gl.constexpr = BN // 2
    blocks = gl.cdiv(length, BM)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, BN * (E + EV) * 2)
        for half in gl.static_range(2):
            at = [batch, owner // shares, n * BN + half * HALF, 0]
            block_to_shared(key, at, kv_full, keys.index(half))
            block_to_shared(value, at, kv_full, values.index(half))
        for h in range(group):
            head = owner * group + h
            for j in range(first, first + count):
                stage = i % STAGES
                ready = full.index(stage)
                at = [batch, head, j * BM, 0]
                mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(ready, BM * ((E + EV) * 2 + 8))
                block_to_shared(query, at, ready, queries.index(stage))
                block_to_shared(grad, at, ready, grads.index(stage))
                line = ((batch * (owners * group) + head) * blocks + j) * 2
                block_to_shared(numbers, [line, 0], ready, pairs.index(2 * stage))
                block_to_shared(numbers, [line + 1, 0], ready, pairs.index(2 * stage + 1))
                i += 1


@gluon.jit
def _add(to_query, part, place, at, BM: gl.constexpr, COLS: gl.constexpr):
    """Add to the queries' gradients at ``at``, by way of ``place`` in shared memory, once the last block was read from there."""
    tma.store_wait(0)
    place.reshape([BM, COLS]).store(part)
    fence_async_shared()
    add_block(to_query, at, place)


@gluon.jit
def _sum_all(
    half: gl.constexpr, to_query, to_key, to_value, queries, grads, keys, values, pairs, changes, sums,
    full, empty, kv_full, kv_empty, changed, key_at, value_at,
    tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Four warps with one ``half`` of the keys of every tile, and of the columns of queries' gradients.

    Scores stand with keys down and rows across. With AHEAD those of the next block are computed while this one's are added.
    """
    HALF: gl.constexpr = BN // 2
    COLS: gl.constexpr = E // 2
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    of_key: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    of_value: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, EV, 16])
    of_query: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    dtype: gl.constexpr = keys.dtype
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    row = gl.arange(0, BM, gl.SliceLayout(0, over))
    none = gl.zeros([HALF, BM], gl.float32, over)
    nothing = gl.zeros([BM, COLS], gl.float32, of_query)
    mine = sums.index(half)
    i = 0
    for turn in range(number_of_tiles(tiles, ORDER)):
        batch, owner, n, first, count = _tile_of_keys(
            turn, tiles, tiles_n, planes, section, owners, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        start = n * BN + half * HALF
        col = start + gl.arange(0, HALF, gl.SliceLayout(1, over))
        k, v = keys.index(half).reshape([HALF, E]), values.index(half).reshape([HALF, EV])
        mbarrier.wait(kv_full, turn & 1)
        for_key = gl.zeros([HALF, E], gl.float32, of_key)
        for_value = gl.zeros([HALF, EV], gl.float32, of_value)
        if AHEAD:
            if count > 0:
                mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
            q = queries.index(i % STAGES).reshape([BM, E])
            scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        for h in range(group):
            head = owner * group + h
            for j in range(first, first + count):
                stage = i % STAGES
                begin = j * BM
                q, g = queries.index(stage).reshape([BM, E]), grads.index(stage).reshape([BM, EV])
                if AHEAD:
                    # In flight from the step before, where the compiler knows of no products but all.
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    slopes = warpgroup_mma(v, g.permute((1, 0)), none, use_acc=False, is_async=True)
                else:
                    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
                    scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
                    slopes = warpgroup_mma(v, g.permute((1, 0)), none, use_acc=False, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=(scores,))
                scores = _seen_from(scores, col, row, start, begin, size, low, high, HALF, BM, SIDES)
                lse = pairs.index(2 * stage).reshape([BM]).load(gl.SliceLayout(0, over))
                weights = gl.exp2(scores * factor - lse[None, :])
                part = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, of_value, k_width=2))
                for_value = warpgroup_mma(part, g, for_value, is_async=True)
                slopes = warpgroup_mma_wait(1, deps=(slopes,))
                delta = pairs.index(2 * stage + 1).reshape([BM]).load(gl.SliceLayout(0, over))
                change = (weights * (slopes - delta[None, :])).to(dtype)
                # Two places in turn: the other group has read this one before it sent its last changes.
                place = i % 2 * 2
                changes.index(place + half).store(change)
                fence_async_shared()
                mbarrier.arrive(changed, count=1)
                change = gl.convert_layout(change, gl.DotOperandLayout(0, of_key, k_width=2))
                for_key = warpgroup_mma(change, q, for_key, is_async=True)
                mbarrier.wait(changed, i & 1)
                for_query = nothing
                for side in gl.static_range(2):
                    for_query = warpgroup_mma(
                        changes.index(place + side).permute((1, 0)),
                        keys.index(side).reshape([HALF, E]).slice(half * COLS, COLS, dim=1),
                        for_query, use_acc=side > 0, is_async=True,
                    )  # fmt: skip
                at = [batch, head, begin, half * COLS]
                # What has a factor in registers and is in flight into the next step makes ptxas wait after every product.
                for_value, for_key, for_query, part, change = warpgroup_mma_wait(
                    0, deps=(for_value, for_key, for_query, part, change)
                )
                mbarrier.arrive(empty.index(stage), count=1)
                if AHEAD:
                    if (h + 1 < group) | (j + 1 < first + count):
                        mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)
                    # After the last block its result is not used.
                    q = queries.index((i + 1) % STAGES).reshape([BM, E])
                    scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
                _add(to_query, for_query * scale, mine, at, BM, COLS)
                i += 1
        if AHEAD:
            scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(kv_empty, count=1)
        _put(for_key * scale, to_key, batch, owner, start, size, key_at, HALF, E, HEAD)
        _put(for_value, to_value, batch, owner, start, size, value_at, HALF, EV, VALUE)
    tma.store_wait(0)


@gluon.jit
def attention_hopper_grads_together(
    query, grad, key, value, numbers, to_query, to_key, to_value, key_at, value_at,
    tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A tile of BN keys and values a turn, and blocks of BM rows of all heads that share them, whose gradients it adds to.

    Lines of ``numbers`` are lse and delta of BM rows in turn; ``to_query`` adds half of the columns of a block in float32.
    """
    keys = gl.allocate_shared_memory(key.dtype, [2] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [2] + value.block_type.shape, value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad.dtype, [STAGES] + grad.block_type.shape, grad.layout)
    pairs = gl.allocate_shared_memory(numbers.dtype, [2 * STAGES] + numbers.block_type.shape, numbers.layout)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN // 2, BM], key.dtype)
    changes = gl.allocate_shared_memory(key.dtype, [4, BN // 2, BM], layout)
    sums = gl.allocate_shared_memory(to_query.dtype, [2] + to_query.block_type.shape, to_query.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    kv_full, kv_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    changed = barriers(1, 2).index(0)
    fence_async_shared()
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize([
        (_sum_all, (upper, to_query, to_key, to_value, queries, grads, keys, values, pairs, changes, sums,
                    full, empty, kv_full, kv_empty, changed, key_at, value_at,
                    tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
                    BM, BN, E, EV, HEAD, VALUE, STAGES, SIDES, BOTTOM, ORDER, AHEAD)),
        (_sum_all, (lower, to_query, to_key, to_value, queries, grads, keys, values, pairs, changes, sums,
                    full, empty, kv_full, kv_empty, changed, key_at, value_at,
                    tiles, tiles_n, planes, section, owners, group, length, size, left, right, scale, factor,
                    BM, BN, E, EV, HEAD, VALUE, STAGES, SIDES, BOTTOM, ORDER, AHEAD)),
        (_load_all, (query, grad, key, value, numbers, queries, grads, keys, values, pairs, full, empty, kv_full, kv_empty,
                     tiles, tiles_n, planes, section, owners, group, shares, length, size, left, right,
                     BM, BN, E, EV, STAGES, SIDES, BOTTOM, ORDER)),
    ], [4, 1], [240, 24])  # fmt: skip


# ---- the host's part -----------------------------------------------------------------------------------------------


def wanted(p: Any, width: int, config: Mapping[str, int], *gradients: Tensor | None) -> bool:
    """Whether one kernel is to be taken: for all gradients, where their last bits may differ from run to run."""
    repeatable = p.deterministic or torch.are_deterministic_algorithms_enabled()
    served = width <= config["together"]
    return served and not repeatable and None not in gradients


def halved(key: Descriptor) -> Descriptor:
    """Each half of the columns by itself in shared memory, so that products may take one."""
    swizzle = min(128, key.block[3])
    return replace(key, layout=gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=4))


def blocks(numbers: Tensor, sums: Tensor, parts: int) -> tuple[Descriptor, Descriptor]:
    """Lines of ``numbers``, and of ``sums`` (batch, heads, rows, columns) 64 rows and one of so many ``parts`` of the columns."""
    found = []
    part = [1, 1, ROWS.value, sums.shape[3] // parts]
    for t, block in ((numbers.view(-1, ROWS.value), [1, ROWS.value]), (sums, part)):
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
        found.append(Descriptor(t, tuple(t.shape), tuple(t.stride()), tuple(block), layout))
    return found[0], found[1]
