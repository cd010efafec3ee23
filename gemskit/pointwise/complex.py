"""Complex numbers: formulas of their parts for the operators that take them, and what belongs to them alone.

complex64 and complex128 are read and written as float32 and float64 in memory. Products, quotients and functions of infinite
or NaN parts follow the textbook formulas, as torch's kernels do, not C's annex G.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise.arithmetic import add, div, mul, neg, sub, where
from gemskit.pointwise.compare import eq, ne
from gemskit.pointwise.copying import _clone
from gemskit.pointwise.math import abs, absolute, angle, exp, log, reciprocal, sqrt


@jit
def _mul(a, b, c, d):
    return a * c - b * d, a * d + b * c


@jit
def _mul_conj(a, b, c, d):
    """``(a + bi) * conj(c + di)``: a gradient times a slope."""
    return a * c + b * d, b * c - a * d


@jit
def _div(a, b, c, d):
    """``(a + bi) / (c + di)``, by the larger part of the divisor, whose square may overflow (Smith 1962)."""
    flat = tl.abs(c) >= tl.abs(d)
    large = tl.where(flat, c, d)
    small = tl.where(flat, d, c)
    ratio = tl.where(large == 0, small, language.div(small, large))
    scale = large + small * ratio
    re = tl.where(flat, a + b * ratio, a * ratio + b)
    im = tl.where(flat, b - a * ratio, b * ratio - a)
    # Divided by zero the parts are infinite or NaN, whatever the sign of the zero.
    scale = tl.where(large == 0, 0.0, scale)
    return language.div(re, scale), language.div(im, scale)


# -- arithmetic -----------------------------------------------------------------------------------------------------------


@add.complex_formula
@jit
def _(input_re, input_im, other_re, other_im, alpha_re, alpha_im):
    re, im = _mul(other_re, other_im, alpha_re, alpha_im)
    return input_re + re, input_im + im


@add.complex_gradient
@jit
def _(grad_re, grad_im, alpha_re, alpha_im):
    re, im = _mul_conj(grad_re, grad_im, alpha_re, alpha_im)
    return grad_re, grad_im, re, im


@sub.complex_formula
@jit
def _(input_re, input_im, other_re, other_im, alpha_re, alpha_im):
    re, im = _mul(other_re, other_im, alpha_re, alpha_im)
    return input_re - re, input_im - im


@sub.complex_gradient
@jit
def _(grad_re, grad_im, alpha_re, alpha_im):
    re, im = _mul_conj(grad_re, grad_im, alpha_re, alpha_im)
    return grad_re, grad_im, -re, -im


@mul.complex_formula
@jit
def _(input_re, input_im, other_re, other_im):
    return _mul(input_re, input_im, other_re, other_im)


@mul.complex_gradient
@jit
def _(grad_re, grad_im, input_re, input_im, other_re, other_im):
    re, im = _mul_conj(grad_re, grad_im, other_re, other_im)
    other, other_i = _mul_conj(grad_re, grad_im, input_re, input_im)
    return re, im, other, other_i


@div.complex_formula
@jit
def _(input_re, input_im, other_re, other_im):
    return _div(input_re, input_im, other_re, other_im)


@div.complex_gradient
@jit
def _(grad_re, grad_im, input_re, input_im, other_re, other_im):
    re, im = _div(grad_re, grad_im, other_re, -other_im)
    q, q_i = _div(input_re, input_im, other_re, other_im)
    slope, slope_i = _mul_conj(re, im, q, q_i)
    return re, im, -slope, -slope_i


@neg.complex_formula
@jit
def _(input_re, input_im):
    return input_re * -1, input_im * -1


@neg.complex_gradient
@jit
def _(grad_re, grad_im):
    return grad_re * -1, grad_im * -1


@where.complex_formula
@jit
def _(condition, input_re, input_im, other_re, other_im):
    return tl.where(condition, input_re, other_re), tl.where(condition, input_im, other_im)


@where.complex_gradient
@jit
def _(grad_re, grad_im, condition):
    return (
        tl.where(condition, grad_re, 0), tl.where(condition, grad_im, 0),
        tl.where(condition, 0, grad_re), tl.where(condition, 0, grad_im),
    )  # fmt: skip


@eq.complex_formula
@jit
def _(input_re, input_im, other_re, other_im):
    return (input_re == other_re) & (input_im == other_im)


@ne.complex_formula
@jit
def _(input_re, input_im, other_re, other_im):
    return (input_re != other_re) | (input_im != other_im)


# -- functions ------------------------------------------------------------------------------------------------------------


@exp.complex_formula
@jit
def _(input_re, input_im):
    # In two factors, as a small cosine may bring back what overflows.
    half = language.exp(tl.where(tl.abs(input_re) > 80, input_re * 0.5, input_re))
    rest = tl.where(tl.abs(input_re) > 80, half, 1.0)
    re = half * libdevice.cos(input_im) * rest
    # exp(x + 0i) is real, at infinity too.
    im = tl.where(input_im == 0, input_im, half * libdevice.sin(input_im) * rest)
    return tl.where(input_im == 0, half * rest, re), im


@exp.complex_gradient
@jit
def _(grad_re, grad_im, out_re, out_im):
    return _mul_conj(grad_re, grad_im, out_re, out_im)


@log.complex_formula
@jit
def _(input_re, input_im):
    return language.log(libdevice.hypot(input_re, input_im)), libdevice.atan2(input_im, input_re)


@log.complex_gradient
@jit
def _(grad_re, grad_im, input_re, input_im):
    return _div(grad_re, grad_im, input_re, -input_im)


@sqrt.complex_formula
@jit
def _(input_re, input_im):
    size = tl.abs(input_re)
    long = language.sqrt(0.5 * libdevice.hypot(input_re, input_im) + 0.5 * size)
    short = tl.where(long == 0, long, language.div(tl.abs(input_im), 2 * long))
    away = tl.abs(input_im) == float("inf")
    long = tl.where(away, float("inf"), long)
    short = tl.where(away, float("inf"), short)
    re = tl.where(input_re >= 0, long, short)
    im = tl.where(input_re >= 0, short, long)
    nan = (input_re != input_re) & ~away
    return tl.where(nan, input_re, re), libdevice.copysign(tl.where(nan, input_re, im), input_im)


@sqrt.complex_gradient
@jit
def _(grad_re, grad_im, out_re, out_im):
    return _div(grad_re, grad_im, 2 * out_re, -2 * out_im)


@reciprocal.complex_formula
@jit
def _(input_re, input_im):
    one = tl.full(input_re.shape, 1, input_re.dtype)
    return _div(one, one * 0, input_re, input_im)


@reciprocal.complex_gradient
@jit
def _(grad_re, grad_im, out_re, out_im):
    re, im = _mul(out_re, out_im, out_re, out_im)
    slope, slope_i = _mul_conj(grad_re, grad_im, re, im)
    return -slope, -slope_i


@jit
def _size(input_re, input_im):
    return libdevice.hypot(input_re, input_im)


@jit
def _size_grad(grad_re, input_re, input_im):
    size = libdevice.hypot(input_re, input_im)
    re = language.div(input_re, size)
    im = language.div(input_im, size)
    return tl.where(size == 0, 0, grad_re * re), tl.where(size == 0, 0, grad_re * im)


for _op in (abs, absolute):
    _op.complex_formula(_size)
    _op.complex_gradient(_size_grad)


@angle.complex_formula
@jit
def _(input_re, input_im):
    return libdevice.atan2(input_im, input_re)


@angle.complex_gradient
@jit
def _(grad_re, input_re, input_im):
    square = input_re * input_re + input_im * input_im
    re = language.div(-input_im, square)
    im = language.div(input_re, square)
    return tl.where(square == 0, 0, grad_re * re), tl.where(square == 0, 0, grad_re * im)


@_clone.complex_formula
@jit
def _(input_re, input_im):
    return input_re, input_im


@_clone.complex_gradient
@jit
def _(grad_re, grad_im):
    return grad_re, grad_im


@pointwise(aten="polar", floats=("abs", "angle"))
def polar(abs: Tensor, angle: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``abs * (cos(angle) + i sin(angle))``, complex, of two float32 or two float64 tensors. Source: ``torch.polar``."""
    return torch.polar(abs, angle)


