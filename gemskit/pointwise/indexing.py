"""Elements read by index.

An index outside its dimension raises on the CPU. On an accelerator, where raising would wait for the device, nothing is read: the
element is NaN, 0 among ints. Gradients add what was read from one element, in no fixed order unless
``torch.use_deterministic_algorithms(True)`` asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._dtypes import Number
from gemskit._op import operator
from gemskit.errors import ArgumentError, DimError, DtypeError, ShapeError
from gemskit.pointwise import _indexing
from gemskit.pointwise._indexing import advanced, along, at_least_1d, flat, masked, read, rows
from gemskit.pointwise._place import clear

Indices = Sequence[Tensor | None]
#: Dimensions that :func:`index` can index at once.
MOST = 8


def summed(grad: Tensor, like: tuple[Sequence[int], torch.dtype], where: Any) -> Tensor:
    """Zeros like the tensor that was read, with ``grad`` added at the spots ``where``."""
    # The kernels that write import this module's.
    from gemskit.reduce import _scatter

    out = torch.empty(tuple(like[0]), dtype=like[1], device=grad.device)
    _scatter.add(out, None, where, grad)
    return out


# -- along one dimension ---------------------------------------------------------------------------------------------------


@operator(aten="gather")
def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False, out: Tensor | None = None) -> Tensor:
    """``input[i, index[i, j, k], k]`` for ``dim`` 1: of the index's shape, which may be smaller than ``input`` elsewhere.

    ``index`` is int32 or int64; negative ones are out of range. There are no sparse gradients. Source: ``torch.gather``.
    """
    _dense("gather", sparse_grad)
    return torch.gather(input, dim, index)


def _dense(name: str, sparse_grad: bool) -> None:
    if sparse_grad:
        raise ArgumentError(f"{name}: sparse_grad is True; accepted: False (no kernel gives a sparse gradient)")


@gather.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, sparse_grad: bool) -> None:
    read(outs[0], input, along(input, dim, index))


def _gather_gradient(grad: Tensor, dim: int, index: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor | None]:
    return {"input": summed(at_least_1d(grad), like["input"], lambda t: along(t, dim, index))}


gather.set_gradient(_gather_gradient, ("grad", "dim", "index", "like"), of=("input",))


def gather_backward(grad: Tensor, self: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    """The gradient of :func:`gather`: zeros like ``self``, with ``grad`` added at the index.

    Source: ``torch.ops.aten.gather_backward``.
    """
    _dense("gather_backward", sparse_grad)
    return _gather_grad(grad, self, dim, index)


@operator(aten="gather_backward")
def _gather_grad(grad: Tensor, self: Tensor, dim: int, index: Tensor) -> Tensor:
    """:func:`gather_backward`. Compiled gradients have that name."""
    return torch.zeros_like(self, memory_format=torch.contiguous_format).scatter_add(dim, index, grad)


@_gather_grad.kernel
def _(outs: Sequence[Tensor], keep: Any, grad: Tensor, self: Tensor, dim: int, index: Tensor) -> None:
    from gemskit.reduce import _scatter

    _scatter.add(outs[0], None, lambda t: along(t, dim, index), _indexing.corner(grad, index))


def _gather_twice(grad: Tensor, dim: int, index: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor | None]:
    shape, dtype = like["grad"]
    out = torch.empty(tuple(shape), dtype=dtype, device=grad.device)
    if tuple(shape) != tuple(index.shape):
        clear(out)
    read(_indexing.corner(out, index), grad, along(grad, dim, index))
    return {"grad": out}


_gather_grad.set_gradient(_gather_twice, ("grad", "dim", "index", "like"), of=("grad",))


@operator(aten="index_select")
def index_select(input: Tensor, dim: int, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input[:, index]`` for ``dim`` 1; ``index`` is 1-dim, int32 or int64. Source: ``torch.index_select``."""
    return torch.index_select(input, dim, index)


@index_select.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor) -> None:
    read(outs[0], input, rows(input, dim, index))


def _select_gradient(grad: Tensor, dim: int, index: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor | None]:
    return {"input": summed(at_least_1d(grad), like["input"], lambda t: rows(t, dim, index))}


index_select.set_gradient(_select_gradient, ("grad", "dim", "index", "like"), of=("input",))


def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """:func:`gather` with ``input`` and ``indices`` broadcast except along ``dim``; flattened if it is None.

    Source: ``torch.take_along_dim``.
    """
    if indices.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"take_along_dim: indices must be int32 or int64, given {indices.dtype}")
    if dim is None:
        return gather(input.reshape(-1), 0, indices.reshape(-1), out=out)
    if input.ndim != indices.ndim:
        raise ShapeError(
            f"take_along_dim: input and indices must have as many dimensions, given {list(input.shape)} and "
            f"{list(indices.shape)}"
        )
    if not -max(1, input.ndim) <= dim < max(1, input.ndim):
        raise DimError(f"take_along_dim: dim {dim} is out of range; given input of {list(input.shape)}")
    dim %= max(1, input.ndim)
    if not input.ndim:
        return gather(input, dim, indices, out=out)
    size, count = list(input.shape), list(indices.shape)
    size[dim] = count[dim] = 1
    both = list(torch.broadcast_shapes(size, count))
    whole, places = list(both), list(both)
    whole[dim], places[dim] = input.shape[dim], indices.shape[dim]
    return gather(input.expand(whole), dim, indices.expand(places), out=out)


@operator(aten="take")
def take(input: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input.flatten()[index]``, of the index's shape; negative ones count from the end. Source: ``torch.take``."""
    if input.device.type == "meta" and index.dtype != torch.int64:
        raise DtypeError(f"take: index must be int64, given {index.dtype}")
    return torch.take(input, index)


@take.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, index: Tensor) -> None:
    read(outs[0], input, flat(input, index))


