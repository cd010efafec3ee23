"""Rows scaled to a norm: vectors of length one, and the form of RMS norm whose weight is a distance from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language, pointwise
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit.nn._drive import RowGradient, rowwise
from gemskit.nn._rows import Statistic
from gemskit.reduce.norms import vector_norm

Like = Mapping[str, Any]
Shape = Sequence[int]


@jit
def _square(input):
    return input * input


# -- length one -----------------------------------------------------------------------------------------------------------


@rowwise(saves=("length",))
def _normalize(input: Tensor, dim: int, eps: float) -> Tensor:
    """:func:`normalize` by the 2-norm of one dimension."""
    return F.normalize(input, 2.0, dim, eps)


_normalize.statistic("square", combine=language.add)(_square)


@jit
def _at_least(length, eps):
    return tl.where(length < eps, eps, length)


@_normalize.formula
@jit
def _(input, square, eps):
    length = language.sqrt(square)
    return language.div(input, tl.zeros_like(input) + _at_least(length, eps)), length


@jit
def _product(grad, input):
    return grad * input


@jit
def _normalize_grad(grad, input, length, dot, eps):
    scale = 1 / _at_least(length, eps)
    # Of what is shorter than eps the divisor is a constant.
    along = tl.where(length < eps, 0, dot * scale * scale)
    return (grad - input * along) * scale


_NORMALIZE_GRAD = RowGradient(
    "normalize_grad", _normalize_grad, [Statistic(("dot",), _product, language.add, (0,))], {}
)


@_normalize.gradient_by
def _(
    grad: Tensor, input: Tensor, dim: int, eps: float, length: Tensor, needs: set[str], like: Like
) -> dict[str, Tensor]:
    named = dict(grad=grad, input=input, dim=dim, eps=eps, length=length)
    return _NORMALIZE_GRAD(named, ("input",), needs, like)


def normalize(
    input: Tensor, p: float = 2.0, dim: int | tuple[int, ...] = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """``input / max(|input|, eps)`` with the p-norm over ``dim``, in the shape of ``input``.

    With ``p`` 2 over one dimension it is one pass, with a row in registers where it fits; else a norm and a division.
    Source: ``torch.nn.functional.normalize``.
    """
    if p == 2 and isinstance(dim, int) and out is None:
        return _normalize(input, dim, eps)
    return pointwise.div(input, pointwise.clamp_min(vector_norm(input, p, dim, True), eps), out=out)


# -- weights around zero --------------------------------------------------------------------------------------------------


@rowwise(saves=("rstd",))
def _gemma_rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor, eps: float) -> Tensor:
    """:func:`gemma_rms_norm`."""
    wide = compute_type(input.dtype)
    return F.rms_norm(input.to(wide), normalized_shape, 1 + weight.to(wide), eps).to(input.dtype)


_gemma_rms_norm.statistic("square", combine=language.add)(_square)


@_gemma_rms_norm.formula
@jit
def _(input, weight, square, cols, eps):
    rstd = 1 / language.sqrt(square / cols + eps)
    return input * rstd * (1 + weight), rstd


@jit
def _gemma_dot(grad, input, weight, rstd):
    return grad * (1 + weight) * input * rstd


@jit
def _gemma_grad(grad, input, weight, rstd, dot, cols):
    return (grad * (1 + weight) - input * (rstd * dot / cols)) * rstd


@jit
def _gemma_weight(grad, input, rstd):
    return grad * input * rstd


_GEMMA_GRAD = RowGradient(
    "gemma_rms_norm_grad", _gemma_grad, [Statistic(("dot",), _gemma_dot, language.add, (0,))], {"weight": _gemma_weight}
)


@_gemma_rms_norm.gradient_by
def _(
    grad: Tensor, input: Tensor, normalized_shape: Shape, weight: Tensor, rstd: Tensor, needs: set[str], like: Like
) -> dict[str, Tensor]:
    named = dict(grad=grad, input=input, normalized_shape=normalized_shape, weight=weight, rstd=rstd)
    return _GEMMA_GRAD(named, ("input",), needs, like)


def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * (1 + weight)`` over the dimensions of ``weight``, in float32 and rounded once."""
    return _gemma_rms_norm(x, tuple(weight.shape), weight, eps)
