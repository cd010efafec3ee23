"""Exponentials, logarithms, powers, magnitude."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit._jit import jit
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise

# -- exponentials ------------------------------------------------------------------------------------------------------


@pointwise(aten="exp")
def exp(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``e ** input``. Source: ``torch.exp``."""
    return torch.exp(input)


@exp.formula
@jit
def _(input, precise):
    return _fast.exp(input, precise)


@exp.gradient
@jit
def _(grad, out):
    return grad * out


exp_ = exp.inplace


@pointwise(aten="exp2")
def exp2(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``2 ** input``. Source: ``torch.exp2``."""
    return torch.exp2(input)


@exp2.formula
@jit
def _(input):
    return _fast.exp2(input)


@exp2.gradient
@jit
def _(grad, out):
    return grad * out * 0.6931471805599453


exp2_ = exp2.inplace


@pointwise(aten="expm1")
def expm1(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``e ** input - 1``, exact for small numbers too. Source: ``torch.expm1``."""
    return torch.expm1(input)


@expm1.formula
@jit
def _(input, precise):
    return _fast.expm1(input, precise)


@expm1.gradient
@jit
def _(grad, out):
    return grad * (out + 1)


expm1_ = expm1.inplace

# -- logarithms --------------------------------------------------------------------------------------------------------


@pointwise(aten="log")
def log(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Natural logarithm: -inf at 0, NaN below. Source: ``torch.log``."""
    return torch.log(input)


@log.formula
@jit
def _(input, precise):
    return _fast.log(input, precise)


@log.gradient
@jit
def _(grad, input, precise):
    return _fast.div(grad, input, precise)


log_ = log.inplace


@pointwise(aten="log2")
def log2(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Logarithm to base 2: -inf at 0, NaN below. Source: ``torch.log2``."""
    return torch.log2(input)


@log2.formula
@jit
def _(input, precise):
    if precise:
        return libdevice.log2(input)
    else:
        return _fast.log2(input)


@log2.gradient
@jit
def _(grad, input, precise):
    return _fast.div(grad, input * 0.6931471805599453, precise)


log2_ = log2.inplace


@pointwise(aten="log10")
def log10(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Logarithm to base 10: -inf at 0, NaN below. Source: ``torch.log10``."""
    return torch.log10(input)


@log10.formula
@jit
def _(input, precise):
    if precise:
        return libdevice.log10(input)
    else:
        return _fast.log(input, precise) * 0.4342944819032518


@log10.gradient
@jit
def _(grad, input, precise):
    return _fast.div(grad, input * 2.302585092994046, precise)


log10_ = log10.inplace


@pointwise(aten="log1p")
def log1p(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``log(1 + input)``, exact for small numbers too; -inf at -1, NaN below. Source: ``torch.log1p``."""
    return torch.log1p(input)


@log1p.formula
@jit
def _(input, precise):
    return _fast.log1p(input, precise)


@log1p.gradient
@jit
def _(grad, input, precise):
    return _fast.div(grad, input + 1, precise)


log1p_ = log1p.inplace


@pointwise(aten="logit")
def logit(input: Tensor, eps: float | None = None, *, out: Tensor | None = None) -> Tensor:
    """``log(input / (1 - input))`` of ``input`` limited to ``[eps, 1 - eps]``; without ``eps`` NaN outside of [0, 1].

    Source: ``torch.logit``.
    """
    return torch.logit(input, eps)


@logit.formula
@jit
def _(input, eps, precise):
    if eps is not None:
        high = tl.where(eps < 0, float("inf"), 1 - eps)
        low = tl.where(eps < 0, -float("inf"), eps)
        input = tl.where(input < low, low, tl.where(input > high, high, input))
    return _fast.log(_fast.div(input, 1 - input, precise), precise)


@jit
def logit_slope(grad, input, eps, precise):
    """The gradient of :func:`logit`: zero where ``input`` was limited, NaN where it has no logit."""
    slope = _fast.div(grad, input * (1 - input), precise)
    if eps is None:
        return tl.where((input < 0) | (input > 1), float("nan"), slope)
    else:
        outside = tl.where(eps < 0, float("nan"), 0.0)
        low = tl.where(eps < 0, 0.0, eps)
        return tl.where((input < low) | (input > 1 - low), outside, slope)


@logit.gradient
@jit
def _(grad, input, eps, precise):
    return logit_slope(grad, input, eps, precise)


logit_ = logit.inplace

# -- powers ------------------------------------------------------------------------------------------------------------


@pointwise(aten="sqrt")
def sqrt(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Square root, correctly rounded (float16: nearly always); NaN below 0. Source: ``torch.sqrt``."""
    return torch.sqrt(input)


@sqrt.formula
@jit
def _(input, precise):
    return _fast.sqrt(input, precise)


@sqrt.gradient
@jit
def _(grad, out, precise):
    return _fast.div(grad, 2 * out, precise)


sqrt_ = sqrt.inplace


@pointwise(aten="rsqrt")
def rsqrt(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 / sqrt(input)``: ±inf at ±0, NaN below. Source: ``torch.rsqrt``."""
    return torch.rsqrt(input)


@rsqrt.formula
@jit
def _(input):
    return _fast.rsqrt(input)


@rsqrt.gradient
@jit
def _(grad, out):
    return -0.5 * grad * (out * out * out)


rsqrt_ = rsqrt.inplace


@pointwise(aten="reciprocal")
def reciprocal(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 / input``, of ints as floats: ±inf at ±0. Source: ``torch.reciprocal``."""
    return torch.reciprocal(input)


@reciprocal.formula
@jit
def _(input, precise):
    return _fast.div(tl.full(input.shape, 1, input.dtype), input, precise)


@reciprocal.gradient
@jit
def _(grad, out):
    return -grad * (out * out)


reciprocal_ = reciprocal.inplace


@pointwise(aten="square")
def square(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input * input``. Source: ``torch.square``."""
    return torch.square(input)


@square.formula
@jit
def _(input):
    return input * input


@square.gradient
@jit
def _(grad, input):
    return grad * (2 * input)


square_ = square.inplace

# -- magnitude ---------------------------------------------------------------------------------------------------------


@jit
def _abs(input):
    return tl.abs(input)


@jit
def _abs_grad(grad, input):
    return tl.where(input > 0, grad, tl.where(input < 0, -grad, 0))


@pointwise(aten="abs")
def abs(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Absolute value; the gradient at 0 is 0. Source: ``torch.abs``."""
    return torch.abs(input)


abs.formula(_abs)
abs.gradient(_abs_grad)
abs_ = abs.inplace


@pointwise(aten="absolute")
def absolute(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Another name of :func:`abs`. Source: ``torch.absolute``."""
    return torch.absolute(input)


absolute.formula(_abs)
absolute.gradient(_abs_grad)
absolute_ = absolute.inplace


@pointwise(aten="angle")
def angle(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The angle in the complex plane: pi below 0, else 0; NaN stays. The gradient is zero. Source: ``torch.angle``."""
    return torch.angle(input)


@angle.formula
@jit
def _(input):
    pi = tl.full(input.shape, 3.141592653589793, input.dtype)
    return tl.where(input != input, input, tl.where(input < 0, pi, 0))


@angle.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


@pointwise(aten="nan_to_num")
def nan_to_num(
    input: Tensor, nan: float | None = 0.0, posinf: float | None = None, neginf: float | None = None, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``nan``, ``posinf`` and ``neginf`` in place of these; None is 0, and the largest and lowest number of the dtype.

    Source: ``torch.nan_to_num``.
    """
    return torch.nan_to_num(input, nan, posinf, neginf)


@jit
def _largest(via: tl.constexpr):
    if via == "fp16":
        return 65504.0
    elif via == "bf16":
        return 3.3895313892515355e38
    elif via == "fp32":
        return 3.4028234663852886e38
    else:
        return 1.7976931348623157e308


@nan_to_num.formula
@jit
def _(input, nan, posinf, neginf, via):
    if not input.dtype.is_floating():
        return input
    else:
        above = _largest(via) if posinf is None else posinf
        below = -_largest(via) if neginf is None else neginf
        result = tl.where(input == float("inf"), above, tl.where(input == -float("inf"), below, input))
        return tl.where(input != input, 0.0 if nan is None else nan, result)


@nan_to_num.gradient
@jit
def _(grad, input):
    return tl.where(tl.abs(input) < float("inf"), grad, 0)


nan_to_num_ = nan_to_num.inplace
