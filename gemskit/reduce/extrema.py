"""Largest and smallest elements, and where they are. NaN counts as both; of equal elements the first is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language, pointwise
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import Named
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, dims_of, reduction, spread
from gemskit.reduce._fold import Fold, add_pairs


@reduction(aten="amax")
def amax(
    input: Tensor, dim: int | tuple[int, ...] | list[int] = (), keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """Largest element over ``dim`` (all if empty); NaN where there is one. The gradient is shared by ties.

    Source: ``torch.amax``.
    """
    return torch.amax(input, dim, keepdim)


@reduction(aten="amin")
def amin(
    input: Tensor, dim: int | tuple[int, ...] | list[int] = (), keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """Smallest element over ``dim`` (all if empty); NaN where there is one. The gradient is shared by ties.

    Source: ``torch.amin``.
    """
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


@jit
def _located(input, start):
    # The position of lane 0: a number for the whole tile, where the position of each element is a register for each.
    return input, start


@jit
def _later_max(x, i, y, j):
    newer = ~(y <= x) & (x == x)
    return tl.where(newer, y, x), tl.where(newer, j, i)


@jit
def _later_min(x, i, y, j):
    newer = ~(y >= x) & (x == x)
    return tl.where(newer, y, x), tl.where(newer, j, i)


@jit
def _first_of(peak, value, start, lane, seen):
    """``peak``, and the first position where it is: a maximum and a minimum, which are cheaper than a fold of pairs."""
    hit = ((value == peak) | (value != value)) & (seen > 0)
    none: tl.constexpr = 2 ** (start.dtype.primitive_bitwidth - 1) - 1
    return peak, tl.min(tl.where(hit, start + lane, none), 1, keep_dims=True)


@jit
def _first_max(state0, state1, lane, seen):
    return _first_of(tl.reduce(state0, 1, language.maximum, keep_dims=True), state0, state1, lane, seen)


@jit
def _first_min(state0, state1, lane, seen):
    return _first_of(tl.reduce(state0, 1, language.minimum, keep_dims=True), state0, state1, lane, seen)


@jit
def _place(state1):
    return state1


def _ranked(named: Named) -> bool:
    """torch ranks no bools."""
    input: Tensor = named["input"]
    return input.dtype != torch.bool


@reduction(aten="argmax")
def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Index of the largest element along ``dim``, or in the flattened input; int64. Source: ``torch.argmax``.

    The first one of several, and of NaN, which is largest. Of no bools.
    """
    return torch.argmax(input, dim, keepdim)


@reduction(aten="argmin")
def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Index of the smallest element along ``dim``, or in the flattened input; int64. Source: ``torch.argmin``.

    The first one of several, and of NaN, which counts as smallest. Of no bools.
    """
    return torch.argmin(input, dim, keepdim)


@reduction(aten="max.dim", named=torch.return_types.max)
def max_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.max:
    """Largest elements along ``dim`` and their indices: :func:`max` with ``dim``. Source: ``torch.max``."""
    return torch.max(input, dim, keepdim)


@reduction(aten="min.dim", named=torch.return_types.min)
def min_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.min:
    """Smallest elements along ``dim`` and their indices: :func:`min` with ``dim``. Source: ``torch.min``."""
    return torch.min(input, dim, keepdim)


_PAIR = ("compute", "index")
_LARGEST = dict(identity=("lowest", None), map=_located, step=_later_max, join=_first_max, state=_PAIR)
_SMALLEST = dict(identity=("highest", None), map=_located, step=_later_min, join=_first_min, state=_PAIR)
argmax.combine(**_LARGEST, finish=_place, results=1, when=_ranked)(language.better_max)
argmin.combine(**_SMALLEST, finish=_place, results=1, when=_ranked)(language.better_min)
max_dim.combine(**_LARGEST)(language.better_max)
min_dim.combine(**_SMALLEST)(language.better_min)


@reduction(aten="aminmax", named=torch.return_types.aminmax)
def aminmax(
    input: Tensor, *, dim: int | None = None, keepdim: bool = False, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.aminmax:
    """:func:`amin` and :func:`amax` along ``dim`` (of all elements if None) in one pass. Source: ``torch.aminmax``."""
    return torch.aminmax(input, dim=dim, keepdim=keepdim)


@jit
def _twice(input):
    return input, input


@jit
def _wider(low_a, high_a, low_b, high_b):
    return language.minimum(low_a, low_b), language.maximum(high_a, high_b)


aminmax.combine(identity=("highest", "lowest"), map=_twice, state=("compute", "compute"))(_wider)


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


@jit
def _equal(input, out):
    return input == out


@jit
def _same(input, out):
    return (input == out) | ((input != input) & (out != out))


@jit
def _shared(grad, input, out, hits):
    return language.div(grad * (input == out).to(grad.dtype), hits)


@jit
def _given(grad, input, out, hits):
    return tl.where((input == out) | ((input != input) & (out != out)), language.div(grad, hits), 0)


@jit
def _at(grad, indices, position):
    return tl.where(position == indices, grad, 0)


@jit
def _equal_either(input, out, out1):
    return input == out, input == out1


@jit
def _shared_both(grad, grad1, input, out, out1, hits, hits1):
    low = language.div(grad * (input == out).to(grad.dtype), hits)
    return low + language.div(grad1 * (input == out1).to(grad.dtype), hits1)


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


_EITHER = Fold("aminmax_hits", map=_equal_either, combine=add_pairs, identity=(0, 0), state=("index", "index"))
_SHARED = Elementwise("aminmax_grad", _shared_both)


@aminmax.gradient_by
def _(
    grads: tuple[Tensor, Tensor], input: Tensor, dim: int | None, keepdim: bool, out: Tensor, out1: Tensor
) -> dict[str, Tensor]:
    n, compute = input.ndim, compute_type(input.dtype)
    low, high, grad, grad1 = (spread(t, dim, n, keepdim) for t in (out, out1, *grads))
    hits, hits1 = (torch.empty_like(low, dtype=compute) for _ in range(2))
    shape, dims = tuple(input.shape) or (1,), dims_of(dim, n)
    named = {"input": input, "out": low, "out1": high}
    _EITHER(named, [hits.view(low.shape or (1,)), hits1.view(low.shape or (1,))], shape, dims, compute)
    dx = torch.empty_like(input)
    _SHARED({**named, "grad": grad, "grad1": grad1, "hits": hits, "hits1": hits1}, [dx], compute)
    return {"input": dx}
