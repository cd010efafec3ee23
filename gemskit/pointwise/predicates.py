"""What a number is: NaN, infinite, negative, zero."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit._jit import jit
from gemskit.pointwise._drive import pointwise


@pointwise(aten="isnan")
def isnan(input: Tensor) -> Tensor:
    """Where ``input`` is NaN (bool). Source: ``torch.isnan``."""
    return torch.isnan(input)


@isnan.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return input != input
    else:
        return input != input


@pointwise(aten="isinf")
def isinf(input: Tensor) -> Tensor:
    """Where ``input`` is inf or -inf (bool). Source: ``torch.isinf``."""
    return torch.isinf(input)


@isinf.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return tl.abs(input) == float("inf")
    else:
        return input != input


@pointwise(aten="isposinf")
def isposinf(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where ``input`` is inf (bool). Source: ``torch.isposinf``."""
    return torch.isposinf(input)


@isposinf.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return input == float("inf")
    else:
        return input != input


@pointwise(aten="isneginf")
def isneginf(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where ``input`` is -inf (bool). Source: ``torch.isneginf``."""
    return torch.isneginf(input)


@isneginf.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return input == -float("inf")
    else:
        return input != input


@pointwise(aten="isfinite")
def isfinite(input: Tensor) -> Tensor:
    """Where ``input`` is neither NaN nor infinite (bool). Source: ``torch.isfinite``."""
    return torch.isfinite(input)


@isfinite.formula
@jit
def _(input):
    if input.dtype.is_floating():
        return tl.abs(input) < float("inf")
    else:
        return input == input


@pointwise(aten="signbit")
def signbit(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where ``input`` is negative, -0.0 included (bool). Source: ``torch.signbit``."""
    return torch.signbit(input)


@signbit.formula
@jit
def _(input):
    if input.dtype == tl.float64:
        return input.to(tl.int64, bitcast=True) < 0
    elif input.dtype.is_floating():
        return input.to(tl.int32, bitcast=True) < 0
    else:
        return input < 0


@pointwise(aten="logical_not")
def logical_not(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where ``input`` is zero (bool; in place 0 and 1). Source: ``torch.logical_not``."""
    return torch.logical_not(input)


@logical_not.formula
@jit
def _(input):
    return input == 0


logical_not_ = logical_not.inplace


@pointwise(aten="bitwise_not", keep=("input",))
def bitwise_not(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """All bits of an int turned; of a bool, its negation. Source: ``torch.bitwise_not``."""
    return torch.bitwise_not(input)


@bitwise_not.formula
@jit
def _(input):
    return ~input


bitwise_not_ = bitwise_not.inplace
