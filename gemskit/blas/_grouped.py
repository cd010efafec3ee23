"""Products of groups of rows (or of steps) that ``offs`` on the device bounds: every program finds its own group.

The grid is the most tiles that any groups of these totals can have, so the host never waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._bind import fill, slots
from gemskit._driver import dot_precision
from gemskit._dtypes import HALVES, TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.blas import _drive
from gemskit.blas._factors import plus_product, promoted
from gemskit.blas._rule import best_of_groups
from gemskit.blas._space import Space

#: Filled in per operator.
EPILOGUE: Any = None
STORED: Any = None


@jit
def _summed(
    acc, a, b, m, n, m_live, n_live, first, stop, a_m, a_k, b_k, b_n,
    PRECISION: tl.constexpr, BK: tl.constexpr, PROMOTED: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of the steps from ``first`` to ``stop``."""
    k = tl.arange(0, BK)
    a_at = m[:, None] * a_m + (first + k)[None, :] * a_k
    b_at = (first + k)[:, None] * b_k + n[None, :] * b_n
    for at in range(first, stop, BK):
        x = tl.load(a + a_at, m_live[:, None] & (k[None, :] < stop - at), other=0.0)
        y = tl.load(b + b_at, (k[:, None] < stop - at) & n_live[None, :], other=0.0)
        acc = plus_product(acc, x, y, PRECISION, PROMOTED)
        a += BK * a_k
        b += BK * b_k
    return acc


@jit
def _stored(
    out, acc, m, n, m_live, n_live, out_m, out_n, row_scales, column_scales, extras, extra_m, extra_n, s0, s1, s2, s3
):  # fmt: skip
    """Store a tile: the epilogue of it, times the scales of its rows and columns where there are any."""
    if row_scales is not None:
        acc *= tl.load(row_scales, m_live, other=0.0)[:, None]
    if column_scales is not None:
        acc *= tl.load(column_scales, n_live, other=0.0)[None, :]
    values = ()
    live = m_live[:, None] & n_live[None, :]
    for j in tl.static_range(len(extras)):
        at = m[:, None] * extra_m[j] + n[None, :] * extra_n[j]
        values = values + (tl.load(extras[j] + at, live).to(acc.dtype),)
    acc = EPILOGUE(acc, values, s0, s1, s2, s3)
    at = m[:, None] * out_m + n[None, :] * out_n
    tl.store(out + at, acc.to(out.dtype.element_ty), m_live[:, None] & n_live[None, :])


@jit
def _bound(offs, g, total):
    """Where group ``g`` ends, within what there is."""
    return tl.minimum(tl.maximum(tl.load(offs + g).to(tl.int32), 0), total)


@jit
def _rows(
    out, a, b, offs, scale_a, scale_b, extras, groups, T, N, K,
    out_m, out_n, a_m, a_k, b_g, b_k, b_n, scale_m, scale_g, scale_n, extra_m, extra_n, s0, s1, s2, s3,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROMOTED: tl.constexpr, SWIZZLE: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    g = tl.arange(0, GROUPS)
    # Rows behind the last group belong to one more, of no factor: they are zero.
    ends = tl.load(offs + g, g < groups, other=T).to(tl.int32)
    starts = tl.load(offs + g - 1, (g > 0) & (g <= groups), other=0).to(tl.int32)
    ends, starts = tl.minimum(tl.maximum(ends, 0), T), tl.minimum(tl.maximum(starts, 0), T)
    tiles = tl.where(g <= groups, tl.cdiv(tl.maximum(ends - starts, 0), BM), 0) * tiles_n
    last = tl.cumsum(tiles, 0)
    here = (last - tiles <= i) & (i < last)
    if i < tl.sum(tiles, 0):
        group = tl.sum(tl.where(here, g, 0), 0)
        start, end = tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, ends, 0), 0)
        i -= tl.sum(tl.where(here, last - tiles, 0), 0)
        tile_m, tile_n = language.swizzle(i, tl.cdiv(end - start, BM), tiles_n, SWIZZLE)
        m = start + tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        m_live, n_live = m < end, n < N
        if WIDE:
            group, m, n = group.to(tl.int64), m.to(tl.int64), n.to(tl.int64)
        stop = tl.where(group < groups, K, 0)
        acc = tl.zeros((BM, BN), ACC)
        acc = _summed(
            acc, a, b + group * b_g, m, n, m_live, n_live, 0, stop, a_m, a_k, b_k, b_n, PRECISION, BK, PROMOTED
        )
        row_scales = None if scale_a is None else scale_a + m * scale_m
        if scale_b is not None:
            at = scale_b + group * scale_g + n * scale_n
            acc *= tl.load(at, n_live & (group < groups), other=0.0)[None, :]
        STORED(
            out, acc, m, n, m_live, n_live, out_m, out_n, row_scales, None, extras, extra_m, extra_n, s0, s1, s2, s3
        )  # fmt: skip


