"""Products on Hopper's tensor cores (``wgmma``), in Gluon: one warp loads, one to three groups of four warps multiply.

Plain Triton lets the warps that multiply load as well and wait for each other: 5 to 12 % slower on an H200, and with an
epilogue that nothing overlaps. Programs stay and take one tile after the other. The tiles of the last, partly filled round
are split along K, so that all programs work until the end; what the parts found is added up by a second, small kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

from gemskit import _layout, language
from gemskit._bind import fill
from gemskit._dtypes import FLOAT8, TRITON
from gemskit._following import launch_next, previous
from gemskit._gluon import as_one, barriers, block_to_shared
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._tensor_map import ALIGNMENT, Descriptor, loadable
from gemskit.blas._rule import Choice
from gemskit.blas._space import Space, read

#: Parts that are loaded together, and elements of a tile that a program adds up: 64x1024x4096 13.9 us, one by one 15.
UNROLL, PART = tl.constexpr(4), 512

#: Filled in per operator.
EPILOGUE: Any = None
FINISH: Any = None
MULTIPLY: Any = None


@gluon.jit
def _turns(units, ONE: gl.constexpr):
    """How many units of the work a program takes."""
    turns = 1
    if not ONE:
        turns = gl.cdiv(units - gl.program_id(0), gl.num_programs(0))
    return turns


@gluon.jit
def _work(turn, whole, split, part_steps, steps, ONE: gl.constexpr):
    """The unit of a turn: its tile, its first and last step along K, and which part of the tile it is (-1: all)."""
    tile, first, last, part = gl.program_id(0), 0, steps, -1
    if not ONE:
        tile += turn * gl.num_programs(0)
        if tile >= whole:
            part = (tile - whole) // split
            tile = whole + (tile - whole) % split
            first = part * part_steps
            last = min(first + part_steps, steps)
    return tile, first, last, part


@gluon.jit
def _where(tile, tiles_m, tiles_n, GROUP: gl.constexpr, ONE: gl.constexpr):
    """Batch, row and column of a tile."""
    if ONE:
        # All tiles are under way at once. What comes before the first load is some of the time of a small product.
        batch, m, n = 0, tile % tiles_m, tile // tiles_m
    else:
        per_batch = tiles_m * tiles_n
        batch = tile // per_batch
        m, n = language.swizzle(tile % per_batch, tiles_m, tiles_n, GROUP)
    return batch, m, n


@jit
def _begin(tile, size, SIDE: tl.constexpr, OVER: tl.constexpr):
    """Where a tile of SIDE rows or columns begins: if OVER, the last one of ``size`` ends there, and begins in the one before.

    The copy engine takes longer to write zeros for rows beyond the end than to load rows. Along lines of memory it begins at
    multiples of 16 bytes, or the instruction is an illegal one, so up to seven are still beyond the end.
    """
    if OVER:
        at = tl.minimum(tile * SIDE, tl.maximum(size - SIDE + 7, 0)) // 8 * 8
    else:
        at = tile * SIDE
    return at


@gluon.jit
def _group_of(tile, group, before, first, end, offs, groups, M, tiles_n, BM: gl.constexpr):
    """The group of rows that has a tile, from that of an earlier one on, whose rows begin at ``first`` and stop at ``end``.

    ``before`` tiles are of other groups. Rows behind the last group are one more, whose product has no steps.
    """
    while (group < groups) & (tile >= before + gl.cdiv(end - first, BM) * tiles_n):
        before += gl.cdiv(end - first, BM) * tiles_n
        group += 1
        first = end
        end = gl.load(offs + group, mask=group < groups, other=M).to(gl.int32)
        end = gl.minimum(gl.maximum(end, first), M)
    return group, before, first, end


@gluon.jit
def _in_group(tile, before, first, end, tiles_n, BM: gl.constexpr, GROUP: gl.constexpr):
    """The first row of a tile of this group, and its column. A tile behind the last one of all begins where rows end."""
    tiles_m = gl.maximum(gl.cdiv(end - first, BM), 1)
    # Columns of at least GROUP: of nine tiles one in a second column would read all of the second factor for itself.
    height = gl.cdiv(tiles_m, gl.maximum(tiles_m // GROUP, 1))
    m, n = language.swizzle(gl.minimum(tile - before, tiles_m * tiles_n - 1), tiles_m, tiles_n, height)
    return gl.where(tile - before < tiles_m * tiles_n, first + m * BM, end), n


@gluon.jit
def _load(
    a, b, up, a_tiles, b_tiles, ready, empty, full, batch_sizes, a_batch, b_batch, tiles_m, tiles_n, steps, units, whole,
    split, part_steps, offs, groups, M, N, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr, GROUP: gl.constexpr, ONE: gl.constexpr, OVER: gl.constexpr,
):  # fmt: skip
    """The warp that loads: waits until a stage is empty, fills it with a tile of ``a`` for each worker and one of ``b``.

    Of a gated product that one is half ``b``, half ``up``, so that one instruction multiplies by both.
    """
    ROWS: gl.constexpr = BM // WORKERS
    BYTES: gl.constexpr = a.dtype.primitive_bitwidth // 8
    # Here, as four warps would wait for each other after each.
    for j in gl.static_range(STAGES):
        mbarrier.init(empty.index(j), count=WORKERS)
        mbarrier.init(full.index(j), count=1)
    fence_async_shared()
    mbarrier.arrive(ready.index(0), count=1)
    i = 0
    group, before, top, end = -1, 0, 0, 0
    for turn in range(_turns(units, ONE)):
        tile, first, last, _ = _work(turn, whole, split, part_steps, steps, ONE)
        if offs is not None:
            group, before, top, end = _group_of(tile, group, before, top, end, offs, groups, M, tiles_n, BM)
            row, n = _in_group(tile, before, top, end, tiles_n, BM, GROUP)
            batch, last = group, steps * (group < groups)
            working = gl.minimum(gl.cdiv(end - row, ROWS), WORKERS)
        else:
            batch, m, n = _where(tile, tiles_m, tiles_n, GROUP, ONE)
            row = _begin(m, M, BM, OVER)
            working: gl.constexpr = WORKERS
        col = _begin(n, N, BN if up is None else BN // 2, OVER)
        a_row, b_row = offset(batch, batch_sizes, a_batch), offset(batch, batch_sizes, b_batch)
        for k in range(first, last):
            stage = i % STAGES
            filled = full.index(stage)
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            # How much is expected has to be a constant.
            for n_working in gl.static_range(1 if offs is not None else WORKERS, WORKERS + 1):
                mbarrier.expect(filled, (n_working * ROWS + BN) * BK * BYTES, pred=working == n_working)
            for worker in gl.static_range(WORKERS):
                if A_ROWS:
                    at = [a_row + row + worker * ROWS, k * BK]
                else:
                    at = [a_row + k * BK, row + worker * ROWS]
                block_to_shared(a, at, filled, a_tiles.index(WORKERS * stage + worker), pred=worker < working)
            if up is not None:
                at = [b_row + col, k * BK]
                block_to_shared(b, at, filled, b_tiles.index(2 * stage))
                block_to_shared(up, at, filled, b_tiles.index(2 * stage + 1))
            else:
                if B_ROWS:
                    at = [b_row + k * BK, col]
                else:
                    at = [b_row + col, k * BK]
                block_to_shared(b, at, filled, b_tiles.index(stage))
            i += 1


@gluon.jit
def _multiply(
    worker: gl.constexpr, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
    out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split, part_steps, offs,
    groups, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WORKERS: gl.constexpr, GROUP: gl.constexpr, ONE: gl.constexpr, WIDE: gl.constexpr, ALONG: gl.constexpr,
    ALIGN: gl.constexpr, TURNED: gl.constexpr, GATED: gl.constexpr, PROMOTED: gl.constexpr, OVER: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply: a ``worker``, who has some rows of every tile.

    Tensor cores keep 14 bits of sums of float8: where PROMOTED, each step begins at zero and is added to a sum of float32.
    """
    ROWS: gl.constexpr = BM // WORKERS
    COLS: gl.constexpr = BN // 2 if GATED else BN
    # An instruction multiplies 32 bytes of K.
    DEEP: gl.constexpr = 256 // a_tiles.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, DEEP])
    final: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, DEEP])
    MOVED: gl.constexpr = TURNED or COLS >= 32
    lines: gl.constexpr = lines_of(ROWS, COLS, ALIGN == 8, TURNED) if MOVED else final
    mbarrier.wait(ready.index(0), 0)
    i = 0
    group, before, top, end = -1, 0, 0, 0
    for turn in range(_turns(units, ONE)):
        tile, start, last, part = _work(turn, whole, split, part_steps, steps, ONE)
        if offs is not None:
            group, before, top, end = _group_of(tile, group, before, top, end, offs, groups, M, tiles_n, BM)
            row, n = _in_group(tile, before, top, end, tiles_n, BM, GROUP)
            last = steps * (group < groups)
            live = row + worker * ROWS < end
            if not live:
                # The group ends within the rows of others: tensor cores are theirs alone, and steps half as long.
                for _ in range(start, last):
                    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
                    mbarrier.arrive(empty.index(i % STAGES), count=1)
                    i += 1
        else:
            live: gl.constexpr = True
        if live:
            acc = gl.zeros([ROWS, BN], gl.float32, layout)
            for k in range(start, last):
                stage = i % STAGES
                mbarrier.wait(full.index(stage), (i // STAGES) & 1)
                x, y = a_tiles.index(WORKERS * stage + worker), b_tiles.index(stage)
                if not A_ROWS:
                    x = x.permute((1, 0))
                if not B_ROWS:
                    y = y.permute((1, 0))
                if PROMOTED:
                    step = warpgroup_mma(x, y, gl.zeros([ROWS, BN], gl.float32, layout), use_acc=False, is_async=True)
                    # Tensor cores are the other half's while this one waits and adds.
                    step = warpgroup_mma_wait(0, deps=(step,))
                    mbarrier.arrive(empty.index(stage), count=1)
                    acc += step
                else:
                    acc = warpgroup_mma(x, y, acc, is_async=True)
                    # The product of the step before is done: its stage may be filled again.
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > start)
                i += 1
            if not PROMOTED:
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=last > start)
            if parts is not None:
                if part >= 0:
                    own = worker * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                    col = gl.arange(0, BN, gl.SliceLayout(0, layout))
                    at = (part * split + tile - whole).to(gl.int64) * (BM * BN) + own[:, None] * BN + col[None, :]
                    gl.store(parts + at, acc)
            if part < 0:
                if offs is not None:
                    batch, own_m, m = group, row, row
                else:
                    batch, m, n = _where(tile, tiles_m, tiles_n, GROUP, ONE)
                    own_m, m, end = m * BM, _begin(m, M, BM, OVER), M
                own_n, n = n * COLS, _begin(n, N, COLS, OVER)
                if WIDE:
                    batch, m, n = batch.to(gl.int64), m.to(gl.int64), n.to(gl.int64)  # type: ignore[attr-defined]
                m += worker * ROWS
                first, other = acc, None
                if GATED:
                    # The two halves of the columns lie in different registers of the same threads.
                    gate, up = acc.reshape([ROWS, 2, COLS]).permute(0, 2, 1).split()
                    first, other = gl.convert_layout(gate, final), gl.convert_layout(up, final)
                value = FINISH(
                    first,
                    other,
                    m + gl.arange(0, ROWS, gl.SliceLayout(1, final)),
                    n + gl.arange(0, COLS, gl.SliceLayout(0, final)),
                    batch,
                    extras,
                    batch_sizes,
                    extra_batch,
                    extra_m,
                    extra_n,
                    s0,
                    s1,
                    s2,
                    s3,
                    end,
                    N,
                    ALONG,
                ).to(out.dtype.element_ty)
                if MOVED:
                    value = gl.convert_layout(value, lines)
                r = m + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
                c = n + gl.arange(0, COLS, gl.SliceLayout(0, lines))
                _store(
                    value, r, c, own_m, own_n, batch, out, batch_sizes, out_batch, out_m, out_n, end, N, ALIGN, TURNED, OVER
                )  # fmt: skip


