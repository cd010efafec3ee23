"""Functions of angles, and the hyperbolic ones."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.language.extra import libdevice

from gemskit._jit import jit
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise


@pointwise(aten="sin")
def sin(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sine of radians; NaN at ±inf. Source: ``torch.sin``."""
    return torch.sin(input)


@sin.formula
@jit
def _(input, precise):
    return _fast.sin(input, precise)


@sin.gradient
@jit
def _(grad, input, precise):
    return grad * _fast.cos(input, precise)


sin_ = sin.inplace


@pointwise(aten="cos")
def cos(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Cosine of radians; NaN at ±inf. Source: ``torch.cos``."""
    return torch.cos(input)


@cos.formula
@jit
def _(input, precise):
    return _fast.cos(input, precise)


@cos.gradient
@jit
def _(grad, input, precise):
    return grad * -_fast.sin(input, precise)


cos_ = cos.inplace


@pointwise(aten="tan")
def tan(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Tangent of radians; NaN at ±inf. Source: ``torch.tan``."""
    return torch.tan(input)


@tan.formula
@jit
def _(input):
    return libdevice.tan(input)


@tan.gradient
@jit
def _(grad, out):
    return grad * (1 + out * out)


tan_ = tan.inplace


@pointwise(aten="asin")
def asin(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The angle in [-pi/2, pi/2] whose sine is ``input``; NaN outside of [-1, 1]. Source: ``torch.asin``."""
    return torch.asin(input)


@asin.formula
@jit
def _(input):
    return libdevice.asin(input)


@asin.gradient
@jit
def _(grad, input):
    # A product of exact differences: 1 - x * x loses all digits near 1.
    return grad * _fast.rsqrt((1 - input) * (1 + input))


asin_ = asin.inplace


@pointwise(aten="acos")
def acos(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The angle in [0, pi] whose cosine is ``input``; NaN outside of [-1, 1]. Source: ``torch.acos``."""
    return torch.acos(input)


@acos.formula
@jit
def _(input):
    return libdevice.acos(input)


@acos.gradient
@jit
def _(grad, input):
    return -grad * _fast.rsqrt((1 - input) * (1 + input))


acos_ = acos.inplace


@pointwise(aten="atan")
def atan(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The angle in [-pi/2, pi/2] whose tangent is ``input``. Source: ``torch.atan``."""
    return torch.atan(input)


@atan.formula
@jit
def _(input, precise):
    return _fast.atan(input, precise)


@atan.gradient
@jit
def _(grad, input, precise):
    return _fast.div(grad, input * input + 1, precise)


atan_ = atan.inplace


@pointwise(aten="sinh")
def sinh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Hyperbolic sine. Source: ``torch.sinh``."""
    return torch.sinh(input)


@sinh.formula
@jit
def _(input, precise):
    return _fast.sinh(input, precise)


@sinh.gradient
@jit
def _(grad, input):
    return grad * libdevice.cosh(input)


sinh_ = sinh.inplace


@pointwise(aten="cosh")
def cosh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Hyperbolic cosine. Source: ``torch.cosh``."""
    return torch.cosh(input)


@cosh.formula
@jit
def _(input):
    return libdevice.cosh(input)


@cosh.gradient
@jit
def _(grad, input):
    return grad * libdevice.sinh(input)


cosh_ = cosh.inplace


@jit
def _asinh(input, precise):
    return _fast.asinh(input, precise)


@jit
def _asinh_grad(grad, input):
    return grad * _fast.rsqrt(input * input + 1)


@pointwise(aten="asinh")
def asinh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inverse hyperbolic sine. Source: ``torch.asinh``."""
    return torch.asinh(input)


asinh.formula(_asinh)
asinh.gradient(_asinh_grad)
asinh_ = asinh.inplace


@pointwise(aten="arcsinh")
def arcsinh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Another name of :func:`asinh`. Source: ``torch.arcsinh``."""
    return torch.arcsinh(input)


arcsinh.formula(_asinh)
arcsinh.gradient(_asinh_grad)
arcsinh_ = arcsinh.inplace


@pointwise(aten="acosh")
def acosh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inverse hyperbolic cosine; NaN below 1. Source: ``torch.acosh``."""
    return torch.acosh(input)


@acosh.formula
@jit
def _(input, precise):
    return _fast.acosh(input, precise)


@acosh.gradient
@jit
def _(grad, input):
    return grad * _fast.rsqrt((input - 1) * (input + 1))


acosh_ = acosh.inplace


@jit
def _atanh(input, precise):
    return _fast.atanh(input, precise)


@jit
def _atanh_grad(grad, input, precise):
    return _fast.div(grad, (1 - input) * (1 + input), precise)


@pointwise(aten="atanh")
def atanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inverse hyperbolic tangent: ±inf at ±1, NaN beyond. Source: ``torch.atanh``."""
    return torch.atanh(input)


atanh.formula(_atanh)
atanh.gradient(_atanh_grad)
atanh_ = atanh.inplace


@pointwise(aten="arctanh")
def arctanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Another name of :func:`atanh`. Source: ``torch.arctanh``."""
    return torch.arctanh(input)


arctanh.formula(_atanh)
arctanh.gradient(_atanh_grad)
arctanh_ = arctanh.inplace