@jit
def _steps(
    out, a, b, offs, scale_a, scale_b, extras, M, N, T, out_g, out_m, out_n, a_m, a_k, b_k, b_n,
    scale_a_g, scale_a_m, scale_b_g, scale_b_n, extra_g, extra_m, extra_n, s0, s1, s2, s3,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROMOTED: tl.constexpr, SWIZZLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = i // (tiles_m * tiles_n)
    tile_m, tile_n = language.swizzle(i % (tiles_m * tiles_n), tiles_m, tiles_n, SWIZZLE)
    first, stop = _bound(offs, tl.maximum(group - 1, 0), T) * (group > 0), _bound(offs, group, T)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    m_live, n_live = m < M, n < N
    if WIDE:
        group, m, n, first = group.to(tl.int64), m.to(tl.int64), n.to(tl.int64), first.to(tl.int64)
    acc = tl.zeros((BM, BN), ACC)
    acc = _summed(acc, a, b, m, n, m_live, n_live, first, stop, a_m, a_k, b_k, b_n, PRECISION, BK, PROMOTED)
    row_scales = None if scale_a is None else scale_a + group * scale_a_g + m * scale_a_m
    column_scales = None if scale_b is None else scale_b + group * scale_b_g + n * scale_b_n
    ours = ()
    for j in tl.static_range(len(extras)):
        ours = ours + (extras[j] + group * extra_g[j],)
    STORED(
        out + group * out_g, acc, m, n, m_live, n_live, out_m, out_n, row_scales, column_scales,
        ours, extra_m, extra_n, s0, s1, s2, s3,
    )  # fmt: skip


def _meta(rows: int, columns: int, steps: int, dtype: torch.dtype, fast: bool) -> dict[str, Any]:
    """What the kernels are compiled with for groups of ``rows``."""
    meta = _drive.tiles(backends.arch().config("gemm"), None, rows, columns, steps, dtype)
    # A group is one of rows or steps here.
    return meta | dict(
        SWIZZLE=meta.pop("GROUP"), ACC=TRITON[_drive.ACCUMULATORS[dtype]], PRECISION=dot_precision(dtype),
        PROMOTED=promoted(dtype, meta["BM"], fast),
    )  # fmt: skip


@jit
def _plain(acc, values, s0, s1, s2, s3):
    return acc


class After:
    """The kernels of an epilogue ``fn(acc, values, s0, s1, s2, s3)``; ``hopper`` gives those for Hopper's tensor cores."""

    def __init__(
        self, name: str, fn: Any, annotations: Mapping[str, str] | None = None, hopper: Callable[[], Any] | None = None
    ) -> None:
        stored = fill(_stored, f"{name}_stored", EPILOGUE=fn)
        self.rows = fill(_rows, f"{name}_rows", annotations, STORED=stored)
        self.steps = fill(_steps, f"{name}_steps", annotations, STORED=stored)
        self.hopper = hopper


PLAIN = After("grouped", _plain)


def rows(
    out: Tensor, a: Tensor, b: Tensor, offs: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    after: After = PLAIN, extras: tuple[Tensor, ...] = (), scalars: tuple[Any, ...] = slots(()),
    fast: bool = False,
) -> None:  # fmt: skip
    """``out[i] = a[i] @ b[g]``, ``g`` the group of row ``i``; times ``scale_a[i]`` and ``scale_b[g]``."""
    (T, K), (groups, _, N) = a.shape, b.shape
    run = _on_hopper(out, a, b, after, extras)
    if run is not None:
        return run(out, a, b, None, extras, scalars, offs)
    meta = _meta(_layout.cdiv(T, max(groups, 1)), N, K, a.dtype, fast)
    most = T // meta["BM"] + min(groups + 1, T)
    grid = most * _layout.cdiv(N, meta["BN"])
    scales = (scale_a.stride(0) if scale_a is not None else 0, *(scale_b.stride() if scale_b is not None else (0, 0)))
    along = tuple(zip(*(_layout.broadcast_strides(t, out.shape) for t in extras))) or ((), ())
    strides = (*out.stride(), *a.stride(), *b.stride(), *scales, *along, *scalars)
    count = _layout.next_power_of_2(groups + 1)
    if grid:
        launch(
            after.rows, (grid,), (out, a, b, offs, scale_a, scale_b, extras, groups, T, N, K, *strides),
            {**meta, "GROUPS": count, "WIDE": _layout.any_wide(out, a, b, *extras)},
        )  # fmt: skip


#: Rows of a group from which on Hopper's kernel is the faster one: below, the plain one has smaller tiles.
LEAST = 64


def _on_hopper(
    out: Tensor, a: Tensor, b: Tensor, after: After, extras: tuple[Tensor, ...]
) -> Callable[..., None] | None:
    """The launch of the kernel for Hopper's tensor cores; None where it is not worth it or has none."""
    (T, K), (groups, _, N) = a.shape, b.shape
    config = backends.arch().config("gemm")
    if after.hopper is None or not config["wgmma"] or a.dtype not in HALVES or not (groups and N and K):
        return None
    if T < LEAST * groups or (a.data_ptr() | b.data_ptr()) % 16:
        return None
    # A batch of products that have the first factor and the result in common.
    shared = [t.expand(groups, *t.shape) for t in (out, a, *(t.expand(out.shape) for t in extras))]
    space = Space.of(shared[0], shared[1], b, shared[2:])
    space = dataclasses.replace(space, wide=_layout.any_wide(out, a, b, *extras))
    small = any(t.dtype.itemsize > 2 and along == 3 for t, along in zip(extras, space.along))
    choice = best_of_groups(T, N, K, groups, config["processors"], small, 3 in space.along)
    found: Callable[..., None] | None = after.hopper().plan(space, a.dtype, choice, groups=groups)
    return found


def steps(
    out: Tensor, a: Tensor, b: Tensor, offs: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    after: After = PLAIN, extras: tuple[Tensor, ...] = (), scalars: tuple[Any, ...] = slots(()),
    fast: bool = False,
) -> None:  # fmt: skip
    """``out[g] = a[:, g] @ b[g]``, the products of groups of steps; times ``scale_a[g]`` and ``scale_b[g]``."""
    groups, M, N = out.shape
    T = a.shape[1]
    # Groups begin anywhere, so that loads go through registers: longer steps spill, as do 128 x 128 sums next to those of a step.
    most = 64 if promoted(a.dtype, M, fast) else M
    meta = _meta(min(M, most), N, min(_layout.cdiv(T, max(groups, 1)), 64), a.dtype, fast)
    grid = groups * _layout.cdiv(M, meta["BM"]) * _layout.cdiv(N, meta["BN"])
    scales = [s for t in (scale_a, scale_b) for s in (t.stride() if t is not None else (0, 0))]
    along = tuple(zip(*(_layout.broadcast_strides(t, out.shape) for t in extras))) or ((), (), ())
    strides = (*out.stride(), *a.stride(), *b.stride(), *scales, *along, *scalars)
    if grid:
        launch(
            after.steps, (grid,), (out, a, b, offs, scale_a, scale_b, extras, M, N, T, *strides),
            {**meta, "WIDE": _layout.any_wide(out, a, b, *extras)},
        )  # fmt: skip
