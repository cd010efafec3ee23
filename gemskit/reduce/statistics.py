"""Variance and standard deviation."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit.errors import ArgumentError
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, count_of, floating, reduction, spread
from gemskit.reduce.sums import mean


@reduction(aten="var.correction")
def _var(
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, correction: float = 1, out: Tensor | None = None
) -> Tensor:
    """:func:`var` with its ``correction``."""
    return torch.var(input, dim, correction=correction, keepdim=keepdim)


@reduction(aten="std.correction")
def _std(
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, correction: float = 1, out: Tensor | None = None
) -> Tensor:
    """:func:`std` with its ``correction``."""
    return torch.std(input, dim, correction=correction, keepdim=keepdim)


@reduction(aten="var_mean.correction", named=tuple)
def _var_mean(
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, correction: float = 1
) -> tuple[Tensor, Tensor]:
    """:func:`var_mean` with its ``correction``."""
    return torch.var_mean(input, dim, correction=correction, keepdim=keepdim)


@reduction(aten="std_mean.correction", named=tuple)
def _std_mean(
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, correction: float = 1
) -> tuple[Tensor, Tensor]:
    """:func:`std_mean` with its ``correction``."""
    return torch.std_mean(input, dim, correction=correction, keepdim=keepdim)


@jit
def observe(input):
    """A lane's state: its first element, and the sums of differences from that and of their squares."""
    # -0, which the compiler drops from a sum: where a row is one tile, nothing is added to it.
    zero = tl.zeros_like(input) * -1
    return input, zero, zero


@jit
def further(anchor, d1, d2, x, _1, _2):
    """One more element: 3 instructions, where merging means takes 10 and a division."""
    d = x - anchor
    return anchor, d1 + d, d2 + d * d


@jit
def moments(state0, state1, state2, seen, length):
    """The (mean, sum of squared deviations, count) of all lanes: two passes over registers, corrected for a rounded mean."""
    n = seen.to(state0.dtype)
    count = length.to(state0.dtype)
    center = language.div(tl.sum(state1 + n * state0, 1, keep_dims=True), count)
    e = state0 - center
    left = tl.sum(state1 + n * e, 1, keep_dims=True)
    m2 = tl.sum(state2 + e * (2 * state1 + n * e), 1, keep_dims=True) - language.div(left * left, count)
    return center + language.div(left, count), tl.where(m2 < 0, 0, m2), tl.zeros_like(m2) + count


@jit
def _spread_of(m2, correction, count):
    return language.div(m2, tl.maximum(tl.zeros_like(m2) + count - correction, 0))


@jit
def _var_of(state1, correction, count):
    return _spread_of(state1, correction, count)


@jit
def _std_of(state1, correction, count):
    return language.sqrt(_spread_of(state1, correction, count))


@jit
def _var_mean_of(state0, state1, correction, count):
    return _spread_of(state1, correction, count), state0


@jit
def _std_mean_of(state0, state1, correction, count):
    return language.sqrt(_spread_of(state1, correction, count)), state0


MOMENTS: Any = dict(identity=(0, 0, 0), map=observe, step=further, join=moments, anchored=True, when=floating)
_var.combine(**MOMENTS, finish=_var_of, results=1)(language.welford)
_std.combine(**MOMENTS, finish=_std_of, results=1)(language.welford)
_var_mean.combine(**MOMENTS, finish=_var_mean_of, results=2)(language.welford)
_std_mean.combine(**MOMENTS, finish=_std_mean_of, results=2)(language.welford)


# -- gradients ------------------------------------------------------------------------------------------------------------


@jit
def _of_std(grad, std):
    return tl.where(std == 0, 0, language.div(grad, 2 * std))


@jit
def _deviation(grad, input, mean, factor, std, grad_mean, share, bounded):
    """The gradient of the variance, or of its root ``std``, and of the mean where that is a result too."""
    if std is not None:
        grad = _of_std(grad, std)
    if bounded:
        slope = grad * factor * (input - mean)
    else:
        slope = grad * tl.where(input == mean, float("nan"), float("inf"))
    if grad_mean is not None:
        slope += grad_mean * share
    return slope


