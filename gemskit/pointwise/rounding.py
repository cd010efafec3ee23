"""Roundings and signs."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise._drive import pointwise


@pointwise(aten="floor")
def floor(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The largest integer that is no larger; ints stay. The gradient is zero. Source: ``torch.floor``."""
    return torch.floor(input)


@floor.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return libdevice.floor(input)
    else:
        return input


@floor.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


floor_ = floor.inplace


@pointwise(aten="ceil")
def ceil(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The least integer that is no less; ints stay. The gradient is zero. Source: ``torch.ceil``."""
    return torch.ceil(input)


@ceil.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return libdevice.ceil(input)
    else:
        return input


@ceil.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


ceil_ = ceil.inplace


@pointwise(aten="trunc")
def trunc(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The integer part, toward zero; ints stay. The gradient is zero. Source: ``torch.trunc``."""
    return torch.trunc(input)


@trunc.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return libdevice.trunc(input)
    else:
        return input


@trunc.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


trunc_ = trunc.inplace


@pointwise(aten="frac")
def frac(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The part behind the point, ``input - trunc(input)``; NaN at ±inf. Source: ``torch.frac``."""
    return torch.frac(input)


@frac.formula
@jit
def _(input):
    return input - libdevice.trunc(input)


@frac.gradient
@jit
def _(grad):
    return grad


frac_ = frac.inplace


@pointwise(aten="round.decimals")
def round(input: Tensor, *, decimals: int = 0, out: Tensor | None = None) -> Tensor:
    """To the nearest integer, halves to the even one, or to so many ``decimals`` (negative: to tens, hundreds ..); ints stay.

    The gradient is zero. Source: ``torch.round``.
    """
    # torch takes ints without decimals only.
    return torch.round(input, decimals=decimals) if decimals else torch.round(input)


@round.formula
@jit
def _(input, decimals):
    result = input
    if input.dtype.is_floating():
        if decimals == 0:
            result = libdevice.nearbyint(input)
        else:
            ten = decimals * 0 + 1
            for _ in range(tl.abs(decimals).to(tl.int32)):
                ten = ten * 10
            if decimals > 0:
                result = language.div(libdevice.nearbyint(input * ten), ten)
            else:
                result = libdevice.nearbyint(language.div(input, ten)) * ten
    return result


@round.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


round_ = round.inplace


@jit
def _sign(input):
    # NaN has sign 0.
    above = tl.where(input > 0, 1, 0)
    return (tl.where(input < 0, -1, above) if input.dtype.is_floating() or input.dtype.is_int_signed() else above).to(
        input.dtype
    )


@pointwise(aten="sign")
def sign(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """-1, 0 or 1; 0 for NaN. The gradient is zero. Source: ``torch.sign``."""
    return torch.sign(input)


@sign.formula
@jit
def _(input):
    return _sign(input)


@sign.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


sign_ = sign.inplace


@pointwise(aten="sgn")
def sgn(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """-1, 0 or 1, of a real number as :func:`sign`. The gradient is zero. Source: ``torch.sgn``."""
    return torch.sgn(input)


@sgn.formula
@jit
def _(input):
    return _sign(input)


@sgn.gradient
@jit
def _(grad):
    return tl.zeros_like(grad)


sgn_ = sgn.inplace
