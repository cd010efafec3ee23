"""Weights as a direction and a length."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemskit import backends, language
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.errors import DimError, DtypeError, ShapeError
from gemskit.nn._drive import row_shape
from gemskit.nn._rows import Rows, Statistic
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._fold import Fold


@operator()
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``v * g / |v|`` with the 2-norm over all dimensions but ``dim``, or over all if that is -1.

    ``g`` has size 1 where the norm was taken (one element if ``dim`` is -1). Source: ``torch._weight_norm`` (Salimans and Kingma
    2016).
    """
    if not v.dtype.is_floating_point or not g.dtype.is_floating_point:
        raise DtypeError(f"weight_norm: v and g must be floating point, given {describe(v)} and {describe(g)}")
    if not v.ndim or not -v.ndim <= dim < v.ndim:
        raise DimError(f"weight_norm: {describe(v)} has no dim={dim}; accepted: -1 for all, or one of its dimensions")
    dims = _dims(v.ndim, dim)
    kept = row_shape(v.shape, dims)
    if list(g.shape) != kept and g.numel() != math.prod(kept):
        raise ShapeError(f"weight_norm: g must have the shape {kept}, given {describe(g)}")
    wide = compute_type(v.dtype)
    x = v.to(wide)
    length = x.square().sum(dims, keepdim=True).sqrt() if dims else x.abs()
    return (x * (g.reshape(kept).to(wide) / length)).to(v.dtype)


def _dims(ndim: int, dim: int) -> tuple[int, ...]:
    """What the norm is taken over."""
    return tuple(d for d in range(ndim) if dim == -1 or d != dim % ndim)


@jit
def _square(v):
    return v * v


@jit
def _root(state0):
    return language.sqrt(state0)


@jit
def _scaled(v, g, length):
    return v * language.div(g, length)


@jit
def _scaled_row(v, g, square):
    length = language.sqrt(square)
    return v * language.div(g, length), length


@jit
def _product(grad, v):
    return grad * v


@jit
def _slope(grad, v, g, length, dot):
    unit = language.div(dot, length)
    return (grad - language.div(v, length) * unit) * language.div(g, length)


@jit
def _slope_row(grad, v, g, length, dot):
    return _slope(grad, v, g, length, dot), language.div(dot, length)


@jit
def _length_grad(dot, length):
    return language.div(dot, length)


_ROWS = Rows("weight_norm", _scaled_row, [Statistic(("square",), _square, language.add, (0,))], results=2)
_GRAD_ROWS = Rows("weight_norm_grad", _slope_row, [Statistic(("dot",), _product, language.add, (0,))], results=2)
_LENGTH = Fold("weight_norm_length", map=_square, combine=language.add, identity=(0,), finish=_root)
_DOT = Fold("weight_norm_dot", map=_product, combine=language.add, identity=(0,))
_SCALED = Elementwise("weight_norm_scale", _scaled)
_SLOPE = Elementwise("weight_norm_slope", _slope)
_LENGTH_GRAD = Elementwise("weight_norm_length_grad", _length_grad)


def _few(v: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether there are so few rows, and so long, that they have to be split over programs."""
    cols = math.prod(v.shape[d] for d in dims)
    config = backends.arch().config("reduction_along")
    return v.numel() < config["fill"] * cols and cols * v.element_size() > config["one_tile"]


@weight_norm.kernel
def _(outs: tuple[Tensor, ...], keep: dict[str, Any] | None, v: Tensor, g: Tensor, dim: int) -> None:
    (out,) = outs
    dims, compute, shape = _dims(v.ndim, dim), compute_type(v.dtype), tuple(v.shape)
    kept = row_shape(shape, dims)
    named = {"v": v, "g": g.reshape(kept)}
    length = torch.empty(kept, dtype=compute, device=v.device)
    if keep is not None:
        keep["length"] = length
    if not _few(v, dims):
        _ROWS(named, (out, length) if keep is not None else (out,), shape, dims, compute)
        return
    _LENGTH(named, (length,), shape, dims, compute)
    _SCALED({**named, "length": length}, (out,), compute)


def _gradient(grad: Tensor, v: Tensor, g: Tensor, dim: int, length: Tensor, dv: Tensor, dg: Tensor) -> None:
    dims, compute, shape = _dims(v.ndim, dim), compute_type(v.dtype), tuple(v.shape)
    kept = row_shape(shape, dims)
    named = {"grad": grad, "v": v, "g": g.reshape(kept), "length": length}
    row = dg.reshape(kept)
    if not _few(v, dims):
        _GRAD_ROWS(named, (dv, row), shape, dims, compute)
        return
    dot = torch.empty(kept, dtype=compute, device=v.device)
    _DOT(named, (dot,), shape, dims, compute)
    _SLOPE({**named, "dot": dot}, (dv,), compute)
    _LENGTH_GRAD({"dot": dot, "length": length}, (row,), compute)


@weight_norm.gradient_by
def _(grad: Tensor, v: Tensor, g: Tensor, dim: int, length: Tensor, needs: set[str]) -> dict[str, Tensor]:
    found = {"v": torch.empty_like(v), "g": torch.empty_like(g)}
    _gradient(grad, v, g, dim, length, found["v"], found["g"])
    return {n: t for n, t in found.items() if n in needs}


@operator()
def weight_norm_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`weight_norm` with respect to ``v`` and ``g``, from the norms that it divided by.

    ``dv = g / |v| * (dw - v * sum(dw * v) / |v|**2)`` and ``dg = sum(dw * v) / |v|``, in the shapes and dtypes of ``saved_v`` and
    ``saved_g``.
    """
    if not grad_w.dtype.is_floating_point or not saved_v.dtype.is_floating_point:
        raise DtypeError(
            f"weight_norm_backward: takes floating point tensors, given {describe(grad_w)}, {describe(saved_v)}"
        )
    dims = _dims(saved_v.ndim, dim)
    kept = row_shape(saved_v.shape, dims)
    wide = compute_type(saved_v.dtype)
    grad, v, g, length = (
        grad_w.to(wide),
        saved_v.to(wide),
        saved_g.to(wide).reshape(kept),
        saved_norms.to(wide).reshape(kept),
    )
    unit = ((grad * v).sum(dims, keepdim=True) if dims else grad * v) / length
    dv = (grad - v / length * unit) * (g / length)
    return dv.to(saved_v.dtype), unit.reshape(saved_g.shape).to(saved_g.dtype)


@weight_norm_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> None:
    length = saved_norms.reshape(row_shape(saved_v.shape, _dims(saved_v.ndim, dim)))
    _gradient(grad_w, saved_v, saved_g, dim, length, *outs)
