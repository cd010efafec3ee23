"""Functions of three tensors, or of two and a bound, weight or value."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _checks, language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.errors import ArgumentError, DtypeError
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise.arithmetic import at_least, at_most, where
from gemskit.pointwise.compare import ne


@pointwise(aten="addcmul")
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Number = 1, out: Tensor | None = None) -> Tensor:
    """``input + value * tensor1 * tensor2``. Source: ``torch.addcmul``."""
    return torch.addcmul(input, tensor1, tensor2, value=value)


@addcmul.formula
@jit
def _(input, tensor1, tensor2, value):
    # Among ints a float is cut off.
    return input + value.to(input.dtype) * (tensor1 * tensor2)


@addcmul.gradient
@jit
def _(grad, tensor1, tensor2, value):
    return grad, grad * (tensor2 * value), grad * (tensor1 * value)


addcmul_ = addcmul.inplace


@pointwise(aten="addcdiv")
def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Number = 1, out: Tensor | None = None) -> Tensor:
    """``input + value * (tensor1 / tensor2)``, of floats. Source: ``torch.addcdiv``."""
    return torch.addcdiv(input, tensor1, tensor2, value=value)


@addcdiv.formula
@jit
def _(input, tensor1, tensor2, value):
    return input + value * language.div(tensor1, tensor2)


@addcdiv.gradient
@jit
def _(grad, tensor1, tensor2, value):
    slope = grad * language.div(value, tensor2)
    return grad, slope, -slope * language.div(tensor1, tensor2)


addcdiv_ = addcdiv.inplace


@pointwise(aten="lerp.Tensor")
def lerp(input: Tensor, end: Tensor, weight: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input + weight * (end - input)``, taken from the nearer end: exact at the weights 0 and 1. Source: ``torch.lerp``."""
    return torch.lerp(input, end, weight)


@lerp.formula
@jit
def _(input, end, weight):
    way = end - input
    return tl.where(tl.abs(weight) < 0.5, input + weight * way, end - way * (1 - weight))


@lerp.gradient
@jit
def _(grad, input, end, weight):
    return grad * (1 - weight), grad * weight, grad * (end - input)


lerp_ = lerp.inplace


@pointwise(aten="clamp_min", rounds=True)
def clamp_min(input: Tensor, min: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input``, or ``min`` where that is larger; NaN if either is. Source: ``torch.clamp_min``."""
    return torch.clamp_min(input, min)  # type: ignore[arg-type]


@clamp_min.formula
@jit
def _(input, min):
    return at_least(input, min)


@clamp_min.gradient
@jit
def _(grad, input, min):
    return tl.where(input >= min, grad, 0), tl.where(input < min, grad, 0)


clamp_min_ = clamp_min.inplace


@pointwise(aten="clamp_max", rounds=True)
def clamp_max(input: Tensor, max: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input``, or ``max`` where that is smaller; NaN if either is. Source: ``torch.clamp_max``."""
    return torch.clamp_max(input, max)  # type: ignore[arg-type]


@clamp_max.formula
@jit
def _(input, max):
    return at_most(input, max)


@clamp_max.gradient
@jit
def _(grad, input, max):
    return tl.where(input <= max, grad, 0), tl.where(input > max, grad, 0)


clamp_max_ = clamp_max.inplace


@pointwise(keep=("mask", "value"))
def _masked_fill(input: Tensor, mask: Tensor, value: Tensor | Number) -> Tensor:
    """:func:`masked_fill` of a value that fits the dtype of ``input``."""
    return torch.masked_fill(input, mask, value)  # type: ignore[arg-type]


@_masked_fill.formula
@jit
def _(input, mask, value):
    return tl.where(mask, value.to(input.dtype), input)


@_masked_fill.gradient
@jit
def _(grad, mask):
    return tl.where(mask, 0, grad)


_masked_fill_ = _masked_fill.inplace


def _fitting(name: str, input: Tensor, mask: Tensor, value: Tensor | Number) -> Tensor | Number:
    """``value`` as a number of the dtype of ``input``: for ints it is cut off, what does not fit is refused."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise DtypeError(f"{name}: mask must be a bool tensor, given {_checks.describe(mask)}")
    if isinstance(value, Tensor):
        return ne(value, 0) if input.dtype == torch.bool != value.dtype else value
    if not isinstance(input, Tensor) or not isinstance(value, (bool, int, float)):
        return value
    dtype = input.dtype
    if dtype == torch.bool:
        return int(bool(value))
    if dtype.is_floating_point:
        fits = not abs(value) > torch.finfo(dtype).max or (isinstance(value, float) and math.isinf(value))
    elif not dtype.is_complex:
        info = torch.iinfo(dtype)
        fits = math.isfinite(value) and (info.min or -info.max) <= value <= info.max
    else:
        return value
    if not fits:
        raise ArgumentError(f"{name}: value {value!r} does not fit into the dtype of input, {dtype}")
    return value if dtype.is_floating_point else int(value)


def masked_fill(input: Tensor, mask: Tensor, value: Tensor | Number) -> Tensor:
    """``value``, a number or a 0-dim tensor, where the bool tensor ``mask`` is true, else ``input``.

    The result has the dtype of ``input``; a number that overflows it is an error, a tensor's value is converted.
    Source: ``torch.masked_fill``.
    """
    if isinstance(value, Tensor) and value.requires_grad and value.ndim == 0 and value.dtype == input.dtype:
        return where(mask, value, input)
    return _masked_fill(input, mask, _fitting("masked_fill", input, mask, value))


def masked_fill_(input: Tensor, mask: Tensor, value: Tensor | Number) -> Tensor:
    """In-place :func:`masked_fill`: overwrites ``input``. Source: ``torch.Tensor.masked_fill_``."""
    return _masked_fill_(input, mask, _fitting("masked_fill_", input, mask, value))
