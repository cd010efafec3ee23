"""What a product computes: sizes and strides, without the tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit
from gemskit._layout import Strides, offset


@dataclass(frozen=True)
class Space:
    """``out[i] = a[i] @ b[i]`` for all i of a batch, with further operands that are broadcast to ``out``.

    Tuples go by operand: ``out``, then ``a`` or ``b`` or both, then the further ones.
    """

    sizes: Strides
    M: int
    N: int
    K: int
    #: Strides along the batch, of out, a, b and the others.
    batch: tuple[Strides, ...]
    #: Along M, of out, a and the others; along N, of out, b and the others.
    rows: Strides
    cols: Strides
    a_k: int
    b_k: int
    #: Whether an offset leaves int32.
    wide: bool

    @classmethod
    def of(cls, out: Tensor, a: Tensor, b: Tensor, others: Sequence[Tensor]) -> Space:
        """Of ``a`` (.., M, K), ``b`` (.., K, N) and ``out`` (.., M, N), batches broadcast."""
        shape, K = tuple(out.shape), a.shape[-1]
        batch, M, N = shape[:-2], shape[-2], shape[-1]
        factors = [_layout.broadcast_strides(t, (*batch, *t.shape[-2:])) for t in (a, b)]
        results = [tuple(out.stride()), *(_layout.broadcast_strides(t, shape) for t in others)]
        wide = any(_layout.is_wide((*batch, *t.shape[-2:]), [s]) for t, s in zip((out, a, b), (results[0], *factors)))
        wide = wide or _layout.is_wide(shape, results)
        # Rows follow the batch in one space: b does not vary along them, so batches that share b become rows.
        along = [results[0][:-1], factors[0][:-1], (*factors[1][:-2], 0), *(s[:-1] for s in results[1:])]
        sizes, flat = _layout.collapse((*batch, M), along)
        if flat[2][-1]:
            sizes, flat = (*sizes, 1), [(*s, 0) for s in flat]
        M = sizes[-1] if out.numel() else 0
        rows = (flat[0][-1], flat[1][-1], *(s[-1] for s in flat[3:]))
        cols = (results[0][-1], factors[1][-1], *(s[-1] for s in results[1:]))
        along_batch = tuple(s[:-1] or (0,) for s in flat)
        return cls(sizes[:-1] or (1,), M, N, K, along_batch, rows, cols, factors[0][-1], factors[1][-2], wide)

    @property
    def batches(self) -> int:
        """How many products there are."""
        return math.prod(self.sizes)

    @property
    def along(self) -> tuple[int, ...]:
        """Of each further operand, what it varies along: 1 columns, 2 rows, 3 both."""
        return tuple([2 * (r != 0) + (c != 0) for r, c in zip(self.rows[2:], self.cols[2:])])

    @property
    def strided(self) -> tuple[Any, ...]:
        """Sizes of the batch and strides in the order of kernels' arguments: ``batch_sizes`` to ``extra_n``."""
        out_batch, a_batch, b_batch, *extra_batch = self.batch
        (out_m, a_m, *extra_m), (out_n, b_n, *extra_n) = self.rows, self.cols
        batch = (self.sizes, out_batch, a_batch, b_batch, tuple(extra_batch))
        return (*batch, out_m, out_n, a_m, self.a_k, self.b_k, b_n, tuple(extra_m), tuple(extra_n))

    def transposed(self) -> Space:
        """The same as ``out.mT = b.mT @ a.mT``."""
        out, a, b, *others = self.batch
        return dataclasses.replace(
            self,
            M=self.N,
            N=self.M,
            batch=(out, b, a, *others),
            rows=self.cols,
            cols=self.rows,
            a_k=self.b_k,
            b_k=self.a_k,
        )


@jit
def read(extras, m, n, M, N, batch, sizes, strides, by_m, by_n, ACC: tl.constexpr, ALONG: tl.constexpr):
    """The further operands of a tile, in ACC. One that is broadcast stays a row, a column or a scalar: it fills no registers."""
    values = ()
    for j in tl.static_range(len(extras)):
        at = extras[j] + offset(batch, sizes, strides[j])
        if ALONG[j] == 3:
            v = tl.load(at + m * by_m[j] + n * by_n[j], (m < M) & (n < N))
        elif ALONG[j] == 2:
            v = tl.load(at + m * by_m[j], m < M)
        elif ALONG[j] == 1:
            v = tl.load(at + n * by_n[j], n < N)
        else:
            v = tl.load(at)
        values = values + (v.to(ACC),)
    return values
