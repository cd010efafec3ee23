"""Normalisations of rows, with and without a residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit.errors import ShapeError
from gemskit.nn._drive import RowGradient, rowwise
from gemskit.nn._rows import Statistic
from gemskit.reduce._fold import add_pairs

Like = Mapping[str, Any]
Shape = Sequence[int]

# -- pieces shared by the norms: divisions by `cols` are of row values, one per row and not one per element ----------------


@jit
def affine(y, weight, bias):
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y


@jit
def _weighted(grad, weight):
    if weight is not None:
        grad = grad * weight
    return grad


@jit
def _rstd(square, cols, eps):
    if eps is not None:
        return 1 / language.sqrt(square / cols + eps)
    elif square.dtype == tl.float64:
        return 1 / language.sqrt(square / cols + 2.220446049250313e-16)
    else:
        return 1 / language.sqrt(square / cols + 1.1920928955078125e-07)


@jit
def _only_grad(grad):
    return grad


def _sum(x: Tensor, residual: Tensor, op: str) -> Tensor:
    """``x + residual`` in the type computed in."""
    if x.shape != residual.shape:
        raise ShapeError(f"{op}: both summands must have one shape, given {describe(x)} and {describe(residual)}")
    wide = compute_type(x.dtype)
    return x.to(wide) + residual.to(wide)


# -- layer norm -----------------------------------------------------------------------------------------------------------


@rowwise(saves=("mean", "rstd"))
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` over the trailing ``normalized_shape``; var is biased.

    Mean and variance are taken in float32 for halves; weight and bias may have another float dtype than ``input`` on an
    accelerator. Source: ``torch.nn.functional.layer_norm`` (Ba et al. 2016).
    """
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


@jit
def _powers(input):
    return input, input * input


@jit
def _deviation(input, total, cols):
    d = input - total / cols
    return d * d


@jit
def _spread(total, square, cols, precise):
    """The sum of squares around the mean from those around 0: they lose as many bits as the mean has of them."""
    spread = square - total * (total / cols)
    # At least half is left where the mean is a deviation at most; an eighth, at 2.6, costs rstd 2**-21. NaN is not sure.
    return (spread,), (spread >= square * (0.5 if precise else 0.125)) & (square < float("inf"))


layer_norm.statistic("total", "square", combine=add_pairs)(_powers)
layer_norm.statistic("spread", combine=language.add, guess=_spread)(_deviation)


@jit
def _standard(input, mean, rstd, precise):
    if precise:
        return (input - mean) * rstd
    else:
        # One instruction; off by 2**-24 of the mean, and the deviations of halves are no less than 2**-11 of it.
        return input * rstd - mean * rstd


@layer_norm.formula
@jit
def _(input, weight, bias, total, spread, cols, eps, precise):
    mean = total / cols
    rstd = _rstd(spread, cols, eps)
    return affine(_standard(input, mean, rstd, precise), weight, bias), mean, rstd


@jit
def _layer_norm_dots(grad, input, weight, mean, rstd):
    g = _weighted(grad, weight)
    return g, g * (input - mean) * rstd


@jit
def _layer_norm_grad(grad, input, weight, mean, rstd, total, dot, cols):
    return (_weighted(grad, weight) - total / cols - (input - mean) * (rstd * dot / cols)) * rstd


@jit
def _layer_norm_weight(grad, input, mean, rstd):
    return grad * (input - mean) * rstd


@jit
def _layer_norm_vectors(grad, input, mean, rstd):
    return grad * (input - mean) * rstd, grad


LAYER_NORM_GRAD = RowGradient(
    "layer_norm_grad", _layer_norm_grad, [Statistic(("total", "dot"), _layer_norm_dots, add_pairs, (0, 0))],
    {"weight": _layer_norm_weight, "bias": _only_grad}, _layer_norm_vectors,
)  # fmt: skip


@layer_norm.gradient_by
def _(
    grad: Tensor, input: Tensor, normalized_shape: Shape, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    needs: set[str], like: Like,
) -> dict[str, Tensor]:  # fmt: skip
    named = dict(grad=grad, input=input, normalized_shape=normalized_shape, weight=weight, mean=mean, rstd=rstd)
    return LAYER_NORM_GRAD(named, ("input",), needs, like)


