"""Device functions that know how precise their result must be.

A formula may name ``precise``, a constant: False where all that the kernel reads and writes are halves. There the result is
rounded to 8 or 11 bits, and the functions below take the approximate instructions of the hardware and short polynomials, whose
errors are a small fraction of half a unit of a half type; otherwise they are those of ``gemskit.language``. The bounds given
are relative errors of the fast forms in float32, for all inputs that are halves.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

from gemskit import language
from gemskit._jit import jit

#: The least normal float32: approximate instructions take anything below for zero.
NORMAL = tl.constexpr(2.0**-126)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@jit
def _inverse(d):
    """``1 / d`` of ``d >= 1`` in two instructions: 2**-21.5; 0 at inf."""
    r = tl.rsqrt(d)
    return r * r


@jit
def inverse(d, precise):
    """``1 / d`` of ``d >= 1``: 2**-21.5."""
    if precise:
        return language.div(tl.full(d.shape, 1, d.dtype), d)
    else:
        return _inverse(d)


@jit
def _signed(a, x):
    """``a >= 0`` with the sign of ``x``. A ``copysign`` LLVM moves behind the rounding to bfloat16: seven instructions more."""
    sign = x.to(tl.int32, bitcast=True) & -(2**31)
    return (a.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@jit
def exp(x, precise):
    """``e**x``: 2**-22 + 2**-25 ``|x|``."""
    if precise:
        return language.exp(x)
    else:
        return tl.exp(x)


@jit
def exp_share(x):
    """``e**x`` for what is added to 1: ``x <= 0``, off by 2**-22 and 2**-24 ``|x|`` of itself; 0 below 2**-126."""
    return libdevice.exp2(x * LOG2E)


@jit
def exp2(x):
    """``2**x``: 2**-22 for every float32; what would be subnormal included, which the instruction takes for zero."""
    if x.dtype == tl.float64:
        return libdevice.exp2(x)
    else:
        low = x < -126
        return libdevice.exp2(tl.where(low, x + 24, x)) * tl.where(low, 2.0**-24, 1.0)


@jit
def expm1(x, precise):
    """``e**x - 1``: 2**-20."""
    if precise:
        return libdevice.expm1(x)
    else:
        p = (0.008338156156241894 * x + 0.04187662899494171) * x + 0.1666683703660965
        near = (p * x + 0.49999379111694336) * x * x + x
        return tl.where(tl.abs(x) < 0.35, near, tl.exp2(x * LOG2E) - 1)


@jit
def sqrt(x, precise):
    """Square root: 2**-22.5; that is the nearest bfloat16, and of float16 the nearest but for a few inputs in 10,000."""
    if precise:
        return language.sqrt(x)
    else:
        low = x < NORMAL
        return tl.sqrt(tl.where(low, x * 2.0**24, x)) * tl.where(low, 2.0**-12, 1.0)


@jit
def rsqrt(x):
    """``1 / sqrt(x)``: 2**-22.5 for every float32; ±inf at ±0."""
    if x.dtype == tl.float64:
        return libdevice.rsqrt(x)
    else:
        low = (x < NORMAL) & (x > 0)
        return libdevice.rsqrt(tl.where(low, x * 2.0**24, x)) * tl.where(low, 2.0**12, 1.0)


@jit
def quotient(x, y):
    """``x / y``: 2**-22; 0 where ``y`` is beyond 2**126."""
    if is_cuda():
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@jit
def div(x, y, precise):
    """``x / y``: 2**-22."""
    if precise:
        return language.div(x, y)
    else:
        return x / y


@jit
def _log2(x):
    if is_cuda():
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@jit
def _log1p(t):
    """``log(1 + t)`` of ``|t| < 1/8``: 2**-21.5."""
    p = ((0.20320157706737518 * t - 0.25328144431114197) * t + 0.33331727981567383) * t - 0.49998727440834045
    return t * (p * t + 1)


@jit
def log2(x):
    """Binary logarithm: 2**-18; 2**-21 within 1/8 of 1, where the result goes to zero."""
    low = x < NORMAL
    far = _log2(tl.where(low, x * 2.0**24, x)) - tl.where(low, 24.0, 0.0)
    t = x - 1
    p = ((0.2933022677898407 * t - 0.3654283583164215) * t + 0.48087164759635925) * t - 0.721328854560852
    return tl.where(tl.abs(t) < 0.125, t * (p * t + 1.4426950216293335), far)


@jit
def log(x, precise):
    """Natural logarithm: as :func:`log2`."""
    if precise:
        return language.log(x)
    else:
        return log2(x) * LN2


@jit
def log1p(x, precise):
    """``log(1 + x)``: as :func:`log`."""
    if precise:
        return libdevice.log1p(x)
    else:
        return tl.where(tl.abs(x) < 0.125, _log1p(x), _log2(1 + x) * LN2)


@jit
def log1p_exp(x, precise):
    """``log(1 + exp(-|x|))``: 2**-20."""
    if precise:
        return libdevice.log1p(language.exp(-tl.abs(x)))
    else:
        # The square is right where it is subnormal.
        u = tl.exp2(tl.abs(x) * (-0.5 * LOG2E))
        u *= u
        p = (-0.008778955787420273 * u + 0.04498664289712906) * u - 0.10902290791273117
        p = ((p * u + 0.17847208678722382) * u - 0.24536865949630737) * u + 0.3328406512737274
        return u * ((p * u - 0.4999817907810211) * u + 1)


@jit
def mish(x):
    """``x * tanh(log(1 + exp(x)))`` of halves: 2**-20 + 2**-24 ``|x|``."""
    # With w = e (e + 2) of e = exp(x) the factor is w / (w + 2). Both are 2**32 times as large, so that none is subnormal.
    e = tl.exp2(x * LOG2E + 32)
    w = e * (e * 2.0**-32 + 2)
    return tl.where(x > 20, x, x * (w * _inverse(w * 2.0**-32 + 2)) * 2.0**-32)


@jit
def sigmoid(x, precise):
    """``1 / (1 + exp(-x))``: 2**-21 + 2**-25 ``|x|``."""
    if precise:
        return language.sigmoid(x)
    else:
        return _inverse(1 + tl.exp2(x * -LOG2E))


@jit
def rest(x, s, precise):
    """``1 - s`` of ``s = sigmoid(x)``: no rounding error is left where it is multiplied by a large ``x``."""
    if precise:
        return 1 - s
    else:
        return tl.where(x > 17, 0.0, 1 - s)


@jit
def tanh(x, precise):
    """Hyperbolic tangent: 2**-21."""
    if precise:
        return language.tanh(x)
    else:
        far = 1 - 2 * _inverse(1 + tl.exp2(x * (2 * LOG2E)))
        s = x * x
        near = ((0.01724149100482464 * s - 0.05304549261927605) * s + 0.13325878977775574) * s - 0.333331435918808
        near *= s
        return tl.where(tl.abs(x) < 0.5, near * x + x, far)


@jit
def sinh(x, precise):
    """Hyperbolic sine: 2**-20 + 2**-25 ``|x|``."""
    if precise:
        return libdevice.sinh(x)
    else:
        s = x * x
        near = ((0.008407787419855595 * s + 0.16665971279144287) * s + 1.0000001192092896) * x
        # Half of each exponential by its exponent: sinh is finite where e**x is not.
        t = x * LOG2E
        return tl.where(tl.abs(x) < 0.5, near, tl.exp2(t - 1) - tl.exp2(-t - 1))


@jit
def asinh(x, precise):
    """Inverse hyperbolic sine: 2**-19."""
    if precise:
        return libdevice.asinh(x)
    else:
        a = tl.abs(x)
        s = x * x
        near = ((0.06938235461711884 * s - 0.1664818376302719) * s + 0.9999991059303284) * a
        # Half the root is less than (a + 1) / 2, which stays finite.
        root = tl.minimum(tl.sqrt(0.25 * s + 0.25), 0.5 * a + 0.5, propagate_nan=tl.PropagateNan.ALL)
        far = _log2(0.5 * a + root) * LN2 + LN2
        return _signed(tl.where(a < 0.3, near, far), x)


@jit
def acosh(x, precise):
    """Inverse hyperbolic cosine: 2**-17, as halves above 1 are not nearer than 2**-10."""
    if precise:
        return libdevice.acosh(x)
    else:
        h = 0.5 * x
        # Half the root is less than x / 2, which stays finite; where that is negative, the sum is.
        root = tl.minimum(tl.sqrt(h * h - 0.25), h, propagate_nan=tl.PropagateNan.ALL)
        return _log2(h + root) * LN2 + LN2


@jit
def atanh(x, precise):
    """Inverse hyperbolic tangent: 2**-19."""
    if precise:
        return libdevice.atanh(x)
    else:
        s = x * x
        near = ((0.1731247752904892 * s + 0.19774506986141205) * s + 0.3333800137042999) * s * x + x
        return tl.where(tl.abs(x) < 0.35, near, (_log2(1 + x) - _log2(1 - x)) * (0.5 * LN2))


@jit
def atan(x, precise):
    """The angle in [-pi/2, pi/2] whose tangent is ``x``: 2**-17."""
    if precise:
        return libdevice.atan(x)
    else:
        a = tl.abs(x)
        t = tl.minimum(a, _inverse(a), propagate_nan=tl.PropagateNan.ALL)
        s = t * t
        p = ((-0.013480938039720058 * s + 0.05747859925031662) * s - 0.12124035507440567) * s + 0.19563648104667664
        p = ((p * s - 0.3329946994781494) * s + 0.9999956488609314) * t
        return _signed(tl.where(a > 1, 1.5707963267948966 - p, p), x)


@jit
def _tail(a):
    """The probability that a standard normal number exceeds ``a >= 0``: 2**-21.5 absolute; 2**-16.5 up to 4.5, 2**-4 up to 9."""
    q = (
        (-1.5447187706740806e-07 * a + 2.1078915324324043e-06) * a + 2.2338015696732327e-05
    ) * a - 0.0007338863797485828
    q = ((q * a + 0.00798042118549347) * a - 0.053220100700855255) * a - 0.4589516222476959
    q = q * a - 1.1511340141296387
    return tl.exp2(q * a - 1)


@jit
def normal(x, precise):
    """The probability that a standard normal number is below ``x``: as :func:`_tail` where it is small."""
    if precise:
        return 0.5 * (1 + language.erf(x * 0.7071067811865476))
    else:
        tail = _tail(tl.abs(x))
        return tl.where(x > 0, 1 - tail, tail)


@jit
def density(x, precise):
    """The density of the normal distribution, ``exp(-x**2 / 2) / sqrt(2 pi)``: 2**-22 + 2**-24 ``x**2``."""
    if precise:
        return language.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        return tl.exp2(x * x * (-0.5 * LOG2E) - 1.3257480647361592)


@jit
def erf(x, precise):
    """Error function: 2**-22."""
    if precise:
        return language.erf(x)
    else:
        a = tl.abs(x)
        q = ((-0.0020580964628607035 * a + 0.024335699155926704) * a - 0.1367604285478592) * a - 0.9314578175544739
        far = _signed(1 - tl.exp2((q * a - 1.6210790872573853) * a - 0.0013973976019769907), x)
        s = x * x
        near = ((0.004158820025622845 * s - 0.026360243558883667) * s + 0.11273735016584396) * s - 0.3761192858219147
        return tl.where(a < 0.75, (near * s + 1.1283791065216064) * x, far)


@jit
def erfc(x, precise):
    """``1 - erf(x)``: 2**-16 where a float16 is not zero, 2**-13 below."""
    if precise:
        return libdevice.erfc(x)
    else:
        a = tl.abs(x)
        t = _inverse(a * 0.435 + 1)
        p = ((-0.1509053260087967 * t + 0.3810001611709595) * t + 0.013802091591060162) * t + 0.27252230048179626
        p = ((p * t + 0.2377038300037384) * t + 0.24587348103523254) * t
        # Larger by 2**24: the exponential of what would be subnormal is taken for zero.
        r = p * tl.exp2(24 - a * a * LOG2E) * 2.0**-24
        return tl.where(x < 0, 2 - r, r)


@jit
def pow(x, y, precise):
    """``x**y`` with C's special values: 2**-18 ``|y log2(x)|``, which is at most 24 (bfloat16: 133) where results are finite."""
    if precise:
        return language.pow(x, y)
    else:
        a = tl.abs(x)
        # Halves from 2**11 on are even. Adding 2**23 rounds to a whole number, whose parity is the last bit.
        b = tl.minimum(tl.abs(y), 4096.0, propagate_nan=tl.PropagateNan.ALL)
        near = b + 2.0**23
        whole = near - 2.0**23 == b
        # The logarithm of a negative base is NaN, as is a power of it that is not whole; but not of -inf.
        a = tl.where(whole | (a == float("inf")), a, x)
        r = tl.exp2(tl.where((a == 1) | (y == 0), 0.0, log2(a) * y))
        odd = tl.where(whole, near.to(tl.int32, bitcast=True) << 31, 0)
        return (r.to(tl.int32, bitcast=True) ^ (odd & x.to(tl.int32, bitcast=True))).to(tl.float32, bitcast=True)


