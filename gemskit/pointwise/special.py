"""Error functions, gamma functions, modified Bessel functions."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise

# -- error functions ---------------------------------------------------------------------------------------------------


@pointwise(aten="erf")
def erf(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Error function, ``2 / sqrt(pi)`` times the integral of ``exp(-t**2)`` from 0 to ``input``. Source: ``torch.erf``."""
    return torch.erf(input)


@erf.formula
@jit
def _(input, precise):
    return _fast.erf(input, precise)


@jit
def _bell(x, precise):
    """``2 / sqrt(pi) exp(-x**2)``, the slope of erf."""
    return 1.1283791670955126 * _fast.exp(-x * x, precise)


@erf.gradient
@jit
def _(grad, input, precise):
    return grad * _bell(input, precise)


erf_ = erf.inplace


@pointwise(aten="erfc")
def erfc(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 - erf(input)``, exact where it is small. Source: ``torch.erfc``."""
    return torch.erfc(input)


@erfc.formula
@jit
def _(input, precise):
    return _fast.erfc(input, precise)


@erfc.gradient
@jit
def _(grad, input, precise):
    return -grad * _bell(input, precise)


erfc_ = erfc.inplace


@pointwise(aten="erfinv")
def erfinv(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The number whose error function is ``input``: ±inf at ±1, NaN beyond. Source: ``torch.erfinv``."""
    return torch.erfinv(input)


@erfinv.formula
@jit
def _(input):
    return libdevice.erfinv(input)


@erfinv.gradient
@jit
def _(grad, out):
    return grad * (0.886226925452758 * language.exp(out * out))


erfinv_ = erfinv.inplace

# -- gamma functions ---------------------------------------------------------------------------------------------------


@jit
def _digamma(x, precise):
    if precise:
        return _precise_digamma(x)
    else:
        return _fast.digamma(x)


@jit
def _precise_digamma(x):
    """By reflection, by recurrence up to 10, then the asymptotic series."""
    y = tl.where(x < 0, 1 - x, x)
    total = tl.zeros_like(y)
    for _ in tl.static_range(10):
        small = y < 10
        total -= tl.where(small, language.div(tl.full(y.shape, 1, y.dtype), y), 0)
        y = tl.where(small, y + 1, y)
    inverse = language.div(tl.full(y.shape, 1, y.dtype), y)
    s = inverse * inverse
    p = ((s / 12 - 0.021092796092796094) * s + 0.007575757575757576) * s - 0.004166666666666667
    p = ((p * s + 0.003968253968253968) * s - 0.008333333333333333) * s + 0.08333333333333333
    value = total + language.log(y) - 0.5 * inverse - p * s
    # float32 by the distance to the nearest integer, which is exact; float64 as torch, whose tangents are of up to pi.
    apart = x - (libdevice.trunc(x) if x.dtype == tl.float64 else libdevice.nearbyint(x))
    turned = language.div(tl.full(y.shape, 3.141592653589793, y.dtype), libdevice.tan(3.141592653589793 * apart))
    value = tl.where(x < 0, tl.where(apart == 0, float("nan"), value - turned), value)
    # Not copysign(inf, -x): -0.0 of an int that became 0.0 may be folded to 0.0.
    return tl.where(x == 0, -libdevice.copysign(tl.full(x.shape, float("inf"), x.dtype), x), value)


@jit
def _trigamma(x):
    """The slope of digamma: by reflection, six steps of recurrence, and four terms of the series, as torch's."""
    one = tl.full(x.shape, 1, x.dtype)
    low = x < 0.5
    sine = libdevice.sin(3.141592653589793 * x)
    y = tl.where(low, 1 - x, x)
    total = tl.where(low, -language.div(9.869604401089358 * one, sine * sine), 0)
    for _ in tl.static_range(6):
        total += language.div(one, y * y)
        y += 1
    s = language.div(one, y * y)
    total += language.div(1 + 0.5 * language.div(one, y) + s * (1 / 6 - s * (1 / 30 - s * (1 / 42))), y)
    return tl.where(low, -total, total)


@pointwise(aten="digamma")
def digamma(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The slope of :func:`lgamma`: ∓inf at ±0, NaN at negative integers. Source: ``torch.digamma``."""
    return torch.digamma(input)


@digamma.formula
@jit
def _(input, precise):
    return _digamma(input, precise)


@digamma.gradient
@jit
def _(grad, input):
    return grad * _trigamma(input)


digamma_ = digamma.inplace


@pointwise(aten="lgamma")
def lgamma(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Logarithm of the absolute value of the gamma function; inf at 0 and negative integers. Source: ``torch.lgamma``."""
    return torch.lgamma(input)


@lgamma.formula
@jit
def _(input, precise):
    return _fast.lgamma(input, precise)


@lgamma.gradient
@jit
def _(grad, input, precise):
    return grad * _digamma(input, precise)


lgamma_ = lgamma.inplace

# -- modified Bessel functions -----------------------------------------------------------------------------------------


@jit
def _finite(x, value):
    """``value``, but NaN at ±inf, as torch."""
    return tl.where(tl.abs(x) == float("inf"), float("nan"), value)


@jit
def _scaled(a, near, order: tl.constexpr):
    """``exp(-a)`` times the function of this order of ``a >= 0``: ``near`` up to 60, beyond its asymptotic series."""
    q = language.div(tl.full(a.shape, 0.125, a.dtype), a)
    term = a * 0 + 1
    total = term
    for k in tl.static_range(1, 13):
        term = term * q * (((2 * k - 1) * (2 * k - 1) - 4 * order) / k)
        total += term
    far = language.div(total, language.sqrt(6.283185307179586 * a))
    # a * 0 is NaN at inf, where the series is 1.
    far = tl.where(a == float("inf"), 0, far)
    return tl.where(a < 60, near * language.exp(-a), far)


@pointwise(aten="i0")
def i0(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Modified Bessel function of the first kind, order 0; NaN at ±inf. Source: ``torch.i0``."""
    return torch.i0(input)


@i0.formula
@jit
def _(input):
    return _finite(input, libdevice.cyl_bessel_i0(input))


@i0.gradient
@jit
def _(grad, input):
    return grad * _finite(input, libdevice.cyl_bessel_i1(input))


i0_ = i0.inplace


@pointwise(aten="special_i0e")
def special_i0e(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``exp(-|input|) * i0(input)``. Source: ``torch.special.i0e``."""
    return torch.special.i0e(input)  # type: ignore[no-any-return]


@special_i0e.formula
@jit
def _(input, precise):
    a = tl.abs(input)
    if precise:
        return _scaled(a, libdevice.cyl_bessel_i0(tl.where(a < 60, a, 60.0)), 0)
    else:
        return _fast.i0e(a)


@special_i0e.gradient
@jit
def _(grad, input, out):
    a = tl.abs(input)
    slope = _scaled(a, libdevice.cyl_bessel_i1(tl.where(a < 60, a, 60.0)), 1) - out
    return grad * tl.where(input < 0, -slope, tl.where(input == 0, 0, slope))


@pointwise(aten="special_i1")
def special_i1(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Modified Bessel function of the first kind, order 1; NaN at ±inf. Source: ``torch.special.i1``."""
    return torch.special.i1(input)  # type: ignore[no-any-return]


@special_i1.formula
@jit
def _(input):
    return _finite(input, libdevice.cyl_bessel_i1(input))


@special_i1.gradient
@jit
def _(grad, input, out):
    # Where the quotient says nothing the slope is 1 / 2; for NaN too, as torch.
    slope = _finite(input, libdevice.cyl_bessel_i0(input) - language.div(out, input))
    return grad * tl.where(tl.abs(input) > 1e-8, slope, 0.5)
