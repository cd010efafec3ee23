"""Sums, means, and sums of exponentials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import Named, P, R, operator
from gemskit.errors import DtypeError, ShapeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import copy, zeros
from gemskit.reduce._drive import Dims, Reduction, count_of, element, floating, reduction, spread
from gemskit.reduce._fold import Fold, add_pairs


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


@jit
def _share(state0, count):
    return language.div(state0, tl.zeros_like(state0) + count)


mean.combine(identity=0, finish=_share)(language.add)


@jit
def _divided(grad, count):
    return language.div(grad, tl.zeros_like(grad) + count)


_DIVIDED = Elementwise("mean_grad", _divided)


def evenly(grad: Tensor, dim: Dims, keepdim: bool, like: tuple[tuple[int, ...], torch.dtype], count: float) -> Tensor:
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
    return {"input": evenly(grad, dim, keepdim, like["input"], 1)}


@mean.gradient_by
def _(grad: Tensor, dim: Dims, keepdim: bool, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": evenly(grad, dim, keepdim, like["input"], count_of(like["input"][0], dim))}


# -- NaN aside ------------------------------------------------------------------------------------------------------------


@reduction(aten="nansum")
def nansum(
    input: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`sum` of the elements that are not NaN. Source: ``torch.nansum``."""
    return torch.nansum(input, dim, keepdim, dtype=dtype)


@reduction(aten="nanmean")
def nanmean(
    input: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`mean` of the elements that are not NaN; NaN where there is none. Source: ``torch.nanmean``."""
    return torch.nanmean(input, dim, keepdim, dtype=dtype)


@jit
def _known(input):
    return tl.where(input == input, input, 0)


@jit
def _counted(input):
    return tl.where(input == input, input, 0), (input == input).to(tl.int32)


@jit
def _count(input):
    return (input == input).to(tl.int32)


@jit
def _among(state0, state1):
    return language.div(state0, state1.to(state0.dtype))


nansum.combine(identity=0, map=_known)(language.add)
nanmean.combine(identity=(0, 0), map=_counted, finish=_among, state=("accumulate", "index"), results=1, when=floating)(
    add_pairs
)


@jit
def _to_known(grad, input, known):
    if known is not None:
        grad = language.div(grad, known)
    return tl.where(input == input, grad, 0)


_TO_KNOWN = Elementwise("nansum_grad", _to_known)
_KNOWN = Fold("nanmean_count", map=_count, combine=language.add, identity=(0,), state=("index",))


@nansum.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, keepdim: bool) -> dict[str, Tensor]:
    return _where_known(grad, input, dim, keepdim, False)


@nanmean.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, keepdim: bool) -> dict[str, Tensor]:
    return _where_known(grad, input, dim, keepdim, True)


def _where_known(grad: Tensor, input: Tensor, dim: Dims, keepdim: bool, share: bool) -> dict[str, Tensor]:
    grad, compute = spread(grad, dim, input.ndim, keepdim), compute_type(grad.dtype)
    named: dict[str, Any] = {"grad": grad, "input": input, "known": None}
    if share:
        named["known"] = _KNOWN.to_shape(named, input.shape, (grad.shape, compute), compute)
    dx = torch.empty_like(input)
    _TO_KNOWN(named, [dx], compute)
    return {"input": dx}


# -- log of the sum of exponentials ---------------------------------------------------------------------------------------


class _Floating(Reduction[P, R]):
    """A reduction that converts ints to the floating dtype of its result first."""

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        return super().plan({**named, "dtype": outs[0].dtype}, outs)


def _floats(aten: str) -> Callable[[Callable[P, R]], _Floating[P, R]]:
    return lambda meaning: _Floating(meaning, aten=aten)


@_floats(aten="logsumexp")
def logsumexp(
    input: Tensor, dim: int | tuple[int, ...] | list[int], keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """``log(sum(exp(input)))`` over ``dim`` (all if empty), shifted by the maximum as it is found: one pass.

    -inf for no elements; ints are converted to float32. Source: ``torch.logsumexp``.
    """
    return torch.logsumexp(input, dim, keepdim)


@jit
def one(input):
    """An element as a state of :func:`gemskit.language.online_softmax`."""
    return input, tl.zeros_like(input) + 1


@jit
def logarithm(state0, state1):
    """The logarithm of such a state."""
    return state0 + language.log(state1)


@jit
def _shift(peak):
    # Differences of infinities are NaN: exp(inf) and exp(-inf) give the sums that such rows have.
    return tl.where(tl.abs(peak) == float("inf"), 0, peak)


@jit
def _next_of(peak, total, x, _ones):
    """Eight elements at once rescale a lane's state once: 5 instructions an element instead of 15."""
    top = language.maximum(peak, tl.reduce(x, 2, language.maximum))
    base = _shift(top)
    return top, total * tl.exp(peak - base) + tl.sum(tl.exp(x - base[:, :, None]), 2)


@jit
def _sum_of(state0, state1):
    """All lanes at once: their maximum, then the sum of what is rescaled to it."""
    top = tl.reduce(state0, 1, language.maximum, keep_dims=True)
    total = tl.sum(state1 * tl.exp(state0 - _shift(top)), 1, keep_dims=True)
    return top, tl.where(tl.abs(top) == float("inf"), 1, total)


logsumexp.combine(identity=(-math.inf, 0), map=one, step=_next_of, group=8, join=_sum_of, finish=logarithm, results=1)(
    language.online_softmax
)


@jit
def _softmax(grad, input, out):
    return grad * language.exp(input - out)


_SOFTMAX = Elementwise("logsumexp_grad", _softmax)


@logsumexp.gradient_by
def _(grad: Tensor, input: Tensor, dim: Dims, keepdim: bool, out: Tensor) -> dict[str, Tensor]:
    dx, n = torch.empty_like(input), input.ndim
    named = {"grad": spread(grad, dim, n, keepdim), "input": input, "out": spread(out, dim, n, keepdim)}
    _SOFTMAX(named, [dx], compute_type(input.dtype))
    return {"input": dx}


# -- the diagonal ---------------------------------------------------------------------------------------------------------


@operator(aten="trace")
def trace(input: Tensor) -> Tensor:
    """Sum of the diagonal of a matrix; ints give int64. Source: ``torch.trace``."""
    if input.ndim != 2:
        raise ShapeError(f"trace: input must be a matrix, given {describe(input)}")
    if input.dtype == torch.bool:
        raise DtypeError(f"trace: input must not be bool, given {describe(input)}")
    return torch.trace(input)


_TRACE = Fold("trace", map=element, combine=language.add, identity=(0,))


@trace.kernel
def _(outs: Sequence[Tensor], keep: object, input: Tensor) -> None:
    diagonal = input.diagonal()
    _TRACE({"input": diagonal}, [outs[0].view(1)], tuple(diagonal.shape), (0,), compute_type(input.dtype))


@trace.gradient_by
def _(grad: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = zeros(shape, dtype, grad.device)
    copy(grad, dx.diagonal())
    return {"input": dx}
