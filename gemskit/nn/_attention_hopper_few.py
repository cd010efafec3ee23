"""Decoding on Hopper, in Gluon: one query token, so that the work is to read keys and values. One warp lets the copy engine
load them, dense or by pages, and four multiply.

Products are turned: ``scores.T = keys @ query.T`` and ``out.T = values.T @ weights.T``. The query heads of a key head are then
the 8 or 16 columns of a tensor core's instruction, and nothing is padded to 64 rows. Programs stay and take one unit, a part of
the keys of a key head, after the other; blocks of the next one are asked for before the last ones are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemskit._gluon import as_one, barriers, block_to_shared, group_barrier
from gemskit._launch import launch
from gemskit.nn import _attention_host as host
from gemskit.nn._attention_hopper import _clear, _descriptor, served
from gemskit.nn._attention_tiles import LN2, LOG2E

#: Columns of a block in shared memory: what one line of the copy engine's widest swizzle holds.
WIDTH: gl.constexpr = gl.constexpr(64)
#: The page of a sequence that lies in one.
WHOLE = 1 << 30


@gluon.jit
def _pages(batch, table, table_at, columns, block, N: gl.constexpr, PAGE: gl.constexpr, PIECES: gl.constexpr):
    """The pages that a block of N keys fills or lies in; any behind the table's end."""
    found = ()
    if PAGE == 0:
        found = (batch,)
    else:
        for j in gl.static_range(PIECES):
            place = (block * N + j * (N // PIECES)) // PAGE
            page = gl.load(
                table + batch.to(gl.int64) * table_at[0] + place * table_at[1], mask=place < columns, other=0
            )
            found = found + (page.to(gl.int32),)
    return found


@gluon.jit
def _ask(
    matrix, tiles, full, block, stage, owner, pages,
    N: gl.constexpr, PAGE: gl.constexpr, PIECES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Have a block of N keys or values copied, each of PARTS of its columns by itself. What is behind a page's end is 0."""
    row = block * N
    if PAGE > N:
        row = row % PAGE
    elif PAGE != 0:
        row = 0
    ready = full.index(stage)
    mbarrier.expect(ready, N * PARTS * WIDTH * 2)
    for j in gl.static_range(PIECES):
        for part in gl.static_range(PARTS):
            place = tiles.index((stage * PARTS + part) * PIECES + j)
            block_to_shared(matrix, [pages[j], owner, row, part * WIDTH], ready, place)


@gluon.jit
def _unit(unit, splits, owners, used, used_at, size, N: gl.constexpr):
    """Part, batch and key head of a unit, the keys of that sequence, and the first block of N and that behind the last."""
    part, plane = unit % splits, unit // splits
    batch, owner = plane // owners, plane % owners
    count = size
    if used is not None:
        count = max(min(gl.load(used + batch.to(gl.int64) * used_at).to(gl.int32), size), 0)
    blocks = gl.cdiv(count, N)
    return part, batch, owner, count, part * blocks // splits, (part + 1) * blocks // splits


@gluon.jit
def _load(
    key, value, table, used, keys, values, k_full, v_full, empty, table_at, used_at, columns, owners, size, splits, units,
    N: gl.constexpr, PAGE: gl.constexpr, PIECES: gl.constexpr, KP: gl.constexpr, VP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads. Pages are looked up two blocks before they are asked for."""
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, batch, owner, _, first, last = _unit(unit, splits, owners, used, used_at, size, N)
        if splits == 1:
            first = 0  # so that the first pages do not wait for the number of keys
        pages = _pages(batch, table, table_at, columns, first, N, PAGE, PIECES)
        after = _pages(batch, table, table_at, columns, first + 1, N, PAGE, PIECES)
        for block in range(first, last):
            further = _pages(batch, table, table_at, columns, block + 2, N, PAGE, PIECES)
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            _ask(key, keys, k_full, block, stage, owner, pages, N, PAGE, PIECES, KP)
            _ask(value, values, v_full, block, stage, owner, pages, N, PAGE, PIECES, VP)
            pages = after
            after = further
            i += 1


@gluon.jit
def _multiply(
    query, out, lse, bounds, used, keys, values, k_full, v_full, empty, queries, weighed,
    q_at, out_at, lse_at, bounds_at, used_at, owners, group, size, splits, units, factor,
    N: gl.constexpr, G: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr, KP: gl.constexpr, VP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The four warps that multiply. ``factor`` is in base 2."""
    dtype: gl.constexpr = keys.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, WIDTH], dtype)
    turned: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, G, 16])
    across: gl.constexpr = gl.SliceLayout(0, turned)
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    k_tiles = as_one(keys, [STAGES * KP, N, WIDTH], flat)
    v_tiles = as_one(values, [STAGES * VP, N, WIDTH], flat)
    weights_of = weighed.permute((1, 0))
    r = gl.arange(0, G, gl.SliceLayout(1, lines))[:, None]
    e = gl.arange(0, WIDTH, gl.SliceLayout(0, lines))[None, :]
    none = gl.zeros([N, G], gl.float32, turned)
    local = gl.arange(0, N, gl.SliceLayout(1, turned))
    d = gl.arange(0, WIDTH, gl.SliceLayout(1, turned))[:, None]
    head = gl.arange(0, G, across)
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        part, batch, owner, count, first, last = _unit(unit, splits, owners, used, used_at, size, N)
        part, batch, owner = part.to(gl.int64), batch.to(gl.int64), owner.to(gl.int64)
        heads, row = group, owner * 0
        if bounds is not None:
            row = gl.load(bounds + batch * bounds_at).to(gl.int64)
            heads = gl.where(gl.load(bounds + (batch + 1) * bounds_at) > row, group, 0)  # a sequence may have no token
        at = query + batch * q_at[0] + row * q_at[2] + (owner * group + r) * q_at[1]
        for j in gl.static_range(KP):
            column = e + j * WIDTH
            live = (r < heads) & (column < HEAD)
            queries.index(j).store(gl.load(at + column.to(gl.int64) * q_at[3], mask=live, other=0.0))
        fence_async_shared()
        group_barrier()
        total = gl.zeros([N, G], gl.float32, turned)
        peak = gl.full([G], -float("inf"), gl.float32, across)
        acc = ()
        for _ in gl.static_range(VP):
            acc = acc + (gl.zeros([WIDTH, G], gl.float32, turned),)
        for block in range(first, last):
            stage, phase = i % STAGES, (i // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            scores = warpgroup_mma(
                k_tiles.index(KP * stage), queries.index(0).permute((1, 0)), none, use_acc=False, is_async=True
            )
            for j in gl.static_range(1, KP):
                scores = warpgroup_mma(
                    k_tiles.index(KP * stage + j), queries.index(j).permute((1, 0)), scores, is_async=True
                )
            scores = warpgroup_mma_wait(0, deps=(scores,)) * factor
            left = count - block * N
            if left < N:
                scores = gl.where((local < left)[:, None], scores, -float("inf"))
            # All warps meet in this maximum: what they multiplied before is read.
            top = gl.maximum(peak, gl.max(scores, 0))
            base = gl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN where all scores are -inf
            weights = gl.exp2(scores - base[None, :])
            shrink = gl.exp2(peak - base)[None, :]
            weights_of.store(weights.to(dtype))
            fence_async_shared()
            total = total * shrink + weights
            peak = top
            group_barrier()
            mbarrier.wait(v_full.index(stage), phase)
            if left < N:  # what is behind the last value may be NaN, and 0 x NaN is
                for j in gl.static_range(VP):
                    _clear(v_tiles.index(VP * stage + j), left, N, WIDTH)
            sums = ()
            for j in gl.static_range(VP):
                tile = v_tiles.index(VP * stage + j).permute((1, 0))
                sums = sums + (warpgroup_mma(tile, weights_of, acc[j] * shrink, is_async=True),)
            if VP == 1:
                acc = (warpgroup_mma_wait(0, deps=sums),)
            else:
                acc = warpgroup_mma_wait(0, deps=sums)
            mbarrier.arrive(empty.index(stage), count=1)
            i += 1
        sums_of = gl.sum(total, 0)
        safe = gl.where(sums_of == 0.0, 1.0, sums_of)  # without a key the result is 0
        own = (owner * group + head).to(gl.int64)
        to = out + part * out_at[4] + batch * out_at[0] + row * out_at[2] + own[None, :] * out_at[1]
        for j in gl.static_range(VP):
            column = d + j * WIDTH
            result = (acc[j] / safe[None, :]).to(out.dtype.element_ty)
            gl.store(to + column.to(gl.int64) * out_at[3], result, (head < heads)[None, :] & (column < VALUE))
        to_lse = lse + part * lse_at[3] + batch * lse_at[0] + row * lse_at[2] + own * lse_at[1]
        gl.store(to_lse, (peak + gl.log2(sums_of)) * LN2, head < heads)


