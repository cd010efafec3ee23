"""Losses of elements: a formula for each, the sum or mean of all in the kernel that computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language
from gemskit._dtypes import common_dtype, compute_type
from gemskit._jit import jit
from gemskit._op import Named, P, R
from gemskit.errors import ArgumentError, ShapeError
from gemskit.nn.loss import reduction_of
from gemskit.pointwise._drive import Pointwise
from gemskit.pointwise.arithmetic import div, mul
from gemskit.reduce._fold import Fold
from gemskit.reduce.sums import evenly, mean, sum


@jit
def _share(state0, divisor):
    return language.div(state0, tl.zeros_like(state0) + divisor)


class _Loss(Pointwise[P, R]):
    """An elementwise operator whose last parameter is the ``reduction``: none, sum, mean, batchmean (of the first dimension)."""

    # What is reduced does not fit into an operand.
    elementwise = False
    _fold: Fold
    _mean_of: Fold

    def formula(self, fn: Any) -> Any:
        rules: dict[str, Any] = dict(map=fn, combine=language.add, identity=(0,), keep=self.keep)
        self._fold, self._mean_of = Fold(f"{self.name}_sum", **rules), Fold(f"{self.name}_mean", finish=_share, **rules)
        return super().formula(fn)

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        found = super().shapes(values)
        return found if found is None or values[-1] == "none" else ((),)

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Any:
        how = named["reduction"]
        if how == "none":
            return super().plan(named, outs)
        self._probe(named)
        given = [v for v in named.values() if isinstance(v, Tensor)]
        shape = tuple(torch.broadcast_shapes(*(v.shape for v in given))) or (1,)
        compute = compute_type(common_dtype(given))
        divisor = _divisor(how, shape)
        fold, dims = self._fold if divisor is None else self._mean_of, tuple(range(len(shape)))

        def reduced(outs: Sequence[Tensor], keep: Any, arguments: Named) -> None:
            fold({**arguments, "divisor": divisor}, [outs[0].reshape((1,) * len(dims))], shape, dims, compute)

        return reduced

    def gradient(self, fn: Any) -> Any:
        super().gradient(fn)
        of, names, each = self.differentiable, self._saves, self._vjp
        assert each is not None

        def vjp(grad: Tensor, reduction: str, like: Mapping[str, Any], **named: Any) -> Mapping[str, Tensor | None]:
            if reduction != "none":
                shape = tuple(torch.broadcast_shapes(*(size for size, _ in like.values())))
                # Not in a half: a share of many elements may be less than its least.
                wide = (shape, compute_type(grad.dtype))
                grad = evenly(grad, None, False, wide, _divisor(reduction, shape or (1,)) or 1)
            return each(grad=grad, like=like, **named)

        self.set_gradient(vjp, tuple(dict.fromkeys(("grad", "reduction", "like", *names))), of)
        return fn


def _divisor(how: str, shape: Sequence[int]) -> float | None:
    if how == "mean":
        return float(torch.Size(shape).numel())
    return float(shape[0]) if how == "batchmean" else None


def _weighted(
    error: Any, given: tuple[Any, ...], weight: Tensor | None, reduction: str, by_weight: bool = True
) -> Tensor:
    """``error(*given)`` times weights, reduced; the mean is divided by the sum of the weights where torch's is."""
    if weight is None:
        return error(*given, reduction)  # type: ignore[no-any-return]
    input: Tensor = given[0]
    if weight.shape != input.shape:
        raise ShapeError(f"weight must have the shape of input, {list(input.shape)}, given {list(weight.shape)}")
    loss = mul(error(*given, "none"), weight)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return sum(loss)
    if reduction != "mean":
        raise ArgumentError(f"reduction must be none, mean or sum, given {reduction!r}")
    return div(sum(loss), sum(weight)) if by_weight else mean(loss)


# -- squared and absolute errors ------------------------------------------------------------------------------------------