@polar.complex_formula
@jit
def _(abs_re, angle_re):
    return abs_re * libdevice.cos(angle_re), abs_re * libdevice.sin(angle_re)


@polar.complex_gradient
@jit
def _(grad_re, grad_im, abs_re, angle_re):
    c = libdevice.cos(angle_re)
    s = libdevice.sin(angle_re)
    # torch multiplies by the sign of the result, so that a negative size turns the gradient round.
    sign = tl.where(abs_re == 0, 0.0, tl.where(abs_re < 0, -1.0, 1.0))
    return sign * (grad_re * c + grad_im * s), 0.0, abs_re * (grad_im * c - grad_re * s), 0.0


# -- conjugates and parts -------------------------------------------------------------------------------------------------


@pointwise(aten="conj_physical")
def conj_physical(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The conjugate, in memory of its own (see :func:`conj`). Source: ``torch.conj_physical``."""
    return torch.conj_physical(input)


@conj_physical.formula
@jit
def _(input):
    return input


@conj_physical.gradient
@jit
def _(grad):
    return grad


@conj_physical.complex_formula
@jit
def _(input_re, input_im):
    return input_re, input_im * -1


@conj_physical.complex_gradient
@jit
def _(grad_re, grad_im):
    return grad_re, grad_im * -1


conj_physical_ = conj_physical.inplace


def conj(input: Tensor) -> Tensor:
    """The conjugate as a view: nothing is computed before it is read. A real tensor is itself. Source: ``torch.conj``."""
    return torch.conj(input)


def resolve_conj(input: Tensor) -> Tensor:
    """``input``, or a copy where it is a view that :func:`conj` made. Source: ``torch.resolve_conj``."""
    return conj_physical(input.conj()) if input.is_conj() else input


def resolve_neg(input: Tensor) -> Tensor:
    """``input``, or a copy where it is a negated view, such as ``imag(conj(z))``. Source: ``torch.resolve_neg``."""
    return neg(torch._neg_view(input)) if input.is_neg() else input


def real(input: Tensor) -> Tensor:
    """The real part, a view; a real tensor is itself. Source: ``torch.real``."""
    return torch.real(input)


def imag(input: Tensor) -> Tensor:
    """The imaginary part of a complex tensor, a view. Source: ``torch.imag``."""
    return torch.imag(input)
