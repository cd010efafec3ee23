"""Sums, products, quotients and powers; choosing and limiting."""

from __future__ import annotations

from typing import Literal

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._dtypes import Number, Scalar
from gemskit._jit import jit
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise._whole import floor_div


@pointwise(aten="add.Tensor")
def add(input: Tensor | Scalar, other: Tensor | Scalar, *, alpha: Scalar = 1, out: Tensor | None = None) -> Tensor:
    """``input + alpha * other``. Source: ``torch.add``."""
    return torch.add(input, other, alpha=alpha)  # type: ignore[arg-type]


@add.formula
@jit
def _(input, other, alpha):
    return input + other * alpha


@add.gradient
@jit
def _(grad, alpha):
    return grad, grad * alpha


add_ = add.inplace


@pointwise(aten="sub.Tensor")
def sub(input: Tensor | Scalar, other: Tensor | Scalar, *, alpha: Scalar = 1, out: Tensor | None = None) -> Tensor:
    """``input - alpha * other``. Source: ``torch.sub``."""
    return torch.sub(input, other, alpha=alpha)  # type: ignore[arg-type]


@sub.formula
@jit
def _(input, other, alpha):
    return input - other * alpha


@sub.gradient
@jit
def _(grad, alpha):
    return grad, -grad * alpha


sub_ = sub.inplace
subtract, subtract_ = sub, sub_


def rsub(input: Tensor, other: Tensor | Scalar, *, alpha: Scalar = 1) -> Tensor:
    """``other - alpha * input``. Source: ``torch.rsub``."""
    return sub(other, input, alpha=alpha)


@pointwise(aten="mul.Tensor")
def mul(input: Tensor | Scalar, other: Tensor | Scalar, *, out: Tensor | None = None) -> Tensor:
    """``input * other``. Source: ``torch.mul``."""
    return torch.mul(input, other)  # type: ignore[arg-type]


@mul.formula
@jit
def _(input, other):
    return input * other


@mul.gradient
@jit
def _(grad, input, other):
    return grad * other, grad * input


mul_ = mul.inplace
multiply, multiply_ = mul, mul_


