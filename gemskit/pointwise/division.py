"""Whole quotients and remainders. Ints divided by zero: an error on CPU tensors, undefined (no trap) on an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.pointwise import _whole
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise.arithmetic import div


@pointwise(aten="floor_divide")
def floor_divide(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``floor(input / other)``, of the exact quotient; no gradient. Source: ``torch.floor_divide``."""
    return torch.floor_divide(input, other)  # type: ignore[arg-type]


@floor_divide.formula
@jit
def _(input, other):
    return _whole.floor_div(input, other)


floor_divide_ = floor_divide.inplace


def trunc_divide(input: Tensor | Number, other: Tensor | Number) -> Tensor:
    """``input / other`` rounded toward zero. Source: ``torch.div`` with ``rounding_mode="trunc"``."""
    return div(input, other, rounding_mode="trunc")


@pointwise(aten="remainder.Tensor")
def remainder(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input - other * floor(input / other)``, exact: it has the sign of ``other``. Floats modulo zero give NaN.

    Source: ``torch.remainder``.
    """
    return torch.remainder(input, other)  # type: ignore[arg-type]


@remainder.formula
@jit
def _(input, other):
    return _whole.remainder(input, other)


@remainder.gradient
@jit
def _(grad, input, other):
    return grad, -grad * _whole.floor_div(input, other)


remainder_ = remainder.inplace


@pointwise(aten="fmod.Tensor")
def fmod(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input - other * trunc(input / other)``, exact: it has the sign of ``input``. Floats modulo zero give NaN.

    Source: ``torch.fmod``.
    """
    return torch.fmod(input, other)


@fmod.formula
@jit
def _(input, other):
    return _whole.fmod(input, other)


@fmod.gradient
@jit
def _(grad, input, other):
    return grad, -grad * libdevice.trunc(language.div(input, other))


fmod_ = fmod.inplace
