"""Device functions to call from one's own Triton kernels.

All work on blocks and on scalars, of float32 and float64 where nothing else is said: convert halves first, and round once
when you store. NaN propagates. docs/language.md lists what each does with infinities, and shows a kernel that uses three.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra import libdevice

from gemskit._jit import jit

# -- elementary functions: at most 2 units in the last place over the whole range (pow: 4) -------------------------------------


@jit
def exp(x):
    """``e**x`` of a float block. exp(-inf) = 0, exp(nan) = nan."""
    return libdevice.exp(x)


@jit
def log(x):
    """Natural logarithm. log(0) = -inf, log(x < 0) = nan."""
    return libdevice.log(x)


@jit
def tanh(x):
    """Hyperbolic tangent, ±1 at ±inf."""
    return libdevice.tanh(x)


@jit
def erf(x):
    """Error function."""
    return libdevice.erf(x)


@jit
def pow(x, y):
    """``x**y`` of floats with C's special values: pow(0, 0) = 1, pow(1, nan) = 1, pow(x < 0, non-integer) = nan."""
    return libdevice.pow(x, y)


@jit
def div(x, y):
    """Correctly rounded ``x / y`` (Triton's ``/`` is off by up to 2 units in the last place in float32)."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@jit
def sqrt(x):
    """Correctly rounded square root; nan below zero."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


# -- activations and their derivatives -----------------------------------------------------------------------------------------


@jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``: 0 at -inf, 1 at +inf."""
    return 1 / (1 + libdevice.exp(-x))


@jit
def d_sigmoid(x):
    """Derivative of :func:`sigmoid`; 0 at ±inf."""
    s = sigmoid(x)
    return s * (1 - s)


@jit
def d_tanh(x):
    """Derivative of :func:`tanh`; 0 at ±inf."""
    t = tanh(x)
    return 1 - t * t


@jit
def relu(x):
    """``x`` where positive, else 0; NaN stays."""
    return tl.where(x < 0, 0, x)


@jit
def d_relu(x):
    """Derivative of :func:`relu`, 0 at 0 as in torch; NaN gives 1."""
    return tl.where(x <= 0, 0, 1).to(x.dtype)


@jit
def silu(x):
    """``x * sigmoid(x)``. NaN at -inf, as in torch."""
    return x * sigmoid(x)


@jit
def d_silu(x):
    """Derivative of :func:`silu`. NaN at ±inf."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@jit
def gelu(x):
    """``x`` times the probability that a standard normal number is below it. NaN at -inf, as in torch."""
    return x * 0.5 * (1 + erf(x * 0.7071067811865476))


@jit
def d_gelu(x):
    """Derivative of :func:`gelu`. NaN at ±inf."""
    return 0.5 * (1 + erf(x * 0.7071067811865476)) + x * exp(-0.5 * x * x) * 0.3989422804014327


@jit
def gelu_tanh(x):
    """The approximation of :func:`gelu` by tanh."""
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@jit
def d_gelu_tanh(x):
    """Derivative of :func:`gelu_tanh`. NaN at ±inf."""
    # With e = exp(-2|u|): 1 - tanh(u)**2 loses digits where tanh(u) is near 1, and the factor x u' makes them visible.
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    e = exp(-2 * tl.abs(u))
    s = 1 / (1 + e)
    return tl.where(u < 0, e * s, s) + x * (2 * e * s * s) * (0.7978845608028654 * (1 + 3 * 0.044715 * x * x))


@jit
def softplus(x):
    """``log(1 + exp(x))`` without overflow: 0 at -inf, inf at inf."""
    return tl.where(x > 0, x, 0) + libdevice.log1p(exp(-tl.abs(x)))


@jit
def rotate(x, y, cos, sin):
    """The pair ``(x, y)`` turned by an angle, as rotary position embeddings do: ``(x cos - y sin, y cos + x sin)``."""
    return x * cos - y * sin, y * cos + x * sin


# -- comparing ------------------------------------------------------------------------------------------------------------------


@jit
def maximum(x, y):
    """The larger of two; NaN if either is NaN. Floats, ints and bools."""
    if x.dtype.is_floating() and y.dtype.is_floating():
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(x > y, x, y)


@jit
def minimum(x, y):
    """The smaller of two; NaN if either is NaN. Floats, ints and bools."""
    if x.dtype.is_floating() and y.dtype.is_floating():
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(x < y, x, y)


@jit
def is_nan(x):
    """True where ``x`` is NaN; always False for ints."""
    return x != x


# -- merging: combine functions for ``tl.reduce`` and ``tl.associative_scan`` ---------------------------------------------------


@jit
def add(x, y):
    """The sum."""
    return x + y


@jit
def better_max(x, i, y, j):
    """The (value, index) pair with the larger value; NaN is largest, ties go to the smaller index."""
    first = (x > y) | ((x != x) & (y == y)) | (((x == y) | ((x != x) & (y != y))) & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@jit
def better_min(x, i, y, j):
    """The (value, index) pair with the smaller value; NaN is smallest, ties go to the smaller index."""
    first = (x < y) | ((x != x) & (y == y)) | (((x == y) | ((x != x) & (y != y))) & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    """Merge two (mean, sum of squared deviations, count) triples (Chan et al. 1979). Counts may be 0."""
    n = n_a + n_b
    delta = mean_b - mean_a
    share = tl.where(n > 0, n_b / tl.where(n > 0, n, 1), 0)
    return mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, n


@jit
def online_softmax(peak_a, total_a, peak_b, total_b):
    """Merge two (maximum, sum of exp(x - maximum)) pairs (Milakov and Gimelshein 2018); one element x is (x, 1).

    The identity is (-inf, 0). NaN propagates; for torch's NaN at +inf, an element +inf enters as (inf, nan).
    """
    # One exponential for both sides; equal peaks include two infinite ones, whose difference is NaN. The fast one loses d units
    # of exp(-d), so less than half a unit of the total.
    scale = tl.exp(tl.where(peak_a == peak_b, 0, -tl.abs(peak_a - peak_b)))
    total = tl.where(peak_a > peak_b, total_a + total_b * scale, total_a * scale + total_b)
    return maximum(peak_a, peak_b), total


# -- random numbers -------------------------------------------------------------------------------------------------------------


@jit
def philox(seed, index):
    """Four random words (uint32 blocks) for each ``index`` (int32 or int64) under ``seed`` (Salmon et al. 2011)."""
    high = (index.to(tl.int64) >> 32).to(tl.uint32)
    return tl.philox(seed, index.to(tl.uint32), high, high * 0, high * 0)


@jit
def uniform(seed, index):
    """A float32 in (0, 1), one of 2**23 at equal distances: never 0 and never 1, so its logarithm is finite."""
    word, _, _, _ = philox(seed, index)
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


# -- tiles ----------------------------------------------------------------------------------------------------------------------


@jit
def swizzle(i, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which tile ``(m, n)`` of a product program ``i`` computes: columns of ``GROUP`` tiles, that share operands in the cache."""
    group = i // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + (i % (GROUP * tiles_n)) % height, (i % (GROUP * tiles_n)) // height
