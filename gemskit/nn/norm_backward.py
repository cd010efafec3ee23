"""The gradients of norms as functions of their own, from saved statistics: ATen's ``native_*_backward``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gemskit import pointwise
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError
from gemskit.nn._drive import row_shape
from gemskit.nn.batch_norm import gradient as batch_gradient
from gemskit.nn.group_norm import gradient as group_gradient
from gemskit.nn.norm import LAYER_NORM_GRAD, RMS_NORM_GRAD

Shape = Sequence[int]
Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
Chosen: TypeAlias = tuple[Tensor | None, ...]
ALL = (True, True, True)


def _like(outs: Sequence[Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What gradients ask for where they are outputs: their shapes and dtypes, and themselves."""
    into = dict(zip(("input", "weight", "bias"), outs))
    return {n: (tuple(v.shape), v.dtype) for n, v in into.items()}, into


def _chosen(found: Sequence[Tensor], mask: Sequence[bool] | None) -> Chosen:
    return tuple(v if wanted else None for v, wanted in zip(found, mask or ALL))


def floating(op: str, *tensors: Tensor) -> None:
    """torch refuses ints in its kernels."""
    if not all(t.dtype.is_floating_point for t in tensors):
        raise DtypeError(f"{op}: takes floating point tensors, given {', '.join(map(describe, tensors))}")


def _meaning(grad: Tensor, x: Tensor, weight: Tensor | None, dims: tuple[int, ...], centred: bool = True) -> Tensor:
    """The gradient of ``x``, the normalised input, times the deviation, in the type computed in."""
    g = grad if weight is None else grad * weight
    n = max(math.prod(x.shape[d] for d in dims), 1)
    dx = g - x * ((g * x).sum(dims, keepdim=True) / n)
    return dx - g.sum(dims, keepdim=True) / n if centred else dx


# -- rows -----------------------------------------------------------------------------------------------------------------