def _take_gradient(grad: Tensor, index: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor | None]:
    return {"input": summed(grad, like["input"], lambda t: flat(t, index))}


take.set_gradient(_take_gradient, ("grad", "index", "like"), of=("input",))


# -- several dimensions ----------------------------------------------------------------------------------------------------


def trimmed(*indices: Tensor | None) -> list[Tensor | None]:
    """Without the Nones at the end."""
    found = list(indices)
    while found and found[-1] is None:
        found.pop()
    return found


@operator(aten="index.Tensor")
def _index(
    input: Tensor,
    i0: Tensor | None,
    i1: Tensor | None = None,
    i2: Tensor | None = None,
    i3: Tensor | None = None,
    i4: Tensor | None = None,
    i5: Tensor | None = None,
    i6: Tensor | None = None,
    i7: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`index` by ints, one argument for each dimension."""
    found: Tensor = torch.ops.aten.index.Tensor(input, trimmed(i0, i1, i2, i3, i4, i5, i6, i7))
    return found


_PLACES = tuple(f"i{k}" for k in range(MOST))


@_index.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, *, out: Any = None, **indices: Tensor | None) -> None:
    read(outs[0], input, advanced(input, trimmed(*indices.values())))


def _index_gradient(grad: Tensor, like: Mapping[str, Any], **indices: Tensor | None) -> dict[str, Tensor | None]:
    found = trimmed(*indices.values())
    return {"input": summed(grad, like["input"], lambda t: advanced(t, found))}


_index.set_gradient(_index_gradient, ("grad", "like", *_PLACES), of=("input",))


def expanded(name: str, input: Tensor, indices: Indices) -> list[Tensor | None]:
    """``indices`` as ints: a mask becomes the positions where it is True, one index for each of its dimensions.

    On an accelerator this waits for the device once for each mask.
    """
    found: list[Tensor | None] = []
    if not any(isinstance(i, Tensor) for i in indices):
        raise ArgumentError(f"{name}: indices must hold at least one tensor, given {list(indices)!r}")
    for i in indices:
        if i is not None and i.device != input.device and i.device.type == "cpu":
            # As torch does, for indices only.
            i = i.to(input.device)
        if i is None or i.dtype in (torch.int32, torch.int64):
            found.append(i)
        elif i.dtype in (torch.bool, torch.uint8):
            at = len(found)
            if not i.ndim:
                raise ArgumentError(f"{name}: no kernel for a 0-dim mask; accepted are masks with dimensions")
            if tuple(i.shape) != tuple(input.shape[at : at + i.ndim]) or at + i.ndim > input.ndim:
                raise DimError(
                    f"{name}: a mask of shape {list(i.shape)} at dimension {at} does not fit input of {list(input.shape)}"
                )
            found += _positions(i)
        else:
            raise DtypeError(f"{name}: indices must be int32, int64, bool or uint8, given {i.dtype}")
    if len(found) > input.ndim:
        raise DimError(f"{name}: {len(found)} indices are too many for input of {list(input.shape)}")
    if len(found) > MOST:
        raise ArgumentError(f"{name}: at most {MOST} dimensions can be indexed, given {len(found)}")
    return found


def _positions(mask: Tensor) -> list[Tensor]:
    # Reductions import this package.
    from gemskit.reduce.selection import nonzero

    places: Any = nonzero(mask)
    return list(places.unbind(1))


def index(input: Tensor, indices: Indices, *, out: Tensor | None = None) -> Tensor:
    """``input[indices]``: one int tensor, mask (bool, uint8) or None (the whole dimension) for each leading dimension.

    Indices are broadcast with each other. Their dimensions stand first, or in the place of those indexed where these are
    neighbours. Negative ones count from the end. A mask covers as many dimensions as it has and, on an accelerator, waits for the
    device. Source: ``torch.ops.aten.index``, which is what ``input[...]`` calls.
    """
    return _index(input, *expanded("index", input, indices), out=out)


def unsafe_masked_index(input: Tensor, mask: Tensor, indices: Indices, fill: Number) -> Tensor:
    """``input[indices]`` where ``mask``, ``fill`` elsewhere; indices are ints, and may be out of range where not ``mask``.

    Source: ``torch.ops.aten._unsafe_masked_index``.
    """
    return _masked_index(input, mask, fill, *expanded("unsafe_masked_index", input, indices))


@operator(aten="_unsafe_masked_index")
def _masked_index(
    input: Tensor,
    mask: Tensor,
    fill: Number,
    i0: Tensor | None,
    i1: Tensor | None = None,
    i2: Tensor | None = None,
    i3: Tensor | None = None,
    i4: Tensor | None = None,
    i5: Tensor | None = None,
    i6: Tensor | None = None,
    i7: Tensor | None = None,
) -> Tensor:
    """:func:`unsafe_masked_index`, one argument for each dimension."""
    found: Tensor = torch.ops.aten._unsafe_masked_index(input, mask, trimmed(i0, i1, i2, i3, i4, i5, i6, i7), fill)
    return found


@_masked_index.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, mask: Tensor, fill: Number, **indices: Tensor | None) -> None:
    read(outs[0], input, masked(advanced(input, trimmed(*indices.values())), mask), fill)


def _masked_index_gradient(
    grad: Tensor, mask: Tensor, like: Mapping[str, Any], **indices: Tensor | None
) -> dict[str, Tensor | None]:
    found = trimmed(*indices.values())
    return {"input": summed(grad, like["input"], lambda t: masked(advanced(t, found), mask))}


_masked_index.set_gradient(_masked_index_gradient, ("grad", "mask", "like", *_PLACES), of=("input",))