_DEVIATION = Elementwise("var_grad", _deviation)


def _gradient(
    input: Tensor, dim: Dims, correction: float, keepdim: bool, grad: Tensor, std: Tensor | None = None,
    grad_mean: Tensor | None = None, center: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    n, compute = input.ndim, compute_type(input.dtype)
    count = count_of(input.shape, dim)
    freedom = count - correction
    if center is None or center.dtype != compute:
        (center,) = mean.forward((input, dim, True, compute))
    else:
        center = spread(center, dim, n, keepdim)
    rows = {"grad": grad, "std": std, "grad_mean": grad_mean}
    named: dict[str, Any] = {k: v if v is None else spread(v, dim, n, keepdim) for k, v in rows.items()}
    named.update(input=input, mean=center, factor=2.0 / freedom if freedom else math.inf, share=1.0 / max(count, 1))
    # Without dim torch takes the limit where there is no freedom left; with dim it divides.
    named["bounded"] = not (freedom <= 0 and (dim is None or not n))
    dx = torch.empty_like(input)
    _DEVIATION(named, [dx], compute)
    return {"input": dx}


@_var.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, correction: float, keepdim: bool) -> dict[str, Tensor]:
    return _gradient(input, dim, correction, keepdim, grad)


@_std.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, correction: float, keepdim: bool, out: Tensor) -> dict[str, Tensor]:
    return _gradient(input, dim, correction, keepdim, grad, out)


@_var_mean.gradient_by
def _(
    grads: tuple[Tensor, Tensor], input: Tensor, dim: Dims, correction: float, keepdim: bool, out1: Tensor
) -> dict[str, Tensor]:
    return _gradient(input, dim, correction, keepdim, grads[0], None, grads[1], out1)


@_std_mean.gradient_by
def _(
    grads: tuple[Tensor, Tensor], input: Tensor, dim: Dims, correction: float, keepdim: bool, out: Tensor, out1: Tensor
) -> dict[str, Tensor]:
    return _gradient(input, dim, correction, keepdim, grads[0], out, grads[1], out1)


# -- torch's forms --------------------------------------------------------------------------------------------------------


def _form(op: str, dim: Any, unbiased: bool | None, correction: float | None) -> tuple[Dims, float]:
    """``dim`` and ``correction`` of one of torch's forms: ``op(x, unbiased)``, ``op(x, dim, unbiased)`` and by ``correction``."""
    if isinstance(dim, bool):
        if unbiased is not None:
            raise ArgumentError(f"{op}: dim must be an int or several, given {dim}")
        dim, unbiased = None, dim
    if unbiased is not None and correction is not None:
        raise ArgumentError(f"{op}: takes unbiased or correction, given unbiased={unbiased}, correction={correction}")
    return dim, int(unbiased) if unbiased is not None else 1 if correction is None else correction + 0


def var(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``sum((input - mean)**2) / max(0, n - correction)`` over ``dim`` (all if None or empty). Source: ``torch.var``.

    One pass, and a mean far from 0 costs no accuracy. inf or NaN where ``correction >= n``; None is 1, ``unbiased`` is 1 or 0
    and may stand in the place of ``dim``. With ``dim=()`` the gradient is that of ``dim=None`` (torch divides by 0 there).
    """
    dim, freedom = _form("var", dim, unbiased, correction)
    return _var(input, dim, keepdim, correction=freedom, out=out)


def std(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The square root of :func:`var`, whose forms it has. The gradient is 0 where it is 0. Source: ``torch.std``."""
    dim, freedom = _form("std", dim, unbiased, correction)
    return _std(input, dim, keepdim, correction=freedom, out=out)


def var_mean(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`var` and mean in one pass. Source: ``torch.var_mean``."""
    dim, freedom = _form("var_mean", dim, unbiased, correction)
    return _var_mean(input, dim, keepdim, correction=freedom)


def std_mean(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`std` and mean in one pass. Source: ``torch.std_mean``."""
    dim, freedom = _form("std_mean", dim, unbiased, correction)
    return _std_mean(input, dim, keepdim, correction=freedom)
