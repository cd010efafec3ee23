"""Comparisons. The result is bool (in place: 0 and 1); NaN equals nothing and is neither less nor greater."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gemskit._dtypes import Number
from gemskit.pointwise._drive import pointwise


@pointwise(aten="eq.Tensor", rounds=True)
def eq(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input == other``. Source: ``torch.eq``."""
    return torch.eq(input, other)


@eq.formula
@triton.jit
def _(input, other):
    return input == other


eq_ = eq.inplace


@pointwise(aten="ne.Tensor", rounds=True)
def ne(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input != other``. Source: ``torch.ne``."""
    return torch.ne(input, other)


@ne.formula
@triton.jit
def _(input, other):
    return input != other


ne_ = ne.inplace


@pointwise(aten="lt.Tensor", rounds=True)
def lt(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input < other``. Source: ``torch.lt``."""
    return torch.lt(input, other)


@lt.formula
@triton.jit
def _(input, other):
    return input < other


lt_ = lt.inplace


@pointwise(aten="le.Tensor", rounds=True)
def le(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input <= other``. Source: ``torch.le``."""
    return torch.le(input, other)


@le.formula
@triton.jit
def _(input, other):
    return input <= other


le_ = le.inplace


@pointwise(aten="gt.Tensor", rounds=True)
def gt(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input > other``. Source: ``torch.gt``."""
    return torch.gt(input, other)


@gt.formula
@triton.jit
def _(input, other):
    return input > other


gt_ = gt.inplace


@pointwise(aten="ge.Tensor", rounds=True)
def ge(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input >= other``. Source: ``torch.ge``."""
    return torch.ge(input, other)


@ge.formula
@triton.jit
def _(input, other):
    return input >= other


ge_ = ge.inplace