@gluon.jit
def attention_hopper_few(
    query, key, value, out, lse, bounds, used, table, q_at, out_at, lse_at, bounds_at, used_at, table_at,
    columns, owners, group, size, splits, units, factor,
    N: gl.constexpr, G: gl.constexpr, HEAD: gl.constexpr, VALUE: gl.constexpr, PAGE: gl.constexpr, PIECES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """``key`` and ``value`` load blocks of (1, 1, rows, 64), of pages or batches; ``*_at`` are strides as in `attention_forward`.

    ``units`` are the key heads of all sequences times ``splits``; with ``bounds`` a sequence has one query token or none.
    """
    dtype: gl.constexpr = key.dtype
    KP: gl.constexpr = (HEAD + WIDTH - 1) // WIDTH
    VP: gl.constexpr = (VALUE + WIDTH - 1) // WIDTH
    keys = gl.allocate_shared_memory(dtype, [STAGES * KP * PIECES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES * VP * PIECES] + value.block_type.shape, value.layout)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([G, WIDTH], dtype)
    queries = gl.allocate_shared_memory(dtype, [KP, G, WIDTH], rows)
    weighed = gl.allocate_shared_memory(dtype, [G, N], gl.NVMMASharedLayout.get_default_for([G, N], dtype))
    k_full, v_full, empty = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    fence_async_shared()
    # Pages of fewer than N keys are as many addresses in registers, three times.
    REGISTERS: gl.constexpr = 96 if PIECES > 1 else 40
    gl.warp_specialize([
        (_multiply, (query, out, lse, bounds, used, keys, values, k_full, v_full, empty, queries, weighed,
                     q_at, out_at, lse_at, bounds_at, used_at, owners, group, size, splits, units, factor,
                     N, G, HEAD, VALUE, KP, VP, STAGES)),
        (_load, (key, value, table, used, keys, values, k_full, v_full, empty, table_at, used_at, columns, owners, size,
                 splits, units, N, PAGE, PIECES, KP, VP, STAGES)),
    ], [1], [REGISTERS])  # fmt: skip


# ---- the host's part -----------------------------------------------------------------------------------------------


def _page(p: Any, n: int) -> int | None:
    """The page of blocks of ``n`` keys, 0 where batches are read; None where such blocks do not fill pages or lie in them."""
    if p.table is None:
        return 0 if p.bounds_q is None else None
    page = int(p.key.shape[2])
    if p.table.shape[1] == 1:
        return WHOLE
    return page if page % n == 0 or (n % page == 0 and page >= host.FEW) else None


def run(p: Any, out: Tensor, lse: Tensor, config: Mapping[str, int], parts: int) -> bool:
    """Launch for the problem ``p``; False, with nothing launched, where it is none for this kernel.

    Where the sequences' key heads are about as many as processors, each has a program and a processor, and blocks of 128 keys;
    else there are two programs a processor with blocks of 64, so that one multiplies while the other waits. Either way 192 KiB of
    its shared memory hold blocks that are on their way or in use.
    """
    widths = served(p, out, takes=("bounds_q", "used", "table"))
    every = p.left is None and (p.right is None or p.bottom)  # the one token sees all keys
    if widths is None or max(widths) > 128 or p.length > 1 or p.group > host.FEW or not every:
        return False
    planes, processors = p.batch * p.owners, config["processors"]
    parts = parts or host.parts_of(1, p.size, planes, {"M": 1, "N": 64}, config, config["whole"])
    alone = parts == 1 and planes <= processors
    n = 128 if alone else 64
    page = _page(p, n)
    if page is None:
        return False
    pieces = max(1, n // page) if page else 1
    key, value = (_descriptor(t, n // pieces, WIDTH.value) for t in (p.key, p.value))
    if key is None or value is None:
        return False
    to, to_lse, out_at, lse_at = host.parted(p, out, lse, parts)
    units = planes * parts
    q_steps, _, used_steps, _ = p.steps
    launch(
        attention_hopper_few, (min(units, processors * (1 if alone else 2)),),
        (
            p.query, key, value, to, to_lse, p.bounds_q, p.used, p.table, p.at(p.query), out_at, lse_at, q_steps, used_steps,
            p.strides(p.table, 2), 0 if p.table is None else p.table.shape[1], p.owners, p.group, p.size, parts, units,
            (p.numbers[0] + p.numbers[1]) * LOG2E.value,
        ),
        {
            "N": n, "G": 8 if p.group <= 8 else 16, "HEAD": p.shape["HEAD"], "VALUE": p.shape["VALUE"], "PAGE": page,
            "PIECES": pieces, "STAGES": 3 * 256 // sum(widths), "num_warps": 4, **({} if alone else {"maxnreg": 128}),
        },
    )  # fmt: skip
    if parts > 1:
        host.merge(to, to_lse, out, lse)
    return True
