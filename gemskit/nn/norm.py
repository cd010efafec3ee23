"""Normalisations of rows, with and without a residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language
from gemskit.nn._drive import RowGradient, rowwise
from gemskit.nn._rows import Rows, Statistic
from gemskit.reduce._fold import Fold

Like = Mapping[str, Any]
Shape = Sequence[int]

# -- pieces shared by the norms; `x` is the row that is normalised --------------------------------------------------------


@triton.jit
def _value(input):
    return input


@triton.jit
def _deviation(input, total, cols):
    d = input - total / cols
    return d * d


@triton.jit
def _square(input):
    return input * input


@triton.jit
def _affine(y, weight, bias):
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y


# -- layer norm -----------------------------------------------------------------------------------------------------------


@rowwise()
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` over the trailing ``normalized_shape``; var is biased.

    Source: ``torch.nn.functional.layer_norm`` (Ba et al. 2016).
    """
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


layer_norm.statistic("total", combine=language.add)(_value)
layer_norm.statistic("spread", combine=language.add)(_deviation)


@layer_norm.formula
@triton.jit
def _(input, weight, bias, total, spread, cols, eps):
    y = (input - total / cols) * (1 / tl.sqrt(spread / cols + eps))
    return _affine(y, weight, bias)


@triton.jit
def _weighted(grad, weight):
    if weight is not None:
        grad = grad * weight
    return grad


@triton.jit
def _layer_norm_dots(grad, input, weight, total, cols):
    g = _weighted(grad, weight)
    return g, g * (input - total / cols)


@triton.jit
def _layer_norm_grad(grad, input, weight, total, spread, g_total, g_dot, cols, eps):
    mean = total / cols
    rstd = 1 / tl.sqrt(spread / cols + eps)
    x = (input - mean) * rstd
    return (_weighted(grad, weight) - g_total / cols - x * (g_dot * rstd / cols)) * rstd, mean, rstd


@triton.jit
def _layer_norm_weight(grad, input, mean, rstd):
    return grad * (input - mean) * rstd


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _only_grad(grad):
    return grad


_LAYER_NORM_GRAD = RowGradient(
    Rows(
        "layer_norm_grad",
        _layer_norm_grad,
        [
            Statistic(("total",), _value, language.add, (0,)),
            Statistic(("spread",), _deviation, language.add, (0,)),
            Statistic(("g_total", "g_dot"), _layer_norm_dots, _add2, (0, 0)),
        ],
        results=3,
    ),
    {
        "weight": Fold("layer_norm_grad_weight", map=_layer_norm_weight, combine=language.add, identity=(0,)),
        "bias": Fold("layer_norm_grad_bias", map=_only_grad, combine=language.add, identity=(0,)),
    },
    ("mean", "rstd"),
)


@layer_norm.gradient_by
def _(
    grad: Tensor, input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, needs: set[str], like: Like
) -> dict[str, Tensor]:
    named = dict(grad=grad, input=input, normalized_shape=normalized_shape, weight=weight, eps=eps)
    dx, vectors = _LAYER_NORM_GRAD(named, input, needs, like)
    return {"input": dx, **vectors}


# -- rms norm -------------------------------------------------------------------------------------------------------------


@rowwise()
def rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """``input / sqrt(mean(input**2) + eps) * weight`` over the trailing ``normalized_shape``; eps None is the dtype's epsilon.

    Source: ``torch.nn.functional.rms_norm`` (Zhang and Sennrich 2019).
    """
    return F.rms_norm(input, normalized_shape, weight, eps)


@rowwise(writes=("x", "residual"), results=2)
def fused_add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; returns ``(s / sqrt(mean(s**2) + eps) * weight, s)``.

    The statistic is of the float32 sum. ``fused_add_rms_norm_`` writes the norm into ``x`` and the sum into ``residual``.
    """
    s = x.to(_wide(x)) + residual.to(_wide(x))
    y = s * torch.rsqrt(s.square().mean(_dims(normalized_shape), keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype), s.to(residual.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _dims(normalized_shape: Shape) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


@triton.jit
def _sum_square(x, residual):
    s = x + residual
    return s * s


fused_add_rms_norm.statistic("square", combine=language.add)(_sum_square)


@fused_add_rms_norm.formula
@triton.jit
def _(x, residual, weight, square, cols, eps):
    s = x + residual
    return _affine(s * (1 / tl.sqrt(square / cols + eps)), weight, None), s


fused_add_rms_norm_ = fused_add_rms_norm.inplace