@_Loss
def squared_error(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """``(input - target) ** 2``, reduced."""
    input, target = torch.broadcast_tensors(input, target)
    return F.mse_loss(input, target, reduction=reduction)


@squared_error.formula
@jit
def _(input, target):
    d = input - target
    return d * d


@squared_error.gradient
@jit
def _(grad, input, target):
    d = 2 * grad * (input - target)
    return d, -d


def mse_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``(input - target) ** 2``, reduced by ``"mean"``, ``"sum"`` or ``"none"``; the mean with ``weight`` is divided by its sum.

    ``size_average`` and ``reduce`` are torch's deprecated forms of ``reduction``. Source: ``torch.nn.functional.mse_loss``.
    """
    return _weighted(squared_error, (input, target), weight, reduction_of(size_average, reduce, reduction))


@_Loss
def absolute_error(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """``|input - target|``, reduced."""
    input, target = torch.broadcast_tensors(input, target)
    return F.l1_loss(input, target, reduction=reduction)


@absolute_error.formula
@jit
def _(input, target):
    return tl.abs(input - target)


@absolute_error.gradient
@jit
def _(grad, input, target):
    d = input - target
    d = grad * tl.where(d > 0, 1, tl.where(d < 0, -1, 0))
    return d, -d


def l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``|input - target|``, reduced by ``"mean"``, ``"sum"`` or ``"none"``; the mean with ``weight`` is divided by its sum.

    ``size_average`` and ``reduce`` are torch's deprecated forms of ``reduction``. Source: ``torch.nn.functional.l1_loss``.
    """
    return _weighted(absolute_error, (input, target), weight, reduction_of(size_average, reduce, reduction))


@_Loss
def smooth_error(input: Tensor, target: Tensor, beta: float, reduction: str) -> Tensor:
    """``(input - target) ** 2 / (2 * beta)`` up to ``beta``, ``|input - target| - beta / 2`` beyond, reduced."""
    input, target = torch.broadcast_tensors(input, target)
    return F.smooth_l1_loss(input, target, reduction=reduction, beta=beta)


@smooth_error.formula
@jit
def _(input, target, beta):
    d = tl.abs(input - target)
    return tl.where(d < beta, language.div(0.5 * d * d, beta + d * 0), d - 0.5 * beta)


@smooth_error.gradient
@jit
def _(grad, input, target, beta):
    d = input - target
    slope = tl.where(d >= beta, 1, tl.where(d <= -beta, -1, language.div(d, beta + d * 0)))
    slope = grad * tl.where(d == 0, 0, slope)
    return slope, -slope


def smooth_l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """``d**2 / (2 * beta)`` where ``d = |input - target|`` is less than ``beta``, else ``d - beta / 2``, reduced.

    ``size_average`` and ``reduce`` are torch's deprecated forms of ``reduction``. Source: ``torch.nn.functional.smooth_l1_loss``.
    """
    if beta < 0:
        raise ArgumentError(f"smooth_l1_loss: beta must not be negative, given {beta}")
    return smooth_error(input, target, float(beta), reduction_of(size_average, reduce, reduction))


@_Loss
def huber_error(input: Tensor, target: Tensor, delta: float, reduction: str) -> Tensor:
    """``(input - target) ** 2 / 2`` up to ``delta``, ``delta * (|input - target| - delta / 2)`` beyond, reduced."""
    input, target = torch.broadcast_tensors(input, target)
    return F.huber_loss(input, target, reduction=reduction, delta=delta)


@huber_error.formula
@jit
def _(input, target, delta):
    d = tl.abs(input - target)
    return tl.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


@huber_error.gradient
@jit
def _(grad, input, target, delta):
    d = input - target
    d = grad * tl.where(d < -delta, -delta, tl.where(d > delta, delta, d))
    return d, -d


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """``d**2 / 2`` where ``d = |input - target|`` is at most ``delta``, else ``delta * (d - delta / 2)``, reduced.

    ``weight`` multiplies each, the mean is of their number. Source: ``torch.nn.functional.huber_loss``.
    """
    if delta <= 0:
        raise ArgumentError(f"huber_loss: delta must be positive, given {delta}")
    return _weighted(huber_error, (input, target, float(delta)), weight, reduction, by_weight=False)


# -- of probabilities -----------------------------------------------------------------------------------------------------


def _binary(meaning: Any) -> Any:
    # torch has no gradient of the weights.
    return _Loss(meaning, keep=("weight", "pos_weight"), floats=("input",))


@_binary
def binary_logits_error(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """``-weight * (pos_weight * target * log(p) + (1 - target) * log(1 - p))`` of ``p = sigmoid(input)``, reduced."""
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


@jit
def _factor(target, pos_weight):
    """What the logarithm of the probability counts."""
    if pos_weight is None:
        return tl.full((), 1, target.dtype)
    else:
        return (pos_weight.to(target.dtype) - 1) * target + 1


@binary_logits_error.formula
@jit
def _(input, target, weight, pos_weight):
    loss = (1 - target) * input + _factor(target, pos_weight) * language.softplus(-input)
    if weight is not None:
        loss *= weight.to(loss.dtype)
    return loss


@binary_logits_error.gradient
@jit
def _(grad, input, target, weight, pos_weight):
    if weight is not None:
        grad *= weight.to(grad.dtype)
    slope = (1 - target) - _factor(target, pos_weight) * language.sigmoid(-input)
    by_target = -input
    if pos_weight is not None:
        by_target += (pos_weight.to(input.dtype) - 1) * language.softplus(-input)
    return grad * slope, grad * by_target


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean", pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``-weight * (pos_weight * target * log(p) + (1 - target) * log(1 - p))`` of ``p = sigmoid(input)``, reduced.

    ``weight`` and ``pos_weight`` broadcast to ``input``; they have no gradient. ``size_average`` and ``reduce`` are torch's
    deprecated forms of ``reduction``. Source: ``torch.nn.functional.binary_cross_entropy_with_logits``.
    """
    return binary_logits_error(  # type: ignore[no-any-return]
        input, target, weight, pos_weight, reduction_of(size_average, reduce, reduction)
    )


@_Loss
def divergence(input: Tensor, target: Tensor, log_target: bool, reduction: str) -> Tensor:
    """``target * (log(target) - input)``, or ``exp(target) * (target - input)`` if ``log_target``, reduced."""
    if reduction not in ("none", "mean", "sum", "batchmean"):
        raise ValueError(f"reduction must be none, mean, sum or batchmean, given {reduction!r}")
    loss = torch.kl_div(input, target, 0, log_target=log_target)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum() / (loss.shape[0] if reduction == "batchmean" else 1)


@divergence.formula
@jit
def _(input, target, log_target):
    if log_target:
        return language.exp(target) * (target - input)
    else:
        return tl.where(target == 0, 0, target * language.log(target)) - target * input


@divergence.gradient
@jit
def _(grad, input, target, log_target):
    if log_target:
        p = language.exp(target)
        return -grad * p, grad * p * (target - input + 1)
    else:
        # As torch's, which divides 0 by 0.
        slope = tl.where(target == 0, float("nan"), language.log(target) + 1 - input)
        return -grad * target, grad * slope


def kl_div(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:  # fmt: skip
    """``target * (log(target) - input)`` of logarithms of probabilities ``input``, reduced; 0 where ``target`` is.

    With ``log_target`` that is a logarithm too. ``reduction="batchmean"`` divides the sum by the size of the first dimension.
    ``size_average`` and ``reduce`` are torch's deprecated forms of ``reduction``. Source: ``torch.nn.functional.kl_div``.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    if reduction == "batchmean" and not input.ndim:
        reduction = "sum"
    return divergence(input, target, log_target, reduction)
