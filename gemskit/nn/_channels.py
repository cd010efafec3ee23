"""Norms as a fold and a map: statistics of rows that are any dimensions, then one formula per element.

For rows that fit no tile. The fold splits few long rows over the machine and joins the pieces in order; the map is elementwise,
so that every layout is read as it lies in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import Op, P, R
from gemskit.nn._drive import row_shape
from gemskit.nn.norm import affine
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._fold import Fold, add_pairs
from gemskit.reduce.statistics import further, moments, observe


class Norm(Op[P, R]):
    """An operator with a free kernel, whose numbers go into launches as they are."""

    passes_scalars = True


def norm(*, writes: Sequence[str] = ()) -> Callable[[Callable[P, R]], Norm[P, R]]:
    """Declare one; ``writes`` is what the in-place variant overwrites."""
    return functools.partial(Norm, writes=writes, floats=("input",))


@jit
def _statistics(state0, state1, count, eps):
    n = tl.zeros_like(state1) + count
    return state0, _rstd(language.div(state1, n), eps), language.div(state1, n - 1)


@jit
def _normal(input, mean, rstd, weight, bias):
    return affine((input - mean) * rstd, weight, bias)


@jit
def _rstd(var, eps):
    return 1 / language.sqrt(var + eps)


@jit
def _by_variance(input, mean, var, weight, bias, eps):
    return _normal(input, mean, _rstd(var, eps), weight, bias)


@jit
def _terms(grad, input, mean, rstd):
    return grad, grad * ((input - mean) * rstd)


@jit
def _weighted_terms(total, dot, weight):
    return total * weight, dot * weight


@jit
def _both(total, dot):
    return total, dot


@jit
def _twice(state0, state1):
    return state0, state1, state0, state1


@jit
def _mean(total, share, count):
    """``total / count``, rounded once, by ``1 / count`` and what that is off by: a division takes more registers."""
    n = tl.zeros_like(total) + count
    near = total * share
    mean = tl.math.fma(tl.math.fma(-near, n, total), share + tl.zeros_like(total), near)
    return tl.where(mean == mean, mean, near)


@jit
def _centred(grad, input, mean, rstd, total, dot, share, count):
    """``grad`` less its part along ones and along the normalised input, from the sums of a row of ``count``, ``1 / share``.

    ``total * share`` for the mean would leave a rounding error of equal gradients, which a large ``rstd`` shows.
    """
    return grad - _mean(total, share, count) - (input - mean) * (rstd * dot * share)


@jit
def _slope(grad, input, mean, rstd, weight, total, dot, share, count, grad_mean, grad_var, freedom):
    """From the sums of the row; ``grad_mean`` and ``grad_var`` are the gradients of statistics that are results too."""
    if total is not None:
        grad = _centred(grad, input, mean, rstd, total, dot, share, count)
    grad = grad * rstd
    if weight is not None:
        grad = grad * weight
    if grad_mean is not None:
        grad = grad + grad_mean * share + grad_var * freedom * (input - mean)
    return grad


@jit
def _weighted_slope(grad, input, mean, rstd, weight, total, dot, share, count):
    """The same where rows have several weights: they are in the sums."""
    if weight is not None:
        grad = grad * weight
    return _centred(grad, input, mean, rstd, total, dot, share, count) * rstd


def _pair(name: str, map: Any) -> Fold:
    return Fold(name, map=map, combine=add_pairs, identity=(0, 0), state=("accumulate",) * 2, finish=_twice, results=4)


#: Mean, ``1 / sqrt(var + eps)`` and the unbiased variance: as many as there are results.
STATISTICS = Fold(
    "norm_statistics", map=observe, combine=language.welford, identity=(0, 0, 0), state=("accumulate",) * 3, step=further,
    join=moments, anchored=True, finish=_statistics, results=3,
)  # fmt: skip
#: The sums of ``grad`` and of ``grad * (input - mean) * rstd``, in two results or twice in four.
SUMS = _pair("norm_sums", _terms)
#: The sums of ``total * weight`` and of ``dot * weight``.
WEIGHTED = _pair("norm_weighted_sums", _weighted_terms)
NORMAL = Elementwise("norm_apply", _normal)
BY_VARIANCE = Elementwise("norm_apply_variance", _by_variance)
RSTD = Elementwise("norm_rstd", _rstd)
#: The gradient of the input, from the sums of its row.
SLOPE = Elementwise("norm_grad", _slope)
WEIGHTED_SLOPE = Elementwise("norm_weighted_grad", _weighted_slope)
#: The sums of ``total`` and ``dot``.
BOTH = _pair("norm_vector_sums", _both)


def along(v: Tensor | None, ndim: int) -> Tensor | None:
    """A vector of channels as it broadcasts over (N, C, ...)."""
    return None if v is None else v.reshape(1, -1, *(1,) * (ndim - 2))


def sums_of(grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sums of ``grad`` and of ``grad * (input - mean) * rstd`` over ``dims``."""
    kept, compute = row_shape(grad.shape, dims), compute_type(input.dtype)
    total, dot = (torch.empty(kept, dtype=compute, device=grad.device) for _ in range(2))
    named = {"grad": grad, "input": input, "mean": mean, "rstd": rstd}
    SUMS(named, (total, dot), tuple(grad.shape), tuple(dims), compute)
    return total, dot


def target(n: str, like: Mapping[str, Any], into: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Where the gradient of ``n`` is written."""
    return into[n] if n in into else torch.empty(like[n][0], dtype=like[n][1], device=device)


def vectors_of(
    total: Tensor, dot: Tensor, needs: set[str], like: Mapping[str, Any], into: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of bias and weight that are in ``needs``, from those of every sample, (N, C)."""
    size = tuple(total.shape)
    other = {n: (size[1:], total.dtype) for n in ("bias", "weight") if n not in needs}
    outs = {n: target(n, {**like, **other}, into, total.device) for n in ("bias", "weight")}
    BOTH({"total": total, "dot": dot}, [v.unsqueeze(0) for v in outs.values()], size, (0,), total.dtype)
    return {n: v for n, v in outs.items() if n in needs}
