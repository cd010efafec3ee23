"""Products of scaled blocks: each slice of K is multiplied by the scales of its blocks before it is added."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._driver import dot_precision
from gemskit._dtypes import TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.blas._drive import ACCUMULATORS
from gemskit.blas._factors import as_factor, plus_product, promoted
from gemskit.errors import NoKernel


@jit
def _by_scales(acc, scale_a, scale_b, rows, columns, step, scale_ak, scale_bk, m_live, n_live):
    if acc.dtype.is_int():
        acc = acc.to(tl.float32)
    if scale_a is not None:
        acc *= tl.load(scale_a + rows + step * scale_ak, m_live, other=0.0).to(acc.dtype)[:, None]
    return acc * tl.load(scale_b + columns + step * scale_bk, n_live, other=0.0).to(acc.dtype)[None, :]


@jit
def _blocks(
    out, a, b, scale_a, scale_b, bias, scale_result, M, N, K, out_m, out_n, a_m, a_k, b_k, b_n,
    scale_m, scale_ak, scale_bk, scale_n, bias_n, block_m, block_n, block_k,
    UNITS: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr, WIDE: tl.constexpr, PROMOTED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    k = tl.arange(0, BK)
    if WIDE:
        i, k = i.to(tl.int64), k.to(tl.int64)
    tile_m, tile_n = language.swizzle(i, tl.cdiv(M, BM), tl.cdiv(N, BN), SWIZZLE)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    m_live, n_live = m < M, n < N
    a_at = m[:, None] * a_m + k[None, :] * a_k
    b_at = k[:, None] * b_k + n[None, :] * b_n
    rows, columns = (m // block_m) * scale_m, (n // block_n) * scale_n
    acc = tl.zeros((BM, BN), UNITS if ONE else TOTAL)
    for at in range(0, K, BK):
        x = tl.load(a + a_at, m_live[:, None] & (k[None, :] < K - at), other=0.0)
        y = tl.load(b + b_at, (k[:, None] < K - at) & n_live[None, :], other=0.0)
        if x.dtype.is_floating() and not y.dtype.is_floating():
            y = as_factor(y, x.dtype)
        if ONE:
            acc = plus_product(acc, x, y, PRECISION, PROMOTED)
        else:
            part = tl.dot(x, y, input_precision=PRECISION, out_dtype=UNITS)
            acc += _by_scales(part, scale_a, scale_b, rows, columns, at // block_k, scale_ak, scale_bk, m_live, n_live)
        a += BK * a_k
        b += BK * b_k
    if ONE:
        acc = _by_scales(acc, scale_a, scale_b, rows, columns, 0, scale_ak, scale_bk, m_live, n_live)
    if bias is not None:
        acc += tl.load(bias + n * bias_n, n_live, other=0.0).to(acc.dtype)[None, :]
    if scale_result is not None:
        acc *= tl.load(scale_result).to(acc.dtype)
    at = m[:, None] * out_m + n[None, :] * out_n
    tl.store(out + at, acc.to(out.dtype.element_ty), m_live[:, None] & n_live[None, :])


def blocks(
    name: str, out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor, block: tuple[int, int, int],
    bias: Tensor | None = None, scale_result: Tensor | None = None, fast: bool = False,
) -> None:  # fmt: skip
    """``a`` (M, K) by ``b`` (K, N), where ``scale_a`` (rows, slices) and ``scale_b`` (slices, columns) count ``block``."""
    (M, K), N = a.shape, b.shape[1]
    config = backends.arch().config("gemm")
    bm, bn = (min(side, max(16, _layout.next_power_of_2(n))) for side, n in ((config["m"], M), (config["n"], N)))
    # gfx942 spills 74 registers for 32 x 128, none for 32 x 64.
    bn = min(bn, 64) if bm < 64 else bn
    # Matrix units take 32 bytes of K at a time; few rows go through those that want operands in registers.
    one, least, step = block[2] >= K, max(16, 32 // a.dtype.itemsize), config["k"] * 2 // a.dtype.itemsize
    step = step if bm >= 64 else step // 2
    if not one:
        # The largest power of 2 that no block of K ends within.
        step = min(block[2] & -block[2], step)
        if step < least:
            raise NoKernel(f"{name}: no kernel for blocks of {block[2]} along K; served are multiples of {least}")
    units = ACCUMULATORS[a.dtype]
    grid = _layout.cdiv(M, bm) * _layout.cdiv(N, bn)
    meta = dict(
        UNITS=TRITON[units], TOTAL=TRITON[units if units.is_floating_point else torch.float32],
        PRECISION=dot_precision(a.dtype), ONE=one, BM=bm, BN=bn, BK=max(least, step),
        SWIZZLE=config["group"], WIDE=_layout.any_wide(out, a, b),
        PROMOTED=promoted(a.dtype, bm, fast),
        num_warps=8 if max(bm * bn, bn * max(least, step)) > 64 * 64 else 4, num_stages=config["stages"],
    )  # fmt: skip
    scales = (*_strides(scale_a), *_strides(scale_b), bias.stride(-1) if bias is not None else 0)
    strides = (*out.stride(), *a.stride(), *b.stride(), *scales)
    if grid:
        launch(_blocks, (grid,), (out, a, b, scale_a, scale_b, bias, scale_result, M, N, K, *strides, *block), meta)


def _strides(scale: Tensor | None) -> tuple[int, int]:
    """0 along dimensions of size 1: one scale there is that of all."""
    if scale is None:
        return 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(scale.shape, scale.stride()))  # type: ignore[return-value]
