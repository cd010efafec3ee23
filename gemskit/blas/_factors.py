"""Factors of matrix units in another type than that of their memory."""

from __future__ import annotations

import torch
import triton.language as tl

from gemskit import backends
from gemskit._dtypes import FLOAT8
from gemskit._jit import jit


def promoted(dtype: torch.dtype, rows: int, fast: bool = False) -> bool:
    """Whether the product of each step is added to sums of float32 outside of tensor cores.

    Hopper's keep 14 bits of sums of float8, which ``fast`` ones stay in. Fewer ``rows`` of a tile go through others, as halves.
    """
    return dtype in FLOAT8 and rows >= 64 and backends.arch().config("gemm")["promote"] == 1 and not fast


@jit
def plus_product(acc, x, y, PRECISION: tl.constexpr, PROMOTED: tl.constexpr):
    """``acc + x @ y``."""
    if PROMOTED:
        # Not by ``max_num_imprecise_acc``, with which Triton adds before it waits for the tensor cores: ptxas has to order them.
        acc += tl.dot(x, y, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@jit
def as_factor(x, kind: tl.constexpr):
    """The tile ``x`` as a factor of type ``kind``, converted in registers."""
    if kind == tl.float64 and x.dtype.primitive_bitwidth < 64:
        # Through float32: Triton converts no float8 to float64. And through a sum of one term: Triton 3.6 would lay the factor
        # out by the width of its memory, and fail.
        return tl.sum(x.to(tl.float32).to(tl.float64)[:, :, None], 2)
    else:
        return x.to(kind)
