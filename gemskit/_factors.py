"""Factors of matrix units in another type than that of their memory."""

from __future__ import annotations

import triton.language as tl

from gemskit._jit import jit


@jit
def as_factor(x, kind: tl.constexpr):
    """The tile ``x`` as a factor of type ``kind``, converted in registers."""
    if kind == tl.float64 and x.dtype.primitive_bitwidth < 64:
        # Through float32: Triton converts no float8 to float64. And through a sum of one term: Triton 3.6 would lay the factor
        # out by the width of its memory, and fail.
        return tl.sum(x.to(tl.float32).to(tl.float64)[:, :, None], 2)
    else:
        return x.to(kind)
