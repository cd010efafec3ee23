"""Largest and smallest elements, and where they are. NaN counts as both; of equal elements the first is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language, pointwise
from gemskit._dtypes import compute_type
from gemskit._op import Named
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, reduction, spread
from gemskit.reduce._fold import Fold


@reduction(aten="amax")
def amax(
    input: Tensor, dim: int | tuple[int, ...] | list[int] = (), keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """Largest element over ``dim`` (all if empty). The gradient is shared by ties. Source: ``torch.amax``."""
    return torch.amax(input, dim, keepdim)


@reduction(aten="amin")
def amin(
    input: Tensor, dim: int | tuple[int, ...] | list[int] = (), keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """Smallest element over ``dim`` (all if empty). The gradient is shared by ties. Source: ``torch.amin``."""
    return torch.amin(input, dim, keepdim)


@reduction(aten="max")
def max_all(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Largest of all elements: :func:`max` without ``dim``. The gradient is shared by ties. Source: ``torch.max``."""
    return torch.max(input)


@reduction(aten="min")
def min_all(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Smallest of all elements: :func:`min` without ``dim``. The gradient is shared by ties. Source: ``torch.min``."""
    return torch.min(input)


amax.combine(identity="lowest", state=("compute",))(language.maximum)
max_all.combine(identity="lowest", state=("compute",))(language.maximum)
amin.combine(identity="highest", state=("compute",))(language.minimum)
min_all.combine(identity="highest", state=("compute",))(language.minimum)


@triton.jit
def better_min(x, i, y, j):
    """The (value, index) pair with the smaller value; NaN is smallest, ties go to the smaller index."""
    first = (x < y) | ((x != x) & (y == y)) | (((x == y) | ((x != x) & (y != y))) & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@triton.jit
def _located(input, col):
    return input, col


@triton.jit
def _place(state1):
    return state1


def _ranked(named: Named) -> bool:
    """torch ranks no bools."""
    input: Tensor = named["input"]
    return input.dtype != torch.bool


@reduction(aten="argmax")
def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Index of the largest element along ``dim``, or in the flattened input; int64. Source: ``torch.argmax``."""
    return torch.argmax(input, dim, keepdim)


@reduction(aten="argmin")
def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Index of the smallest element along ``dim``, or in the flattened input; int64. Source: ``torch.argmin``."""
    return torch.argmin(input, dim, keepdim)


@reduction(aten="max.dim", results=torch.return_types.max)
def max_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.max:
    """Largest elements along ``dim`` and their indices: :func:`max` with ``dim``. Source: ``torch.max``."""
    return torch.max(input, dim, keepdim)


@reduction(aten="min.dim", results=torch.return_types.min)
def min_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.min:
    """Smallest elements along ``dim`` and their indices: :func:`min` with ``dim``. Source: ``torch.min``."""
    return torch.min(input, dim, keepdim)


_PAIR = ("compute", "index")
argmax.combine(identity=("lowest", "highest"), map=_located, finish=_place, state=_PAIR, results=1, when=_ranked)(
    language.better_max
)
argmin.combine(identity=("highest", "highest"), map=_located, finish=_place, state=_PAIR, results=1, when=_ranked)(
    better_min
)
max_dim.combine(identity=("lowest", "highest"), map=_located, state=_PAIR)(language.better_max)
min_dim.combine(identity=("highest", "highest"), map=_located, state=_PAIR)(better_min)


@overload
def max(input: Tensor, *, out: Tensor | None = None) -> Tensor: ...
@overload
def max(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.max: ...
@overload
def max(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor: ...
def max(input: Tensor, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """Largest element; with ``dim`` (values, indices) along it; with ``other`` :func:`maximum`. Source: ``torch.max``.

    NaN wins, of equal elements the first index is given. The gradient of ``max(input)`` is shared by ties, that of the
    values along ``dim`` goes to the element at the index.
    """
    if not args and not kwargs:
        return max_all(input, out=out)
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        return pointwise.maximum(input, *args, out=out, **kwargs)
    found = max_dim(input, *args, out=out, **kwargs)
    return found if out is None else torch.return_types.max(found)


@overload
def min(input: Tensor, *, out: Tensor | None = None) -> Tensor: ...
@overload
def min(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.min: ...
@overload
def min(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor: ...
def min(input: Tensor, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """Smallest element; with ``dim`` (values, indices) along it; with ``other`` :func:`minimum`. Source: ``torch.min``.

    NaN wins, of equal elements the first index is given. Gradients as of :func:`max`.
    """
    if not args and not kwargs:
        return min_all(input, out=out)
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        return pointwise.minimum(input, *args, out=out, **kwargs)
    found = min_dim(input, *args, out=out, **kwargs)
    return found if out is None else torch.return_types.min(found)


@triton.jit
def _equal(input, out):
    return input == out


@triton.jit
def _same(input, out):
    return (input == out) | ((input != input) & (out != out))


@triton.jit
def _shared(grad, input, out, hits):
    return language.div(grad * (input == out).to(grad.dtype), hits)


@triton.jit
def _given(grad, input, out, hits):
    return tl.where((input == out) | ((input != input) & (out != out)), language.div(grad, hits), 0)


@triton.jit
def _at(grad, indices, position):
    return tl.where(position == indices, grad, 0)


# amax takes no NaN for a hit, so such rows get NaN gradients; max() gives the gradient to the NaNs.
_AMAX = (
    Fold("amax_hits", map=_equal, combine=language.add, identity=(0,), state=("index",)),
    Elementwise("amax_grad", _shared),
)
_MAX = (
    Fold("max_hits", map=_same, combine=language.add, identity=(0,), state=("index",)),
    Elementwise("max_grad", _given),
)
_AT = Elementwise("max_dim_grad", _at, keep=("indices",))


def _to_ties(kernels: tuple[Fold, Elementwise], grad: Tensor, input: Tensor, out: Tensor) -> dict[str, Tensor]:
    """``grad`` shared evenly by the elements equal to ``out``; both have size 1 where they were reduced."""
    count, share = kernels
    compute = compute_type(input.dtype)
    named = {"grad": grad, "input": input, "out": out}
    named["hits"] = count.to_shape(named, input.shape, (out.shape, compute), compute)
    dx = torch.empty_like(input)
    share(named, [dx], compute)
    return {"input": dx}


def _extreme(grad: Tensor, input: Tensor, dim: Dims, keepdim: bool, out: Tensor) -> dict[str, Tensor]:
    n = input.ndim
    return _to_ties(_AMAX, spread(grad, dim, n, keepdim), input, spread(out, dim, n, keepdim))


def _extreme_all(grad: Tensor, input: Tensor, out: Tensor) -> dict[str, Tensor]:
    return _to_ties(_MAX, spread(grad, None, input.ndim, False), input, spread(out, None, input.ndim, False))


def _at_index(
    grads: tuple[Tensor, ...], dim: int, keepdim: bool, out1: Tensor, like: Mapping[str, Any]
) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    n = len(shape)
    named = {"grad": spread(grads[0], dim, n, keepdim), "indices": spread(out1, dim, n, keepdim), "dim": dim}
    dx = torch.empty(shape, dtype=dtype, device=grads[0].device)
    # Size 1, not 0-dim: a position needs a dimension.
    flat = dx if n else dx.view(1)
    _AT(named, [flat], compute_type(dtype))
    return {"input": dx}


amax.gradient_by(_extreme)
amin.gradient_by(_extreme)
max_all.gradient_by(_extreme_all)
min_all.gradient_by(_extreme_all)
max_dim.gradient_by(_at_index)
min_dim.gradient_by(_at_index)
