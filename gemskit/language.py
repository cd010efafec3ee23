"""Device functions to call from one's own Triton kernels.

All work on blocks and on scalars. ``exp``, ``log`` and ``tanh`` are accurate to 2 units in the last place over the whole range
(Triton's own ``tl.exp`` loses ``|x|`` units, because it multiplies by log2(e) first); ``div`` and ``sqrt`` round correctly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def exp(x):
    """``e**x`` of a float block. exp(-inf) = 0, exp(nan) = nan."""
    return libdevice.exp(x)


@triton.jit
def log(x):
    """Natural logarithm. log(0) = -inf, log(x < 0) = nan."""
    return libdevice.log(x)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, ±1 at ±inf."""
    return libdevice.tanh(x)


@triton.jit
def erf(x):
    """Error function."""
    return libdevice.erf(x)


@triton.jit
def pow(x, y):
    """``x**y`` of floats with C's special values: pow(0, 0) = 1, pow(1, nan) = 1, pow(x < 0, non-integer) = nan."""
    return libdevice.pow(x, y)


@triton.jit
def div(x, y):
    """Correctly rounded ``x / y`` (Triton's ``/`` is off by up to 2 units in the last place in float32)."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sqrt(x):
    """Correctly rounded square root; nan below zero."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``: 0 at -inf, 1 at +inf."""
    return 1 / (1 + libdevice.exp(-x))


@triton.jit
def maximum(x, y):
    """The larger of two; NaN if either is NaN. Floats, ints and bools."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def minimum(x, y):
    """The smaller of two; NaN if either is NaN. Floats, ints and bools."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def add(x, y):
    """The sum, as a combine function for ``tl.reduce``."""
    return x + y


@triton.jit
def is_nan(x):
    """True where ``x`` is NaN; always False for ints."""
    return x != x


@triton.jit
def better_max(x, i, y, j):
    """The (value, index) pair with the larger value; NaN is largest, ties go to the smaller index."""
    first = (x > y) | ((x != x) & (y == y)) | (((x == y) | ((x != x) & (y != y))) & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@triton.jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    """Merge two (mean, sum of squared deviations, count) triples (Chan et al. 1979). Counts may be 0."""
    n = n_a + n_b
    delta = mean_b - mean_a
    share = tl.where(n > 0, n_b / tl.where(n > 0, n, 1), 0)
    return mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, n


@triton.jit
def online_softmax(peak_a, total_a, peak_b, total_b):
    """Merge two (maximum, sum of exp(x - maximum)) pairs (Milakov and Gimelshein 2018); one element x is (x, 1).

    The identity is (-inf, 0). NaN propagates; for torch's NaN at +inf, an element +inf enters as (inf, nan).
    """
    # One exponential for both sides; equal peaks include two infinite ones, whose difference is NaN.
    scale = exp(tl.where(peak_a == peak_b, 0, -tl.abs(peak_a - peak_b)))
    total = tl.where(peak_a > peak_b, total_a + total_b * scale, total_a * scale + total_b)
    return maximum(peak_a, peak_b), total