@jit
def largest(x):
    """The largest of a block, NaN if one is: what a branch of the whole block asks."""
    if len(x.shape) == 0:
        return x
    else:
        return tl.reduce(x, None, language.maximum)


@jit
def _sine(x, half):
    """The sine, or with ``half`` the cosine, of ``|x| < 2**18``: 2**-22."""
    # The nearest whole number to x / pi + half, in the last bits of n; what is left of x is in [-pi/2, pi/2].
    if half:
        n = x * 0.31830987334251404 + 0.5 + 12582912.0
        m = n - 12582912.0 - 0.5
    else:
        n = x * 0.31830987334251404 + 12582912.0
        m = n - 12582912.0
    r = tl.math.fma(m, -1.5099580252808664e-07, tl.math.fma(m, -3.141592502593994, x))
    s = r * r
    p = (2.60539741248067e-06 * s - 0.00019809439254458994) * s + 0.008333064615726471
    r *= (p * s - 0.16666659712791443) * s + 1
    return (r.to(tl.int32, bitcast=True) ^ (n.to(tl.int32, bitcast=True) << 31)).to(tl.float32, bitcast=True)


@jit
def sin(x, precise):
    """Sine: 2**-22."""
    if precise:
        return libdevice.sin(x)
    else:
        # Large arguments take 80 instructions an element, which then run one by one. Few registers wait for the test.
        y = _sine(x, False)
        if not largest(tl.abs(x)) < 2.0**18:
            y = libdevice.sin(x)
        return y