# -- layer norm of a sum --------------------------------------------------------------------------------------------------


@rowwise(saves=("mean", "rstd"))
def skip_layer_norm(
    x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``layer_norm(x + residual)``; ``x`` and ``residual`` have one shape, and the sum of halves is kept in float32.

    Source: the post-norm block of Vaswani et al. 2017.
    """
    s = _sum(x, residual, "skip_layer_norm")
    weight, bias = (None if v is None else v.to(s.dtype) for v in (weight, bias))
    return F.layer_norm(s, normalized_shape, weight, bias, eps).to(x.dtype)


@jit
def _skip_powers(x, residual):
    return _powers(x + residual)


@jit
def _skip_deviation(x, residual, total, cols):
    return _deviation(x + residual, total, cols)


skip_layer_norm.statistic("total", "square", combine=add_pairs)(_skip_powers)
skip_layer_norm.statistic("spread", combine=language.add, guess=_spread)(_skip_deviation)


@skip_layer_norm.formula
@jit
def _(x, residual, weight, bias, total, spread, cols, eps):
    mean = total / cols
    rstd = _rstd(spread, cols, eps)
    return affine((x + residual - mean) * rstd, weight, bias), mean, rstd


@jit
def _skip_dots(grad, x, residual, weight, mean, rstd):
    return _layer_norm_dots(grad, x + residual, weight, mean, rstd)


@jit
def _skip_grad(grad, x, residual, weight, mean, rstd, total, dot, cols):
    return _layer_norm_grad(grad, x + residual, weight, mean, rstd, total, dot, cols)


@jit
def _skip_weight(grad, x, residual, mean, rstd):
    return grad * (x + residual - mean) * rstd


@jit
def _skip_vectors(grad, x, residual, mean, rstd):
    return grad * (x + residual - mean) * rstd, grad


_SKIP_GRAD = RowGradient(
    "skip_layer_norm_grad", _skip_grad, [Statistic(("total", "dot"), _skip_dots, add_pairs, (0, 0))],
    {"weight": _skip_weight, "bias": _only_grad}, _skip_vectors,
)  # fmt: skip


@skip_layer_norm.gradient_by
def _(
    grad: Tensor, x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    needs: set[str], like: Like,
) -> dict[str, Tensor]:  # fmt: skip
    named = dict(
        grad=grad, x=x, residual=residual, normalized_shape=normalized_shape, weight=weight, mean=mean, rstd=rstd
    )
    return _SKIP_GRAD(named, ("x", "residual"), needs, like)


# -- rms norm -------------------------------------------------------------------------------------------------------------


@rowwise(saves=("rstd",))
def rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """``input / sqrt(mean(input**2) + eps) * weight`` over the trailing ``normalized_shape``, in ``input``'s dtype.

    ``eps=None`` is the machine epsilon of the type computed in: float32's for halves.
    Source: ``torch.nn.functional.rms_norm`` (Zhang and Sennrich 2019).
    """
    return F.rms_norm(input, normalized_shape, weight, eps)


@jit
def _square(input):
    return input * input


rms_norm.statistic("square", combine=language.add)(_square)


@rms_norm.formula
@jit
def _(input, weight, square, cols, eps):
    rstd = _rstd(square, cols, eps)
    return affine(input * rstd, weight, None), rstd


@jit
def _rms_norm_dot(grad, input, weight, rstd):
    return _weighted(grad, weight) * input * rstd


@jit
def _rms_norm_grad(grad, input, weight, rstd, dot, cols, grad_sum):
    dx = (_weighted(grad, weight) - input * (rstd * dot / cols)) * rstd
    if grad_sum is not None:
        dx += grad_sum
    return dx


@jit
def _rms_norm_weight(grad, input, rstd):
    return grad * input * rstd


RMS_NORM_GRAD = RowGradient(
    "rms_norm_grad",
    _rms_norm_grad,
    [Statistic(("dot",), _rms_norm_dot, language.add, (0,))],
    {"weight": _rms_norm_weight},
)


@rms_norm.gradient_by
def _(
    grad: Tensor,
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    rstd: Tensor,
    needs: set[str],
    like: Like,
) -> dict[str, Tensor]:
    named = dict(grad=grad, input=input, normalized_shape=normalized_shape, weight=weight, rstd=rstd, grad_sum=None)
    return RMS_NORM_GRAD(named, ("input",), needs, like)


# -- rms norm of a sum ----------------------------------------------------------------------------------------------------


def _rms_norm_of(s: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(s, normalized_shape, None if weight is None else weight.to(s.dtype), eps)


@jit
def _skip_square(x, residual):
    s = x + residual
    return s * s


@rowwise(saves=("rstd",))
def add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``rms_norm(x + residual)``, in ``x``'s dtype; the sum of halves is kept in float32 and not returned."""
    return _rms_norm_of(_sum(x, residual, "add_rms_norm"), normalized_shape, weight, eps).to(x.dtype)


add_rms_norm.statistic("square", combine=language.add)(_skip_square)


@add_rms_norm.formula
@jit
def _(x, residual, weight, square, cols, eps):
    rstd = _rstd(square, cols, eps)
    return affine((x + residual) * rstd, weight, None), rstd


@jit
def _add_rms_norm_dot(grad, x, residual, weight, rstd):
    return _rms_norm_dot(grad, x + residual, weight, rstd)


@jit
def _add_rms_norm_grad(grad, x, residual, weight, rstd, dot, cols):
    return _rms_norm_grad(grad, x + residual, weight, rstd, dot, cols, None)


@jit
def _add_rms_norm_weight(grad, x, residual, rstd):
    return grad * (x + residual) * rstd


_ADD_RMS_NORM_GRAD = RowGradient(
    "add_rms_norm_grad", _add_rms_norm_grad, [Statistic(("dot",), _add_rms_norm_dot, language.add, (0,))],
    {"weight": _add_rms_norm_weight},
)  # fmt: skip


@add_rms_norm.gradient_by
def _(
    grad: Tensor, x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None, rstd: Tensor,
    needs: set[str], like: Like,
) -> dict[str, Tensor]:  # fmt: skip
    named = dict(grad=grad, x=x, residual=residual, normalized_shape=normalized_shape, weight=weight, rstd=rstd)
    return _ADD_RMS_NORM_GRAD(named, ("x", "residual"), needs, like)


@rowwise(writes=("x", "residual"), results=2, saves=("rstd",))
def fused_add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; returns ``(s / sqrt(mean(s**2) + eps) * weight, s)`` in the dtypes of ``x`` and ``residual``.

    The statistic is of the float32 sum. ``fused_add_rms_norm_`` writes the norm into ``x`` and the sum into ``residual``.
    """
    s = _sum(x, residual, "fused_add_rms_norm")
    return _rms_norm_of(s, normalized_shape, weight, eps).to(x.dtype), s.to(residual.dtype)


fused_add_rms_norm.statistic("square", combine=language.add)(_skip_square)


@fused_add_rms_norm.formula
@jit
def _(x, residual, weight, square, cols, eps):
    s = x + residual
    rstd = _rstd(square, cols, eps)
    return affine(s * rstd, weight, None), s, rstd


@fused_add_rms_norm.gradient_by
def _(
    grads: tuple[Tensor, Tensor], out1: Tensor, normalized_shape: Shape, weight: Tensor | None, rstd: Tensor,
    needs: set[str], like: Like,
) -> dict[str, Tensor]:  # fmt: skip
    # The sum that was returned is all that is saved, so the in-place variant needs no copy of its arguments.
    named = dict(
        grad=grads[0], input=out1, normalized_shape=normalized_shape, weight=weight, rstd=rstd, grad_sum=grads[1]
    )
    return RMS_NORM_GRAD(named, ("x", "residual"), needs, like)


fused_add_rms_norm_ = fused_add_rms_norm.inplace
