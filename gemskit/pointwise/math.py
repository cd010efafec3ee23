"""Functions of one number."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit.pointwise._drive import pointwise


@pointwise(aten="exp")
def exp(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``e ** input``. Source: ``torch.exp``."""
    return torch.exp(input)


@exp.formula
@triton.jit
def _(input):
    return language.exp(input)


@exp.gradient
@triton.jit
def _(grad, out):
    return grad * out


exp_ = exp.inplace


@pointwise(aten="log")
def log(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Natural logarithm: -inf at 0, NaN below. Source: ``torch.log``."""
    return torch.log(input)


@log.formula
@triton.jit
def _(input):
    return language.log(input)


@log.gradient
@triton.jit
def _(grad, input):
    return language.div(grad, input)


log_ = log.inplace


@pointwise(aten="sqrt")
def sqrt(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Square root, correctly rounded; NaN below 0. Source: ``torch.sqrt``."""
    return torch.sqrt(input)


@sqrt.formula
@triton.jit
def _(input):
    return language.sqrt(input)


@sqrt.gradient
@triton.jit
def _(grad, out):
    return language.div(grad, 2 * out)


sqrt_ = sqrt.inplace


@pointwise(aten="rsqrt")
def rsqrt(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 / sqrt(input)``: ±inf at ±0, NaN below. Source: ``torch.rsqrt``."""
    return torch.rsqrt(input)


@rsqrt.formula
@triton.jit
def _(input):
    return libdevice.rsqrt(input)


@rsqrt.gradient
@triton.jit
def _(grad, out):
    return -0.5 * grad * (out * out * out)


rsqrt_ = rsqrt.inplace
