"""Functions of two real numbers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise


@pointwise(aten="atan2")
def atan2(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The angle of the point ``(other, input)``, in [-pi, pi]. Source: ``torch.atan2``."""
    return torch.atan2(input, other)


@atan2.formula
@jit
def _(input, other, precise):
    return _fast.atan2(input, other, precise)


@atan2.gradient
@jit
def _(grad, input, other):
    square = input * input + other * other
    here = square != 0
    return grad * tl.where(here, language.div(other, square), 0), grad * tl.where(here, language.div(-input, square), 0)


atan2_ = atan2.inplace


@pointwise(aten="hypot")
def hypot(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``sqrt(input**2 + other**2)`` without overflow; infinite if either is. Source: ``torch.hypot``."""
    return torch.hypot(input, other)


@hypot.formula
@jit
def _(input, other, precise):
    return _fast.hypot(input, other, precise)


@hypot.gradient
@jit
def _(grad, input, other, out):
    return grad * language.div(input, out), grad * language.div(other, out)


hypot_ = hypot.inplace


@pointwise(aten="copysign.Tensor")
def copysign(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``abs(input)`` with the sign of ``other``, that of zeros and NaN included. Source: ``torch.copysign``."""
    return torch.copysign(input, other)


@copysign.formula
@jit
def _(input, other):
    return libdevice.copysign(input, other)


@copysign.gradient
@jit
def _(grad, input, out):
    return grad * tl.where(input == 0, 0, language.div(out, input)), tl.zeros_like(grad)


copysign_ = copysign.inplace


@pointwise(aten="fmax")
def fmax(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The larger of two; the other one if one is NaN. Equal elements give ``input`` the gradient. Source: ``torch.fmax``."""
    return torch.fmax(input, other)


@fmax.formula
@jit
def _(input, other):
    if input.dtype.is_floating():
        return tl.maximum(input, other)
    else:
        return tl.where(input >= other, input, other)


@fmax.gradient
@jit
def _(grad, input, other):
    first = (input >= other) | (other != other)
    return tl.where(first, grad, 0), tl.where(first, 0, grad)


@pointwise(aten="fmin")
def fmin(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The smaller of two; the other one if one is NaN. Equal elements give ``input`` the gradient. Source: ``torch.fmin``."""
    return torch.fmin(input, other)


@fmin.formula
@jit
def _(input, other):
    if input.dtype.is_floating():
        return tl.minimum(input, other)
    else:
        return tl.where(input <= other, input, other)


@fmin.gradient
@jit
def _(grad, input, other):
    first = (input <= other) | (other != other)
    return tl.where(first, grad, 0), tl.where(first, 0, grad)


@pointwise(aten="logaddexp")
def logaddexp(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``log(exp(input) + exp(other))`` without overflow. Source: ``torch.logaddexp``."""
    return torch.logaddexp(input, other)


@logaddexp.formula
@jit
def _(input, other, precise):
    most = language.maximum(input, other)
    # The difference of equal infinities is NaN.
    return tl.where(tl.abs(most) == float("inf"), most, most + _fast.log1p_exp(input - other, precise))


@logaddexp.gradient
@jit
def _(grad, input, other, precise):
    apart = input - other
    share = _fast.div(grad, 1 + _fast.exp(-apart, precise), precise)
    return share, _fast.div(grad, 1 + _fast.exp(apart, precise), precise)


@pointwise(aten="xlogy.Tensor")
def xlogy(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input * log(other)``; 0 where ``input`` is 0, unless ``other`` is NaN. Source: ``torch.xlogy``."""
    return torch.xlogy(input, other)  # type: ignore[arg-type]


@jit
def _xlogy(x, y):
    return tl.where(y != y, y, tl.where(x == 0, 0, x * language.log(y)))


@xlogy.formula
@jit
def _(input, other):
    return _xlogy(input, other)


@xlogy.gradient
@jit
def _(grad, input, other):
    slope = tl.where((input == 0) & (other <= 0), 0, _xlogy(grad, other))
    return slope, language.div(grad * input, other)


xlogy_ = xlogy.inplace
