"""Comparisons. The result is bool (in place: 0 and 1); NaN equals nothing and is neither less nor greater."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit._dtypes import Number, Scalar
from gemskit._jit import jit
from gemskit.errors import ArgumentError
from gemskit.pointwise._drive import pointwise


@pointwise(aten="eq.Tensor", rounds=True)
def eq(input: Tensor, other: Tensor | Scalar, *, out: Tensor | None = None) -> Tensor:
    """``input == other``. Source: ``torch.eq``."""
    return torch.eq(input, other)


@eq.formula
@jit
def _(input, other):
    return input == other


eq_ = eq.inplace


@pointwise(aten="ne.Tensor", rounds=True)
def ne(input: Tensor, other: Tensor | Scalar, *, out: Tensor | None = None) -> Tensor:
    """``input != other``. Source: ``torch.ne``."""
    return torch.ne(input, other)


@ne.formula
@jit
def _(input, other):
    return input != other


ne_ = ne.inplace


@pointwise(aten="lt.Tensor", rounds=True)
def lt(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input < other``. Source: ``torch.lt``."""
    return torch.lt(input, other)


@lt.formula
@jit
def _(input, other):
    return input < other


lt_ = lt.inplace


@pointwise(aten="le.Tensor", rounds=True)
def le(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input <= other``. Source: ``torch.le``."""
    return torch.le(input, other)


@le.formula
@jit
def _(input, other):
    return input <= other


le_ = le.inplace


@pointwise(aten="gt.Tensor", rounds=True)
def gt(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input > other``. Source: ``torch.gt``."""
    return torch.gt(input, other)


@gt.formula
@jit
def _(input, other):
    return input > other


gt_ = gt.inplace


@pointwise(aten="ge.Tensor", rounds=True)
def ge(input: Tensor, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input >= other``. Source: ``torch.ge``."""
    return torch.ge(input, other)


@ge.formula
@jit
def _(input, other):
    return input >= other


ge_ = ge.inplace

greater, greater_ = gt, gt_
greater_equal, greater_equal_ = ge, ge_
less, less_ = lt, lt_
less_equal, less_equal_ = le, le_
not_equal, not_equal_ = ne, ne_


@pointwise(keep=("input", "other"))
def _isclose(input: Tensor, other: Tensor, rtol: float, atol: float, equal_nan: bool) -> Tensor:
    """:func:`isclose` of tolerances that are not negative."""
    return torch.isclose(input, other, rtol, atol, equal_nan)


@_isclose.formula
@jit
def _(input, other, rtol, atol, equal_nan):
    close = input == other
    if equal_nan:
        close = close | ((input != input) & (other != other))
    # As torch, which takes five steps: each is rounded to the dtype (ints: float32).
    wide: tl.constexpr = tl.float64 if input.dtype == tl.float64 else tl.float32
    narrow: tl.constexpr = input.dtype if input.dtype.is_floating() else tl.float32
    other = other.to(wide)
    apart = tl.abs(input.to(wide) - other).to(narrow).to(wide)
    share = tl.abs(rtol.to(wide) * other).to(narrow).to(wide)
    allowed = (atol.to(wide) + share).to(narrow).to(wide)
    # An infinite distance is not close, whatever the tolerance; without one the rounded distance of ints does not count.
    return close | ((apart <= allowed) & (apart != float("inf")) & ((rtol != 0) | (atol != 0)))


def isclose(input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """``|input - other| <= atol + rtol * |other|``, or both equal; infinities are close to themselves only.

    Both have the same dtype. Source: ``torch.isclose``.
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not tolerance >= 0:
            raise ArgumentError(f"isclose: {name} must not be negative, given {tolerance!r}")
    return _isclose(input, other, float(rtol), float(atol), equal_nan)