@gluon.constexpr_function
def lines_of(rows, cols, aligned=True, turned=False):
    """The accumulator in lines of memory of 64 bytes, of 32 where its columns are the lines; moves within warps only.

    8 neighbours a thread, or 32 (16) a warp where lines begin anywhere, so that a store takes 2 bytes.
    """
    if turned and not aligned:
        own = [[0, c] for c in (2, 4, 8, 16, 32, 64, 128) if c < cols]
        lanes = [[1, 0], [2, 0], [4, 0], [8, 0], [0, 1]]
    elif turned:
        own = [[1, 0], [2, 0], [4, 0], *([0, c] for c in (16, 32, 64, 128) if c < cols)]
        lanes = [[8, 0], [0, 1], [0, 2], [0, 4], [0, 8]]
    else:
        fine, coarse = [[0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0], [4, 0]]
        rest = [*([0, c] for c in (32, 64, 128) if c < cols), [8, 0]]
        own, lanes = ([*fine, *rest], [[0, 8], [0, 16], *coarse])
        if not aligned:
            own, lanes = [*coarse, *rest], [*fine, [0, 8], [0, 16]]
    own = [*own, *([r, 0] for r in (64,) if r < rows)]
    return gl.DistributedLinearLayout(own, lanes, [[16, 0], [32, 0]], [], [rows, cols])


