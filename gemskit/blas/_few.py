"""Products of at most 32 rows: the second factor is read once, by many small programs, and nothing else counts.

H200, bf16, ratio to cuBLAS for weights of 4096x4096, 28672x4096, 4096x14336, 5120x25600: one row 1.24, 1.09, 1.18, 1.17;
16 rows 1.10, 1.04, 1.03, 1.03. Hopper's kernel has 17 to 32 rows, where the copy engine loads its factors and there is
one weight. Float8 is converted in registers; its tiles took 48 us for 16x14336x4096, halves 41.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._dtypes import FLOAT8, TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit.blas._space import Space, read

#: Filled in per operator.
EPILOGUE: Any = None


@jit
def _weights(b, up, at, k, left, MASKED: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of the weights and one of ``up``, which is read once. What begins beyond K has no use, so nothing fills it."""
    live = k[None, :] < left if MASKED else None
    rest: tl.constexpr = None if EVEN_K else 0.0
    y = tl.load(b + at, live, rest, eviction_policy="evict_first")
    z = y if up is None else tl.load(up + at, live, rest, eviction_policy="evict_first")
    return y, z


@jit
def few_rows(
    out, a, b, up, extras, sizes, out_batch, a_batch, b_batch, extra_batch,
    out_m, out_n, a_m, a_k, b_k, b_n, extra_m, extra_n, s0, s1, s2, s3, M, N, K,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    AHEAD: tl.constexpr, WIDE: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """BN columns of ``out``: columns are the rows of the tiles here, so that a tile reads along K."""
    i = tl.program_id(0)
    k = tl.arange(0, BK)
    if WIDE:
        i = i.to(tl.int64)
        k = k.to(tl.int64)
    batch = 0
    if len(sizes) > 0:
        groups = tl.cdiv(N, BN)
        batch = i // groups
        i = i % groups
    n = (i * BN + tl.arange(0, BN))[:, None]
    m = tl.arange(0, BM)[None, :]
    b += offset(batch, sizes, b_batch)
    a += offset(batch, sizes, a_batch)
    # Columns beyond the end wrap around, so that only K needs a mask.
    b_at = (n if EVEN_N else n % N) * b_n + k[None, :] * b_k
    # Of one row a thread adds up what it loads at once: a sum for each element would take half of its registers.
    LOADED: tl.constexpr = 128 // b.dtype.element_ty.primitive_bitwidth
    SUMS: tl.constexpr = BK // LOADED if BM == 1 else BM
    acc = tl.zeros((BN, SUMS), ACC)
    if up is not None:
        up += offset(batch, sizes, b_batch)
        other = tl.zeros((BN, SUMS), ACC)
    # Registers hold the weights of the next step, where two matrices leave no room for enough stages in shared memory.
    if AHEAD:
        y, z = _weights(b, up, b_at, k, K, not EVEN_K, EVEN_K)
    for start in range(0, K, BK):
        if not AHEAD:
            y, z = _weights(b, up, b_at, k, K - start, not EVEN_K, EVEN_K)
        b += BK * b_k
        if up is not None:
            up += BK * b_k
        if AHEAD:
            next_y, next_z = _weights(b, up, b_at, k, K - start - BK, True, EVEN_K)
        if BM == 1:
            if EVEN_K:
                x = tl.load(a + k[None, :] * a_k)
            else:
                x = tl.load(a + k[None, :] * a_k, k[None, :] < K - start, other=0.0)
            acc += tl.sum(tl.reshape(y.to(ACC) * x.to(ACC), (BN, SUMS, LOADED)), 2)
            if up is not None:
                other += tl.sum(tl.reshape(z.to(ACC) * x.to(ACC), (BN, SUMS, LOADED)), 2)
        else:
            at = a + (m % M) * a_m + k[:, None] * a_k
            if EVEN_K:
                x = tl.load(at)
            else:
                x = tl.load(at, k[:, None] < K - start, other=0.0)
            # In float16 float8 is exact, and the matrix units of halves keep sums of float32.
            KIND: tl.constexpr = tl.float16 if x.dtype.is_fp8() else x.dtype
            acc = tl.dot(y.to(KIND), x.to(KIND), acc, out_dtype=ACC)
            if up is not None:
                other = tl.dot(z.to(KIND), x.to(KIND), other, out_dtype=ACC)
        a += BK * a_k
        if AHEAD:
            y, z = next_y, next_z
    if BM == 1:
        acc = tl.sum(acc, 1, keep_dims=True)
        if up is not None:
            other = tl.sum(other, 1, keep_dims=True)
    live = (m < M) & (n < N)
    values = read(extras, m, n, M, N, batch, sizes, extra_batch, extra_m, extra_n, ACC, ALONG)
    if up is not None:
        values = (other,) + values
    result = EPILOGUE(acc, values, s0, s1, s2, s3)
    at = offset(batch, sizes, out_batch) + m * out_m + n * out_n
    tl.store(out + at, result.to(out.dtype.element_ty), live)


def tile(M: int, N: int) -> tuple[int, int, int, int]:
    """Columns and K of a tile of several rows, warps and stages.

    Many columns: fewer, larger programs, as those of 16 columns read the first factor N / 16 times. Where all programs run at
    once, more stages (H200, 16x5120x25600: 76 us for 80).
    """
    if N <= 4096:
        return 16, 512, 2, 3
    if N <= 8192:
        return (64, 128, 4, 6) if M <= 16 else (32, 256, 2, 4)
    return 64, 128, 4, 4


def line(K: int, itemsize: int) -> tuple[int, int, int]:
    """Columns and K of a tile of one row, and warps.

    Bytes in flight are what is short: at 64 registers eight programs of 16 KiB (H200, halves, 28672x4096: 65.3 us; of 8 KiB
    66.7), and lines of 4096 at once (63.5; 5120x8192 27.8, by 2048 29.1). Masks need registers: 8 KiB with them. Two warps where
    there is least to do before the end: 10240x5120 33.1 us, four 33.7, with masks 34.
    """
    if K in (4096, 8192) and itemsize == 2:
        return 4, 4096, 8
    bk = min(2048, max(32, _layout.next_power_of_2(K)))
    if K % 1024 == 0 and _layout.cdiv(K, bk) * bk > 1.1 * K:
        return 2, 1024, 2
    whole = bk == 2048 and K % bk == 0 and itemsize == 2
    return (4 if whole else max(1, 4096 // bk)), bk, 4


def plan(
    space: Space, dtype: torch.dtype, acc: torch.dtype, kernel: Any, gated: bool = False
) -> Callable[..., None] | None:
    """The launch; None for more rows, or where the second factor does not run along K."""
    transposed = space.N < space.M and not gated
    if transposed:
        space = space.transposed()
    M, N, K = space.M, space.N, space.K
    config = backends.arch().config("gemm_few")
    most = config["rows"] if dtype.itemsize == 2 else 1
    # Loads of a byte each spill.
    if dtype in FLOAT8 and config["float8"] and space.a_k == 1 and not (space.rows[1] | space.cols[1] | K) % 16:
        most = 16
    if M > most or (space.b_k != 1 and K > 1) or not K:
        return None
    if M == 1:
        bm, (bn, bk, warps), stages = 1, line(K, dtype.itemsize), 1
    else:
        # 16 is the smallest side of a product on tensor cores.
        bm, (bn, bk, warps, stages) = max(16, _layout.next_power_of_2(M)), tile(M, N)
        # As many bytes of float8.
        bk = min(bk * 2 // dtype.itemsize, max(16, _layout.next_power_of_2(K)))
    # 64 columns a program: up to 8192 there would be fewer programs than processors.
    ahead = gated and dtype.itemsize == 2 and 1 < M <= config["ahead"] and N > 8192
    if ahead:
        warps, stages = 8, 1
    elif gated:
        # As many bytes in flight, of two matrices.
        bn, bk = (bn // 2, bk) if bn > 16 or (bm == 1 and bn > 1) else (bn, max(16, bk // 2))
    grid = (_layout.cdiv(N, bn) * space.batches,)
    meta = dict(
        ACC=TRITON[acc], BM=bm, BN=bn, BK=bk, EVEN_K=K % bk == 0, EVEN_N=N % bn == 0, AHEAD=ahead, WIDE=space.wide,
        ALONG=space.along, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    strided = space.strided

    def run(
        out: Tensor, a: Tensor, b: Tensor, up: Tensor | None, extras: tuple[Tensor, ...], scalars: tuple[Any, ...]
    ) -> None:
        if transposed:
            a, b = b, a
        launch(kernel, grid, (out, a, b, up, extras, *strided, *scalars, M, N, K), meta)

    return run
