"""Attention on Hopper's tensor cores (``wgmma``), in Gluon: one warp loads, two groups of four warps have half of the rows each.

While a group's weights of one block of keys multiply its values, the scores of the next block become weights. With TURNS the
groups begin their products in turns, so that one's products run while the other computes weights. Programs stay and take one
tile of rows after the other. Packed sequences are one batch, of which a list says where tiles begin and which keys they see.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
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
from gemskit._dtypes import TRITON
from gemskit._gluon import barriers, block_to_shared, group_barrier
from gemskit._launch import launch
from gemskit._tensor_map import Descriptor, loadable
from gemskit.blas._hopper import lines_of
from gemskit.nn._attention_packed import ENTRY, packed_tiles
from gemskit.nn._attention_tiles import LN2, LOG2E, window
from gemskit.nn._hopper_order import LISTED, number_of_tiles, order, sections, tile_of


@gluon.jit
def _blocks(start, size, low, high, BM: gl.constexpr, BN: gl.constexpr, SIDES: gl.constexpr):
    """The first block of keys that rows from ``start`` see, and how many; one at least, of which they may see nothing."""
    first, last = 0, size
    if SIDES % 2 == 1:
        last = max(min(size, start + BM + high), 0)
    if SIDES >= 2:
        first = max(start + low, 0) // BN
    return first, max(gl.cdiv(last, BN) - first, 1)


@gluon.jit
def _place(
    turn, tiles, tiles_m, planes, section, heads, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Batch, head and rows of the tile of this ``turn``, and its blocks of keys."""
    _, low, high = window(size, length, left, right, SIDES, BOTTOM)
    plane, m = tile_of(turn, tiles, tiles_m, planes, section, SIDES == 1, ORDER)
    first, count = _blocks(m * BM, size, low, high, BM, BN, SIDES)
    return plane // heads, plane % heads, m, first, count


@gluon.jit
def _tile(
    turn, listed, tiles, tiles_m, planes, section, heads, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """`_place`; then first row, number of rows, first key and number of keys of the sequence that the tile is of."""
    if listed is None:
        batch, head, m, first, count = _place(
            turn, tiles, tiles_m, planes, section, heads, length, size, left, right, BM, BN, SIDES, BOTTOM, ORDER
        )
        return batch, head, m, first, count, 0, length, 0, size
    else:
        head, entry = tile_of(turn, tiles, tiles_m, planes, section, SIDES == 1, ORDER)
        at = listed + (1 + entry) * ENTRY
        top, m, rows, begin, amount = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)
        _, low, high = window(amount, rows, left, right, SIDES, BOTTOM)
        first, count = _blocks(m * BM, amount, low, high, BM, BN, SIDES)
        return head * 0, head, m, first, count, top, rows, begin, amount


@gluon.jit
def _turns(listed, tiles, heads, ORDER: gl.constexpr):
    """How many tiles this program takes."""
    if listed is not None:
        tiles = gl.load(listed) * heads
    return number_of_tiles(tiles, ORDER)


