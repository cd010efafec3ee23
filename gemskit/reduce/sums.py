"""Sums and means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, count_of, reduction, spread


@reduction(aten="sum.dim_IntList")
def sum(
    input: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over ``dim`` (all dimensions if None or empty); 0 for no elements. Source: ``torch.sum``.

    ``input`` is converted to ``dtype`` first. Halves are summed in float32; ints and bools give int64 and wrap around.
    """
    return torch.sum(input, dim, keepdim, dtype=dtype)


sum.combine(identity=0)(language.add)


@reduction(aten="mean.dim")
def mean(
    input: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``sum(input) / n`` over ``dim`` (all dimensions if None or empty); NaN for no elements. Source: ``torch.mean``.

    ``input`` is converted to ``dtype`` first. Halves are summed in float32; ints need a floating ``dtype``.
    """
    return torch.mean(input, dim, keepdim, dtype=dtype)


@triton.jit
def _share(state0, count):
    return language.div(state0, tl.zeros_like(state0) + count)


mean.combine(identity=0, finish=_share)(language.add)


@triton.jit
def _divided(grad, count):
    return language.div(grad, tl.zeros_like(grad) + count)


_DIVIDED = Elementwise("mean_grad", _divided)


def _evenly(grad: Tensor, dim: Dims, keepdim: bool, like: tuple[tuple[int, ...], torch.dtype], count: float) -> Tensor:
    """``grad / count`` seen in the input's shape: every element has the same share, nothing is copied."""
    shape, dtype = like
    if count != 1 or grad.dtype != dtype:
        share = torch.empty_like(grad, dtype=dtype)
        named = {"grad": grad, "count": float(count)}
        _DIVIDED(named, [share], compute_type(grad.dtype))
        grad = share
    return spread(grad, dim, len(shape), keepdim).expand(shape)


@sum.gradient_by
def _(grad: Tensor, dim: Dims, keepdim: bool, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": _evenly(grad, dim, keepdim, like["input"], 1)}


@mean.gradient_by
def _(grad: Tensor, dim: Dims, keepdim: bool, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": _evenly(grad, dim, keepdim, like["input"], count_of(like["input"][0], dim))}