@jit
def _finish(
    acc, other, m, n, batch, extras, batch_sizes, extra_batch, extra_m, extra_n, s0, s1, s2, s3, M, N,
    ALONG: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of rows ``m`` and columns ``n``; ``other`` is the second product of a gated one."""
    m, n = m[:, None], n[None, :]
    values = read(extras, m, n, M, N, batch, batch_sizes, extra_batch, extra_m, extra_n, tl.float32, ALONG)
    if other is not None:
        values = (other,) + values
    return EPILOGUE(acc, values, s0, s1, s2, s3)


@jit
def _store(
    value, m, n, own_m, own_n, batch, out, batch_sizes, out_batch, out_m, out_n, M, N, ALIGN: tl.constexpr,
    TURNED: tl.constexpr, OVER: tl.constexpr,
):  # fmt: skip
    """Store what of a tile is inside, and no other tile's. Lines (columns if TURNED) begin and end at multiples of ALIGN.

    Of a number the compiler knows only whether it is a multiple of 16: lines of 4104 would be stored one by one.
    """
    m, n = m[:, None], n[None, :]
    if TURNED:
        out_n, M = out_n // ALIGN * ALIGN, M // ALIGN * ALIGN
    else:
        out_m, N = out_m // ALIGN * ALIGN, N // ALIGN * ALIGN
    at = offset(batch, batch_sizes, out_batch) // ALIGN * ALIGN + m * out_m + n * out_n
    live = (m < M) & (n < N)
    # Only there, as it costs registers: 76 bytes of a thread spilled, of an epilogue in tiles of 128 x 256 (Triton 3.6).
    if OVER:
        live &= (m >= own_m) & (n >= own_n)
    tl.store(out + at, value, live)


@gluon.jit
def product(
    out, a, b, up, parts, extras, batch_sizes, out_batch, a_batch, b_batch, extra_batch, out_m, out_n, extra_m, extra_n,
    s0, s1, s2, s3, M, N, K, whole, split, pieces, part_steps, offs, groups,
    A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, WORKERS: gl.constexpr, GROUP: gl.constexpr, ONE: gl.constexpr, WIDE: gl.constexpr,
    ALONG: gl.constexpr, ALIGN: gl.constexpr, TURNED: gl.constexpr, PROMOTED: gl.constexpr, OVER: gl.constexpr,
):  # fmt: skip
    """``a`` is [M, K] (A_ROWS) or [K, M], ``b`` [K, N] (B_ROWS) or [N, K], batches one below the other; float8 along K.

    Of a gated product ``b`` and ``up`` are [N, K], and a tile has BN / 2 columns. ONE: every program has one tile, of one batch.
    With ``offs``, where they end, the batches of ``b`` are for groups of rows; ``whole`` is the most tiles that these can have.
    """
    GATED: gl.constexpr = up is not None
    a_tiles = gl.allocate_shared_memory(a.dtype, [WORKERS * STAGES] + a.block_type.shape, a.layout)
    LOADS: gl.constexpr = 2 * STAGES if GATED else STAGES
    b_loads = gl.allocate_shared_memory(b.dtype, [LOADS] + b.block_type.shape, b.layout)
    b_tiles = b_loads
    if GATED:
        # A constant of its own: until Triton 3.7 an attribute is none where it is given to a function.
        tiled: gl.constexpr = b_loads.layout
        b_tiles = as_one(b_loads, [STAGES, BN, BK], tiled)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = barriers(1, 1)
    fence_async_shared()
    tiles_m, tiles_n, steps = gl.cdiv(M, BM), gl.cdiv(N, BN // 2 if GATED else BN), gl.cdiv(K, BK)
    units = whole + split * pieces
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    # Constants in a list that is put together would not stay constants.
    if WORKERS == 1:
        gl.warp_specialize([
            (MULTIPLY, (first, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (_load, (a, b, up, a_tiles, b_loads, ready, empty, full, batch_sizes, a_batch, b_batch, tiles_m, tiles_n, steps,
                     units, whole, split, part_steps, offs, groups, M, N, A_ROWS, B_ROWS, BM, BN, BK, STAGES, WORKERS, GROUP,
                     ONE, OVER)),
        ], [1], [32])  # fmt: skip
    elif WORKERS == 2:
        gl.warp_specialize([
            (MULTIPLY, (first, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (MULTIPLY, (second, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (_load, (a, b, up, a_tiles, b_loads, ready, empty, full, batch_sizes, a_batch, b_batch, tiles_m, tiles_n, steps,
                     units, whole, split, part_steps, offs, groups, M, N, A_ROWS, B_ROWS, BM, BN, BK, STAGES, WORKERS, GROUP,
                     ONE, OVER)),
        ], [4, 1], [232, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (MULTIPLY, (second, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (MULTIPLY, (first, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (MULTIPLY, (third, out, parts, extras, a_tiles, b_tiles, ready, empty, full, batch_sizes, out_batch, extra_batch,
                        out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N, tiles_m, tiles_n, steps, units, whole, split,
                        part_steps, offs, groups, A_ROWS, B_ROWS, BM, BN, STAGES, WORKERS, GROUP, ONE, WIDE, ALONG, ALIGN,
                        TURNED, GATED, PROMOTED, OVER)),
            (_load, (a, b, up, a_tiles, b_loads, ready, empty, full, batch_sizes, a_batch, b_batch, tiles_m, tiles_n, steps,
                     units, whole, split, part_steps, offs, groups, M, N, A_ROWS, B_ROWS, BM, BN, BK, STAGES, WORKERS, GROUP,
                     ONE, OVER)),
        ], [4, 4, 1], [152, 152, 32])  # fmt: skip


@jit
def join(
    out, parts, extras, batch_sizes, out_batch, extra_batch, out_m, out_n, extra_m, extra_n, s0, s1, s2, s3, M, N,
    whole, split, pieces,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    ALONG: tl.constexpr, ALIGN: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, OVER: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of the tiles that were split, in their order, and store them: ROWS rows of a tile a program."""
    previous(FOLLOWS)
    i = tl.program_id(0)
    tile, row = i // (BM // ROWS), i % (BM // ROWS) * ROWS + tl.arange(0, ROWS)
    COLS: tl.constexpr = BN // 2 if GATED else BN
    col = tl.arange(0, COLS)
    at = parts + tile.to(tl.int64) * (BM * BN) + row[:, None] * BN + col[None, :]
    acc = tl.load(at)
    other = None
    if GATED:
        other = tl.load(at + COLS)
    for _ in tl.range(1, pieces, loop_unroll_factor=UNROLL):
        at += split * (BM * BN)
        acc += tl.load(at)
        if GATED:
            other += tl.load(at + COLS)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, COLS)
    batch = (whole + tile) // (tiles_m * tiles_n)
    m, n = language.swizzle((whole + tile) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    if WIDE:
        batch, m, n = batch.to(tl.int64), m.to(tl.int64), n.to(tl.int64)
    own_m, own_n = m * BM, n * COLS
    m, n = _begin(m, M, BM, OVER) + row, _begin(n, N, COLS, OVER) + col
    value = FINISH(
        acc, other, m, n, batch, extras, batch_sizes, extra_batch, extra_m, extra_n, s0, s1, s2, s3, M, N, ALONG
    )
    value = value.to(out.dtype.element_ty)
    _store(value, m, n, own_m, own_n, batch, out, batch_sizes, out_batch, out_m, out_n, M, N, ALIGN, TURNED, OVER)


# ---- the host's part -----------------------------------------------------------------------------------------------


class Matrix:
    """A factor as a matrix of which blocks are loaded, its batches one below the other."""

    def __init__(self, space: Space, which: int, itemsize: int) -> None:
        """The first (1) or second (2) factor of ``space``."""
        least = ALIGNMENT // itemsize
        outer, by_outer, by_k = (
            (space.M, space.rows[1], space.a_k) if which == 1 else (space.N, space.cols[1], space.b_k)
        )
        k, batch = space.K, space.batch[which]
        #: Whether K runs along the lines of memory; None: no blocks of this matrix can be loaded.
        self.k_last: bool | None = None
        for k_last, lines, cols, line, col in ((True, outer, k, by_outer, by_k), (False, k, outer, by_k, by_outer)):
            # A dimension of one element has any stride.
            line = line if lines > 1 else least * _layout.cdiv(cols, least)
            used = [(n, s) for n, s in zip(space.sizes, batch) if n > 1]
            if (col == 1 or cols == 1) and line and all(s % line == 0 for _, s in used):
                lines += sum((n - 1) * s // line for n, s in used)
                if loadable((lines, cols), (line, 1), itemsize):
                    self.k_last, self.shape, self.strides = k_last, (lines, cols), (line, 1)
                    self.batch = tuple(s // line if n > 1 else 0 for n, s in zip(space.sizes, batch))
                    break

    def descriptor(self, t: Tensor, outer: int, k: int) -> Descriptor:
        """Blocks of ``outer`` by ``k``."""
        block = (outer, k) if self.k_last else (k, outer)
        layout = gl.NVMMASharedLayout.get_default_for(list(block), {**TRITON, **FLOAT8}[t.dtype])
        return Descriptor(t, self.shape, self.strides, block, layout)


class Kernels:
    """The two kernels of an epilogue."""

    def __init__(self, name: str, epilogue: Any, annotations: dict[str, str]) -> None:
        finish = fill(_finish, f"{name}_finish", EPILOGUE=epilogue)
        self.product = fill(product, name, annotations, MULTIPLY=fill(_multiply, f"{name}_multiply", FINISH=finish))
        self.join = fill(join, f"{name}_join", annotations, FINISH=finish)

    def plan(
        self, space: Space, dtype: torch.dtype, choice: Choice, gated: bool = False, promoted: bool = False,
        groups: int = 0,
    ) -> Callable[..., None] | None:  # fmt: skip
        """The launches for ``choice``; None where a factor cannot be loaded by blocks.

        Where ``promoted``, sums of float32 take what tensor cores found in each step. Batches may be those of ``groups`` of
        rows, that have all rows in common and a second factor each.
        """
        if choice.transposed:
            space = space.transposed()
        a, b = (Matrix(space, which, dtype.itemsize) for which in (1, 2))
        # Blocks beyond the end of K are zero along lines; across lines the next batch begins there.
        crosses = space.batches > 1 and space.K % choice.BK != 0 and not (a.k_last and b.k_last)
        if a.k_last is None or b.k_last is None or crosses or (gated and not b.k_last):
            return None
        # Groups of rows begin anywhere, blocks not along lines.
        if groups and not a.k_last:
            return None
        # Tensor cores take the lines of halves alone in either direction.
        if dtype.itemsize == 1 and not (a.k_last and b.k_last):
            return None
        out_batch, _, _, *extra_batch = space.batch
        where = (space.rows[0], space.cols[0], space.rows[2:], space.cols[2:])
        shape = (choice.BM, choice.BN)
        turned = space.rows[0] == 1 != space.cols[0]
        line, end, step = (space.cols[0], space.M, 1) if turned else (space.rows[0], space.N, space.cols[0])
        # Groups of rows begin anywhere.
        align = math.gcd(8, line, end, *out_batch) if step == 1 and not (groups and turned) else 1
        cols = choice.BN // (1 + gated)
        over = any(n > side and n % side for n, side in ((0 if groups else space.M, choice.BM), (space.N, cols)))
        tile = dict(
            BM=choice.BM, BN=choice.BN, GROUP=choice.GROUP, WIDE=space.wide, ALONG=space.along, ALIGN=align, TURNED=turned,
            OVER=over,
        )  # fmt: skip
        split, pieces = choice.split, choice.pieces
        one = choice.whole <= choice.processors and not (split or groups or space.wide) and space.batches == 1
        meta = dict(
            tile, A_ROWS=bool(a.k_last), B_ROWS=not b.k_last, BK=choice.BK, STAGES=choice.STAGES,
            WORKERS=choice.workers, ONE=one, PROMOTED=promoted, num_warps=4,
        )  # fmt: skip
        rows = max(1, min(64, PART // choice.BN))
        grid = (min(choice.processors, choice.whole + split * pieces),)

        def run(
            out: Tensor, first: Tensor, second: Tensor, up: Tensor | None, extras: tuple[Tensor, ...],
            scalars: tuple[Any, ...], offs: Tensor | None = None,
        ) -> None:  # fmt: skip
            if choice.transposed:
                first, second = second, first
            parts = torch.empty((split * pieces, *shape), dtype=torch.float32, device=out.device) if split else None
            launch(
                self.product, grid,
                (out, a.descriptor(first, choice.BM // choice.workers, choice.BK), b.descriptor(second, cols, choice.BK),
                 None if up is None else b.descriptor(up, cols, choice.BK), parts, extras,
                 space.sizes, out_batch, a.batch, b.batch, tuple(extra_batch), *where, *scalars, space.M, space.N, space.K,
                 choice.whole, split, pieces, choice.part_steps, offs, groups),
                meta,
            )  # fmt: skip
            if parts is not None:
                launch_next(
                    self.join, (split * (choice.BM // rows),),
                    (out, parts, extras, space.sizes, out_batch, tuple(extra_batch), *where, *scalars, space.M, space.N,
                     choice.whole, split, pieces),
                    dict(tile, ROWS=rows, GATED=gated, num_warps=4),
                )  # fmt: skip

        return run