@gluon.jit
def _load(
    query, key, value, listed, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles, tiles_m, planes, section, heads, group, length, size, left, right,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    SIDES: gl.constexpr, BOTTOM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """The warp that loads: blocks of keys from the last to the first, which is never masked by a causal rule."""
    HALF: gl.constexpr = BM // 2
    i = 0
    for turn in range(_turns(listed, tiles, heads, ORDER)):
        batch, head, m, first, count, top, _, begin, _ = _tile(
            turn, listed, tiles, tiles_m, planes, section, heads, length, size, left, right,
            BM, BN, SIDES, BOTTOM, ORDER,
        )  # fmt: skip
        owner = head // group
        held = turn % TILES
        ready = q_full.index(held)
        mbarrier.wait(q_empty.index(held), ((turn // TILES) & 1) ^ 1)
        mbarrier.expect(ready, BM * E * 2)
        for half in gl.static_range(2):
            block_to_shared(query, [batch, head, top + m * BM + half * HALF, 0], ready, queries.index(2 * held + half))
        for j in range(count):
            stage = i % STAGES
            phase = ((i // STAGES) & 1) ^ 1
            row = begin + (first + count - 1 - j) * BN
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BN * E * 2)
            block_to_shared(key, [batch, owner, row, 0], k_full.index(stage), keys.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BN * EV * 2)
            block_to_shared(value, [batch, owner, row, 0], v_full.index(stage), values.index(stage))
            i += 1


@gluon.jit
def _seen(scores, row, col, begin, start, size, low, high, HALF: gl.constexpr, BN: gl.constexpr, SIDES: gl.constexpr):
    """Scores, -inf where the keys from ``begin`` on are not seen by the rows from ``start`` on."""
    edge = begin + BN > size
    if SIDES % 2 == 1:
        edge = edge | (begin + BN - 1 > start + high)
    if SIDES >= 2:
        edge = edge | (begin < start + HALF - 1 + low)
    if edge:
        place = (begin + col)[None, :]
        seen = place < size
        if SIDES % 2 == 1:
            seen = seen & (place <= row[:, None] + high)
        if SIDES >= 2:
            seen = seen & (place >= row[:, None] + low)
        scores = gl.where(seen, scores, -float("inf"))
    return scores


@gluon.jit
def _clear(values, count, BN: gl.constexpr, EV: gl.constexpr):
    """Zero all values but the first ``count``: what the next sequence has there may be NaN, and 0 x NaN is.

    Both groups do, so that none waits for the other: whatever one finds, it writes what the other does.
    """
    PART: gl.constexpr = 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // EV, EV // 8], [4, 1], [1, 0])
    for start in gl.static_range(0, BN, PART):
        if start + PART > count:
            part = values.slice(start, PART)
            line = start + gl.arange(0, PART, gl.SliceLayout(1, layout))
            part.store(gl.where((line < count)[:, None], part.load(layout), gl.zeros([PART, EV], values.dtype, layout)))
    fence_async_shared()
    group_barrier()


@gluon.jit
def _begin(turns, half: gl.constexpr, turn, TURNS: gl.constexpr):
    """Wait until it is this group's turn to issue products."""
    if TURNS:
        mbarrier.wait(turns.index(half), (turn & 1) ^ (1 if half == 0 else 0))


@gluon.jit
def _pass_on(turns, half: gl.constexpr, TURNS: gl.constexpr):
    if TURNS:
        mbarrier.arrive(turns.index(1 - half), count=1)


@gluon.jit
def _multiply(
    half: gl.constexpr, out, lse, listed, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    out_at, lse_at, tiles, tiles_m, planes, section, heads, length, size, left, right, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, TURNS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps with one ``half`` of the rows of every tile. ``factor`` is positive, in base 2."""
    HALF: gl.constexpr = BM // 2
    over: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, EV, 16])
    left_hand: gl.constexpr = gl.DotOperandLayout(0, wide, k_width=2)
    lines: gl.constexpr = lines_of(HALF, EV)
    dtype: gl.constexpr = keys.dtype
    col = gl.arange(0, BN, gl.SliceLayout(0, over))
    i = 0
    count_of_turns = 0
    for turn in range(_turns(listed, tiles, heads, ORDER)):
        batch, head, m, first, count, top, rows, _, amount = _tile(
            turn, listed, tiles, tiles_m, planes, section, heads, length, size, left, right,
            BM, BN, SIDES, BOTTOM, ORDER,
        )  # fmt: skip
        _, low, high = window(amount, rows, left, right, SIDES, BOTTOM)
        start = m * BM + half * HALF
        row = start + gl.arange(0, HALF, gl.SliceLayout(1, over))
        held = turn % TILES
        mbarrier.wait(q_full.index(held), (turn // TILES) & 1)
        mine = queries.index(2 * held + half).reshape([HALF, E])
        acc = gl.zeros([HALF, EV], gl.float32, wide)
        none = gl.zeros([HALF, BN], gl.float32, over)
        stage = i % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        _begin(turns, half, count_of_turns, TURNS)
        scores = warpgroup_mma(
            mine, keys.index(stage).reshape([BN, E]).permute((1, 0)), none, use_acc=False, is_async=True
        )
        _pass_on(turns, half, TURNS)
        count_of_turns += 1
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _seen(scores, row, col, (first + count - 1) * BN, start, amount, low, high, HALF, BN, SIDES)
        if listed is not None:
            if (first + count) * BN > amount:
                mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
                _clear(values.index(stage).reshape([BN, EV]), amount - (first + count - 1) * BN, BN, EV)
        peak = gl.max(scores, 1) * factor
        base = gl.where(peak == -float("inf"), 0.0, peak)  # -inf - -inf would be NaN in a row that sees no key so far
        weights = gl.exp2(scores * factor - base[:, None])
        total = gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(dtype), left_hand)
        for j in range(1, count):
            before = stage
            phase = (i // STAGES) & 1
            i += 1
            stage = i % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            _begin(turns, half, count_of_turns, TURNS)
            scores = warpgroup_mma(
                mine, keys.index(stage).reshape([BN, E]).permute((1, 0)), none, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(before), phase)
            acc = warpgroup_mma(weights, values.index(before).reshape([BN, EV]), acc, is_async=True)
            _pass_on(turns, half, TURNS)
            count_of_turns += 1
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            scores = _seen(scores, row, col, (first + count - 1 - j) * BN, start, amount, low, high, HALF, BN, SIDES)
            higher = gl.maximum(peak, gl.max(scores, 1) * factor)
            base = gl.where(higher == -float("inf"), 0.0, higher)
            shrink = gl.exp2(peak - base)
            following = gl.exp2(scores * factor - base[:, None])
            total = total * shrink + gl.sum(following, 1)
            peak = higher
            acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, wide))[:, None]
            weights = gl.convert_layout(following.to(dtype), left_hand)
        mbarrier.arrive(q_empty.index(held), count=1)
        mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
        acc = warpgroup_mma(weights, values.index(stage).reshape([BN, EV]), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(stage), count=1)
        i += 1
        batch, head = batch.to(gl.int64), head.to(gl.int64)
        to = lse + batch * lse_at[0] + head * lse_at[1]
        gl.store(to + (top + row) * lse_at[2], (peak + gl.log2(total)) * LN2, row < rows)
        safe = gl.where(total == 0.0, 1.0, total)  # a row that sees no key is 0
        acc = acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, wide))[:, None]
        result = gl.convert_layout(acc.to(out.dtype.element_ty), lines)
        r = start + gl.arange(0, HALF, gl.SliceLayout(1, lines))
        d = gl.arange(0, EV, gl.SliceLayout(0, lines))
        at = (top + r).to(gl.int64)[:, None] * out_at[2] + d[None, :] * out_at[3]
        gl.store(out + batch * out_at[0] + head * out_at[1] + at, result, (r < rows)[:, None] & (d < VALUE)[None, :])


@gluon.jit
def attention_hopper(
    query, key, value, out, lse, listed, out_at, lse_at,
    tiles, tiles_m, planes, section, heads, group, length, size, left, right, factor,
    BM: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, EV: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, SIDES: gl.constexpr, BOTTOM: gl.constexpr, TURNS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """``query``, ``key`` and ``value`` load blocks of (1, 1, rows, columns); ``out_at`` and ``lse_at`` are strides.

    With ``listed``, see `packed_tiles`, sequences are packed, and ``tiles``, ``length`` and ``size`` are not read.
    """
    queries = gl.allocate_shared_memory(query.dtype, [2 * TILES] + query.block_type.shape, query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    q_full, q_empty = barriers(TILES, 1), barriers(TILES, 2)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    turns = barriers(2, 1)
    fence_async_shared()
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize([
        (_multiply, (upper, out, lse, listed, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                     out_at, lse_at, tiles, tiles_m, planes, section, heads, length, size, left, right, factor,
                     BM, BN, E, EV, VALUE, STAGES, TILES, SIDES, BOTTOM, TURNS, ORDER)),
        (_multiply, (lower, out, lse, listed, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                     out_at, lse_at, tiles, tiles_m, planes, section, heads, length, size, left, right, factor,
                     BM, BN, E, EV, VALUE, STAGES, TILES, SIDES, BOTTOM, TURNS, ORDER)),
        (_load, (query, key, value, listed, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                 tiles, tiles_m, planes, section, heads, group, length, size, left, right,
                 BM, BN, E, EV, STAGES, TILES, SIDES, BOTTOM, ORDER)),
    ], [4, 1], [232, 32])  # fmt: skip


# ---- the host's part -----------------------------------------------------------------------------------------------


def _descriptor(t: Tensor, rows: int, width: int) -> Descriptor | None:
    """Blocks of ``rows`` by ``width`` of each (batch, head); None where the copy engine cannot load them."""
    # A dimension of one element has any stride: that of all after it keeps the rule.
    strides, after = [1], 8 * _layout.cdiv(t.shape[3], 8)
    for n, s in zip(reversed(t.shape[:3]), reversed(t.stride()[:3])):
        strides.insert(0, s if n > 1 else after)
        after = max(after, strides[0] * n)
    if (t.shape[3] > 1 and t.stride(3) != 1) or t.data_ptr() % 16 or not loadable(t.shape, strides, t.element_size()):
        return None
    block = (1, 1, rows, width)
    layout = gl.NVMMASharedLayout.get_default_for(list(block), TRITON[t.dtype])
    return Descriptor(t, tuple(t.shape), tuple(strides), block, layout)


#: What describes the sequences of a problem where it is not None, and what modifies its scores.
_EXTRAS = ("bounds_q", "bounds_k", "used", "table", "mask", "slopes", "sinks")


def served(p: Any, *others: Tensor, takes: Collection[str] = ()) -> tuple[int, int] | None:
    """The widths of blocks of keys and values; None where the problem, with ``others`` to read and write, is none for Hopper.

    Of what only some calls have, the caller ``takes`` these.
    """
    extras = (*(getattr(p, n) for n in _EXTRAS if n not in takes), p.mods.score, p.mods.visible, *p.descale)
    halves = {p.query.dtype, p.key.dtype, p.value.dtype} in ({torch.bfloat16}, {torch.float16})
    short, rest, dropout, _ = p.numbers
    plain = any(e is not None for e in extras) or p.split[0] or p.cap or dropout or p.empty
    # The largest score becomes the largest exponent only by a positive factor.
    if plain or not halves or p.wide(*others) or not short + rest > 0:
        return None
    e, ev = (max(64, n) for n in (p.shape["E"], p.shape["EV"]))
    return (e, ev) if max(e, ev) <= 256 else None


def run(p: Any, out: Tensor, lse: Tensor, config: Mapping[str, int]) -> bool:
    """Launch for the problem ``p``; False, with nothing launched, where it is none for this kernel."""
    packed = p.bounds_q is not None and p.bounds_k is not None
    widths = served(p, out, takes=("bounds_q", "bounds_k", "used") if packed else ())
    if widths is None:
        return False
    e, ev = widths
    small = max(e, ev) <= 128
    bm, bn = 128, 128 if small else 64
    described = [
        _descriptor(t, rows, width) for t, rows, width in ((p.query, bm // 2, e), (p.key, bn, e), (p.value, bn, ev))
    ]
    if None in described:
        return False
    listed = None
    if p.bounds_q is not None:
        listed, room = packed_tiles(p, bm)
        programs, how = min(config["processors"], room * p.heads), LISTED.value
        # What is not read is 0: it would be one more kernel to compile where it is a multiple of 16 for the first time.
        numbers = (0, 0, p.heads, 0, p.heads, p.group, 0, 0)
    else:
        planes, tiles_m = p.batch * p.heads, _layout.cdiv(p.length, bm)
        section = sections(planes, p.size, e + ev, p.group)
        programs, how = order(planes, tiles_m, section, config["processors"], p.shape["SIDES"] == 1)
        numbers = (planes * tiles_m, tiles_m, planes, section, p.heads, p.group, p.length, p.size)
    factor = (p.numbers[0] + p.numbers[1]) * LOG2E.value
    launch(
        attention_hopper, (programs,),
        (*described, out, lse, listed, p.at(out), p.at(lse), *numbers, *p.sides, factor),
        dict(BM=bm, BN=bn, E=e, EV=ev, VALUE=p.shape["VALUE"], STAGES=2, TILES=2 if small else 1,
             SIDES=p.shape["SIDES"], BOTTOM=p.bottom, TURNS=max(e, ev) <= config["turns"], ORDER=how, num_warps=4),
    )  # fmt: skip
    return True