@operator()
def _layer_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Shape, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_norm_backward` of all three."""
    floating("layer_norm_backward", grad_out, input)
    wide, dtype = compute_type(input.dtype), input.dtype if weight is None else weight.dtype
    first = input.ndim - len(normalized_shape)
    dims, rest = tuple(range(first, input.ndim)), tuple(range(first))
    grad, r = grad_out.to(wide), rstd.to(wide)
    x = (input.to(wide) - mean.to(wide)) * r
    dx = _meaning(grad, x, None if weight is None else weight.to(wide), dims) * r
    vectors = ((v.sum(rest) if rest else v).to(dtype) for v in (grad * x, grad))
    return dx.to(input.dtype), *vectors  # type: ignore[return-value]


@_layer_norm_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_out: Tensor, input: Tensor, normalized_shape: Shape, mean: Tensor, rstd: Tensor,
    weight: Tensor | None,
) -> None:  # fmt: skip
    named = dict(grad=grad_out, input=input, normalized_shape=normalized_shape, weight=weight, mean=mean, rstd=rstd)
    like, into = _like(outs)
    LAYER_NORM_GRAD(named, ("input",), {*into}, like, into)


def layer_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Shape, mean: Tensor, rstd: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, output_mask: Sequence[bool] | None = None,
) -> Chosen:  # fmt: skip
    """The gradients of :func:`layer_norm` with respect to input, weight and bias; None where ``output_mask`` is False.

    ``mean`` and ``rstd`` have one element for each row, in any shape. ``bias`` is not read.
    """
    kept = _rows(input, normalized_shape)
    found = _layer_norm_backward(
        grad_out, input, tuple(normalized_shape), mean.reshape(kept), rstd.reshape(kept), weight
    )
    return _chosen(found, output_mask)


def _rows(input: Tensor, normalized_shape: Shape) -> list[int]:
    return row_shape(input.shape, range(input.ndim - len(normalized_shape), input.ndim))


@operator()
def _rms_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Shape, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm_backward` of both."""
    floating("rms_norm_backward", grad_out, input)
    wide, dtype = compute_type(input.dtype), input.dtype if weight is None else weight.dtype
    first = input.ndim - len(normalized_shape)
    dims, rest = tuple(range(first, input.ndim)), tuple(range(first))
    grad, r = grad_out.to(wide), rstd.to(wide)
    x = input.to(wide) * r
    dx = _meaning(grad, x, None if weight is None else weight.to(wide), dims, False) * r
    return dx.to(input.dtype), ((grad * x).sum(rest) if rest else grad * x).to(dtype)


@_rms_norm_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_out: Tensor, input: Tensor, normalized_shape: Shape, rstd: Tensor,
    weight: Tensor | None,
) -> None:  # fmt: skip
    named = dict(grad=grad_out, input=input, normalized_shape=normalized_shape, weight=weight, rstd=rstd, grad_sum=None)
    like, into = _like(outs)
    RMS_NORM_GRAD(named, ("input",), {*into}, like, into)


def rms_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Shape, rstd: Tensor, weight: Tensor | None = None,
    output_mask: Sequence[bool] | None = None,
) -> Chosen:  # fmt: skip
    """The gradients of :func:`rms_norm` with respect to input and weight; None where ``output_mask`` is False.

    ``rstd`` has one element for each row, in any shape.
    """
    shape = tuple(normalized_shape)
    found = _rms_norm_backward(grad_out, input, shape, rstd.reshape(_rows(input, shape)), weight)
    return _chosen(found, output_mask)


# -- channels -------------------------------------------------------------------------------------------------------------


@operator()
def _group_norm_backward(
    grad_out: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`group_norm_backward` of all three."""
    floating("group_norm_backward", grad_out, input)
    wide, dtype = compute_type(input.dtype), input.dtype if weight is None else weight.dtype
    n, c = input.shape[:2]
    space = (n, group, c // group, math.prod(input.shape[2:]))
    r = rstd.to(wide).reshape(n, group, 1, 1)
    grad = grad_out.to(wide).reshape(space)
    x = (input.to(wide).reshape(space) - mean.to(wide).reshape(n, group, 1, 1)) * r
    w = None if weight is None else weight.to(wide).reshape(1, group, c // group, 1)
    dx = _meaning(grad, x, w, (2, 3)) * r
    weights, biases = ((v.sum((0, 3))).reshape(c).to(dtype) for v in (grad * x, grad))
    return dx.reshape(input.shape).to(input.dtype), weights, biases


@_group_norm_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_out: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    group: int,
) -> None:  # fmt: skip
    like, into = _like(outs)
    at = (slice(None), slice(None), *(None,) * (input.ndim - 1))
    group_gradient(grad_out, input, group, weight, mean[at], rstd[at], {*into}, like, into)


def group_norm_backward(
    grad_out: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, N: int, C: int, HxW: int, group: int,
    output_mask: Sequence[bool] | None = None,
) -> Chosen:  # fmt: skip
    """The gradients of :func:`group_norm` with respect to input, weight and bias; None where ``output_mask`` is False.

    ``mean`` and ``rstd`` are (N, group). ``input`` has ``N * C * HxW`` elements.
    """
    if input.ndim < 2 or input.shape[:2] != (N, C) or math.prod(input.shape[2:]) != HxW:
        raise ArgumentError(
            f"group_norm_backward: input of shape {list(input.shape)} is not ({N}, {C}, {HxW} positions)"
        )
    found = _group_norm_backward(grad_out, input, mean.reshape(N, group), rstd.reshape(N, group), weight, group)
    return _chosen(found, output_mask)


@operator()
def _batch_norm_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`batch_norm_backward` of all three."""
    floating("batch_norm_backward", grad_out, input)
    wide, dtype = compute_type(input.dtype), input.dtype if weight is None else weight.dtype
    dims = (0, *range(2, input.ndim))
    m, r = (v.to(wide).reshape(1, -1, *(1,) * (input.ndim - 2)) for v in (mean, rstd))
    w = 1 if weight is None else weight.to(wide).reshape(m.shape)
    grad = grad_out.to(wide)
    x = (input.to(wide) - m) * r
    dx = (_meaning(grad, x, None, dims) if train else grad) * (r * w)
    return dx.to(input.dtype), (grad * x).sum(dims).to(dtype), grad.sum(dims).to(dtype)


@_batch_norm_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_out: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    train: bool,
) -> None:  # fmt: skip
    like, into = _like(outs)
    batch_gradient((grad_out,), input, mean, rstd, weight, train, {*into}, like, into)


def batch_norm_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, save_mean: Tensor | None = None, save_invstd: Tensor | None = None, train: bool = False,
    eps: float = 1e-5, output_mask: Sequence[bool] | None = None,
) -> Chosen:  # fmt: skip
    """The gradients of :func:`batch_norm` with respect to input, weight and bias; None where ``output_mask`` is False.

    With ``train`` they are those of the saved statistics, else of the running ones, which have no gradient.
    """
    mean, rstd = (save_mean, save_invstd) if train else (running_mean, None)
    if not train and running_var is not None:
        with torch.no_grad():
            rstd = pointwise.rsqrt(pointwise.add(running_var, eps))
    if mean is None or rstd is None:
        wanted = "save_mean and save_invstd" if train else "running_mean and running_var"
        raise ArgumentError(f"batch_norm_backward: takes {wanted} where train={train}")
    return _chosen(_batch_norm_backward(grad_out, input, weight, mean, rstd, train), output_mask)