@jit
def cos(x, precise):
    """Cosine: as :func:`sin`."""
    if precise:
        return libdevice.cos(x)
    else:
        y = _sine(x, True)
        if not largest(tl.abs(x)) < 2.0**18:
            y = libdevice.cos(x)
        return y


@jit
def hypot(x, y, precise):
    """``sqrt(x**2 + y**2)``: 2**-21."""
    if precise:
        return libdevice.hypot(x, y)
    else:
        most = tl.maximum(tl.abs(x), tl.abs(y))
        # The squares of bfloat16 numbers leave the range of float32.
        up = tl.where(most > 2.0**62, 2.0**-66, tl.where(most < 2.0**-50, 2.0**100, 1.0))
        back = tl.where(most > 2.0**62, 2.0**66, tl.where(most < 2.0**-50, 2.0**-100, 1.0))
        x *= up
        y *= up
        r = tl.sqrt(x * x + y * y) * back
        return tl.where((tl.abs(x) == float("inf")) | (tl.abs(y) == float("inf")), float("inf"), r)


@jit
def atan2(y, x, precise):
    """The angle of the point ``(x, y)``: 2**-17."""
    if precise:
        return libdevice.atan2(y, x)
    else:
        a = tl.abs(x)
        b = tl.abs(y)
        large = tl.maximum(a, b)
        small = tl.minimum(a, b)
        r = tl.where(large == 0, 0.0, tl.where(small == float("inf"), 1.0, small / large))
        s = r * r
        p = ((-0.013955074362456799 * s + 0.05877019464969635) * s - 0.12251497060060501) * s + 0.19618308544158936
        p = (p * s - 0.3330889940261841) * s * r + r
        p = tl.where(b > a, 1.5707963267948966 - p, p)
        p = tl.where(x.to(tl.int32, bitcast=True) < 0, 3.141592653589793 - p, p)
        return tl.where((x != x) | (y != y), x + y, _signed(p, y))


