"""Variance."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, count_of, floating, reduction, spread
from gemskit.reduce.sums import mean


@reduction(aten="var.correction")
def var(
    input: Tensor, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False, out: Tensor | None = None
) -> Tensor:
    """``sum((input - mean)**2) / max(0, n - correction)`` over ``dim`` (all if None or empty). Source: ``torch.var``.

    One pass that merges means, so a mean far from 0 costs no accuracy. inf or NaN where ``correction >= n``; None is 1.
    With ``dim=()`` the gradient is that of ``dim=None`` (torch divides by 0 there).
    """
    return torch.var(input, dim, correction=correction, keepdim=keepdim)


@triton.jit
def _observe(input):
    return input, tl.zeros_like(input), tl.zeros_like(input) + 1


@triton.jit
def _unbiased(state1, correction, count):
    if correction is None:
        freedom = tl.zeros_like(state1) + count - 1
    else:
        freedom = tl.zeros_like(state1) + count - correction
    return language.div(state1, tl.maximum(freedom, 0))


var.combine(identity=(0, 0, 0), map=_observe, finish=_unbiased, results=1, when=floating)(language.welford)


@triton.jit
def _deviation(grad, input, mean, factor):
    return grad * factor * (input - mean)


@triton.jit
def _boundless(grad, input, mean):
    return grad * tl.where(input == mean, float("nan"), float("inf"))


_DEVIATION = Elementwise("var_grad", _deviation)
_BOUNDLESS = Elementwise("var_grad_boundless", _boundless)


@var.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, correction: float | None, keepdim: bool) -> dict[str, Tensor]:
    compute = compute_type(input.dtype)
    (center,) = mean.forward((input, dim, True, compute))
    freedom = count_of(input.shape, dim) - (1 if correction is None else correction)
    # Without dim torch takes the limit where there is no freedom left; with dim it divides.
    kernel = _BOUNDLESS if freedom <= 0 and (dim is None or not input.ndim) else _DEVIATION
    named = {
        "grad": spread(grad, dim, input.ndim, keepdim),
        "input": input,
        "mean": center,
        "factor": 2.0 / freedom if freedom else math.inf,
    }
    dx = torch.empty_like(input)
    kernel(named, [dx], compute)
    return {"input": dx}