@pointwise(aten="div.Tensor")
def div(
    input: Tensor | Scalar, other: Tensor | Scalar, *, rounding_mode: Literal["trunc", "floor"] | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``input / other``, correctly rounded; or rounded toward zero (``"trunc"``) or down (``"floor"``).

    Without ``rounding_mode`` ints divide as floats. Floats divided by zero give inf or NaN. Ints divided by zero in a
    rounding mode: an error on CPU tensors and for a number 0; elements of an accelerator's tensor are undefined, as in torch.
    The gradient of both rounding modes is zero. Source: ``torch.div``.
    """
    return torch.div(input, other, rounding_mode=rounding_mode)  # type: ignore[arg-type]


@div.formula
@jit
def _(input, other, rounding_mode):
    if rounding_mode is None:
        return language.div(input, other)
    elif rounding_mode == "floor":
        return floor_div(input, other)
    elif other.dtype.is_floating():
        return libdevice.trunc(language.div(input, other))
    else:
        return input // other


@div.gradient
@jit
def _(grad, input, other, rounding_mode):
    if rounding_mode is None:
        return language.div(grad, other), -grad * language.div(language.div(input, other), other)
    else:
        return tl.zeros_like(grad), tl.zeros_like(grad)


div_ = div.inplace
divide, divide_ = div, div_
true_divide, true_divide_ = div, div_


@pointwise(aten="neg")
def neg(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``-input``. Source: ``torch.neg``."""
    return torch.neg(input)


@neg.formula
@jit
def _(input):
    # 0 - input would lose the sign of a zero.
    return input * -1 if input.dtype.is_floating() else 0 - input


@neg.gradient
@jit
def _(grad):
    return grad * -1


neg_ = neg.inplace


@jit
def _int_pow(base, exponent):
    """Squaring, modulo the type's range. A negative exponent gives 0, or ±1 for a base of ±1."""
    negative = exponent < 0
    left = exponent
    result = base * 0 + exponent * 0 + 1
    power = base * result
    for _ in range(base.dtype.primitive_bitwidth):
        result = tl.where((left & 1) != 0, result * power, result)
        power = power * power
        left = left >> 1
    sign = tl.where((exponent & 1) != 0, base, base * base)
    unit = (base * base == 1) & ((base == 1) | (base + 1 == 0))
    return tl.where(negative, tl.where(unit, sign, base * 0), result)


@jit
def _number_pow(base, exponent, precise: tl.constexpr):
    """``base ** exponent`` where the exponent is one number: torch takes roots and products for these."""
    result = base
    if exponent == 2:
        result = base * base
    elif exponent == 0.5:
        result = language.sqrt(base)
    elif exponent == -0.5:
        result = libdevice.rsqrt(base)
    else:
        result = _fast.pow(base, exponent, precise)
    return result


@jit
def _pow(base, exponent, precise: tl.constexpr):
    if not exponent.dtype.is_floating():
        return _int_pow(base, exponent)
    elif len(exponent.shape) == 0:
        return _number_pow(base, exponent, precise)
    else:
        return _fast.pow(base, exponent, precise)


@pointwise(aten="pow.Tensor_Tensor")
def pow(input: Tensor | Number, exponent: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input ** exponent``. Ints are exact and wrap around; a tensor of ints refuses a negative number as exponent.

    The gradient with respect to ``input`` is 0 where ``exponent`` is 0, and with respect to ``exponent`` where ``input`` is 0
    and ``exponent`` is not negative. Source: ``torch.pow``.
    """
    if not isinstance(exponent, bool):
        return torch.pow(input, exponent)  # type: ignore[arg-type]
    # torch takes True as a bool, but as an int on meta.
    result = torch.pow(input, int(exponent))  # type: ignore[arg-type]
    return result.bool() if isinstance(input, Tensor) and input.dtype == torch.bool else result


@pow.formula
@jit
def _(input, exponent, precise):
    return _pow(input, exponent, precise)


@pow.gradient
@jit
def _(grad, input, exponent, out, precise):
    slope = tl.where(exponent == 0, 0, grad * (exponent * _pow(input, exponent - 1, precise)))
    return slope, tl.where((input == 0) & (exponent >= 0), 0, grad * (out * _fast.log(input, precise)))


pow_ = pow.inplace


@pointwise(aten="where.self", keep=("condition",))
def where(condition: Tensor, input: Tensor | Scalar, other: Tensor | Scalar, *, out: Tensor | None = None) -> Tensor:
    """``input`` where the bool tensor ``condition`` is true, else ``other``. Source: ``torch.where``."""
    return torch.where(condition, input, other)


@where.formula
@jit
def _(condition, input, other):
    return tl.where(condition, input, other)


@where.gradient
@jit
def _(grad, condition):
    return tl.where(condition, grad, 0), tl.where(condition, 0, grad)


@jit
def at_least(x, bound):
    """``x``, or ``bound`` where that is larger; NaN if either is. A zero keeps its sign where the bound is the other zero."""
    larger = tl.where(x < bound, bound, x)
    # A product is cheaper than a second condition.
    return larger * tl.where(bound == bound, 1.0, bound) if bound.dtype.is_floating() else larger


@jit
def at_most(x, bound):
    """``x``, or ``bound`` where that is smaller; otherwise as :func:`at_least`."""
    smaller = tl.where(x > bound, bound, x)
    return smaller * tl.where(bound == bound, 1.0, bound) if bound.dtype.is_floating() else smaller


@pointwise(aten="clamp", rounds=True)
def clamp(
    input: Tensor, min: Tensor | Number | None = None, max: Tensor | Number | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``input`` limited to ``[min, max]``, both numbers or both tensors; ``max`` where ``min > max``.

    NaN, in the input or as a bound, gives NaN. The gradient passes on the bounds themselves. Source: ``torch.clamp``.
    """
    return torch.clamp(input, min, max)  # type: ignore[arg-type]


@clamp.formula
@jit
def _(input, min, max):
    if min is not None:
        input = at_least(input, min)
    if max is not None:
        input = at_most(input, max)
    return input


@clamp.gradient
@jit
def _(grad, input, min, max):
    inside = input == input
    below = input != input
    above = below
    if min is not None:
        inside = inside & (input >= min)
        below = input < min
    if max is not None:
        inside = inside & (input <= max)
        above = input > max
    if min is not None and max is not None:
        below = below & (min < max)
        above = above | (max < min)
    return tl.where(inside, grad, 0), tl.where(below, grad, 0), tl.where(above, grad, 0)


clamp_ = clamp.inplace


@pointwise(aten="maximum")
def maximum(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The larger of two, NaN if either is. Equal elements share the gradient. Source: ``torch.maximum``."""
    return torch.maximum(input, other)


@maximum.formula
@jit
def _(input, other):
    return language.maximum(input, other)


@maximum.gradient
@jit
def _(grad, input, other):
    shared = tl.where(input == other, grad / 2, grad)
    return tl.where(input < other, 0, shared), tl.where(input > other, 0, shared)


@pointwise(aten="minimum")
def minimum(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The smaller of two, NaN if either is. Equal elements share the gradient. Source: ``torch.minimum``."""
    return torch.minimum(input, other)


@minimum.formula
@jit
def _(input, other):
    return language.minimum(input, other)


@minimum.gradient
@jit
def _(grad, input, other):
    shared = tl.where(input == other, grad / 2, grad)
    return tl.where(input > other, 0, shared), tl.where(input < other, 0, shared)