@jit
def i0e(a):
    """``exp(-a)`` times the modified Bessel function of order 0, of ``a >= 0`` of halves: 2**-17; 0 at inf."""
    # For large a, the root times a polynomial of its square; where a is small an exponential term, as the function has.
    v = tl.rsqrt(a + 2.0946359634399414)
    y = v * v
    q = ((10.220659255981445 * y + 0.8478679060935974) * y + 0.8872034549713135) * y + 0.466874361038208
    q = q * y + 0.39894452691078186
    p = (-2.1604249477386475 * y + 0.5562443733215332) * y + 0.22689838707447052
    return v * (p * tl.exp2(a * -2.297063410070875) + q)


@jit
def digamma(x):
    """The slope of lgamma, of halves: 2**-20, absolute where it is below 1, as the terms cancel."""
    # For x > 0 it is digamma(1 + x) - 1 / x; below, digamma(1 - x) - pi cot(pi g) with g the distance to the nearest integer.
    h = tl.abs(x) + 1.09
    r = _inverse(h)
    p = ((-0.002246432937681675 * r + 0.00875504594296217) * r - 0.020084209740161896) * r - 0.13228130340576172
    value = _log2(h) * LN2 + (p * r - 0.5900043845176697) * r
    n = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # Adding 1.5 * 2**23 rounds to a whole number; every half beyond is one.
    whole = (n + 12582912.0) - 12582912.0
    # Larger by 2**24, so that no reciprocal is of a subnormal number; of what then is inf none is needed.
    w = quotient(2.0**24, (x - whole) * 2.0**24)
    g = n - whole
    s = g * g
    p = ((-4.977752685546875 * s - 0.8905020356178284) * s - 2.191246509552002) * s - 2.020479202270508
    p = (p * s - 2.165112257003784) * s - 3.2898638248443604
    # What pi cot(pi g) has more than 1 / g: NaN where g is 0; nothing where x > 0.
    return value - tl.where(x < -0.5, s * w, n) * p - w


@jit
def lgamma(x, precise):
    """Logarithm of the absolute value of the gamma function: 2**-17; where ``x < 0``, of its terms."""
    if precise:
        return libdevice.lgamma(x)
    else:
        # For x < 0 it is log(pi / |sin(pi g)|) - lgamma(1 - x) with g the distance to the nearest integer; halves beyond -4096
        # are integers. Below 3/4 it is lgamma(1 + x) - log(x), so that the polynomial covers 3/4 to 9/4.
        n = tl.clamp(x, -4096.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        g = n - ((n + 12582912.0) - 12582912.0)
        z = tl.where(x > 0, x, 1 - x)
        w = tl.where(z < 0.75, z + 1, z)
        t = w - 1.5
        p = ((-0.005350147373974323 * t + 0.008465115912258625) * t - 0.00841247197240591) * t + 0.01561978179961443
        p = ((p * t - 0.031476717442274094) * t + 0.06305103749036789) * t - 0.145952507853508
        # At 1 it is 0, not -0.
        near = (p * t + 0.4831264019012451) * ((w - 1) * (w - 2)) + 0.0
        r = 1 / w
        far = (w - 0.5) * (_log2(w) * LN2 - 1) + (
            (-0.0025565631221979856 * r + 0.0841277465224266) * r + 0.4188589453697205
        )
        value = tl.where(w < 2.25, near, far)
        s = g * g
        sine = ((-0.1777423620223999 * s + 0.8096544146537781) * s - 1.6448242664337158) * s + 0.9999990463256836
        u = tl.where(x > 0, tl.where(z < 0.75, z, 1.0), tl.abs(g) * sine)
        low = u < NORMAL
        more = (_log2(tl.where(low, u * 2.0**24, u)) - tl.where(low, 24.0, 0.0)) * LN2
        return tl.where(x > 0, value, tl.where(g == 0, 0.0, -value)) - more
