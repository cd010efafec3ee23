"""Elements by index: where they are, and the kernel that reads them.

`Spots` says for every point of a space which element of a tensor belongs to it: at strides along some dimensions, and by what
index tensors hold along others. Reading there is gather, index_select, index and take; writing there (``reduce/_scatter.py``)
is scatter, index_add and index_put. An index that does not vary along a row is read once for the row, which is then copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import fill
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import Strides, offset
from gemskit.errors import ShapeError
from gemskit.pointwise._drive import _outer


@dataclass(frozen=True)
class Spots:
    """Which element of a tensor belongs to each point of the space ``shape``."""

    shape: tuple[int, ...]
    #: Of the tensor, along the dimensions of the space; 0 where an index decides.
    strides: Strides
    indices: tuple[Tensor, ...]
    #: The strides of each index in the space.
    over: tuple[Strides, ...]
    #: How many values each index may have, the sizes of the dimensions that it counts through, and their strides.
    bounds: tuple[int, ...]
    splits: tuple[Strides, ...]
    steps: tuple[Strides, ...]
    #: Whether a negative index counts from the end.
    wraps: bool = False
    #: What every index is reduced by.
    shift: int = 0
    #: Points where it is False have no element; it is broadcast to the space.
    mask: Tensor | None = None

    @property
    def most(self) -> int:
        """How many points may share an element."""
        return math.prod([n for n, s in zip(self.shape, self.strides) if s == 0])

    @property
    def wide(self) -> bool:
        """Whether an offset into the tensor leaves int32."""
        spaces = [(self.shape, self.strides), *zip(self.splits, self.steps)]
        return sum(_layout.reaches(*space) for space in spaces) >= _layout.NARROW or max(self.bounds) >= 2**31


def at_least_1d(t: Tensor) -> Tensor:
    """A 0-dim tensor as one of size 1."""
    return t if t.ndim else t.view(1)


def along(t: Tensor, dim: int, index: Tensor) -> Spots:
    """``t[i, index[i, j, k], k]``: gather and scatter. The space is that of ``index``."""
    t, index = at_least_1d(t), at_least_1d(index)
    dim %= t.ndim
    strides = tuple(0 if d == dim else s for d, s in enumerate(t.stride()))
    size = t.shape[dim]
    return Spots(
        tuple(index.shape), strides, (index,), (tuple(index.stride()),), (size,), ((size,),), ((t.stride(dim),),)
    )


def rows(t: Tensor, dim: int, index: Tensor) -> Spots:
    """``t[i, index[j], k]``: index_select and index_add. The space is that of ``t`` with the index's size along ``dim``."""
    t, index = at_least_1d(t), at_least_1d(index)
    dim %= t.ndim
    shape = tuple(index.shape[0] if d == dim else n for d, n in enumerate(t.shape))
    strides = tuple(0 if d == dim else s for d, s in enumerate(t.stride()))
    over = tuple(index.stride(0) if d == dim else 0 for d in range(t.ndim))
    size = t.shape[dim]
    return Spots(shape, strides, (index,), (over,), (size,), ((size,),), ((t.stride(dim),),))


def flat(t: Tensor, index: Tensor, wraps: bool = True) -> Spots:
    """``t.flatten()[index]``, whatever the strides of ``t``: take."""
    sizes, (steps,) = _layout.collapse(t.shape, [tuple(t.stride())])
    return Spots(
        tuple(index.shape), (0,) * index.ndim, (index,), (tuple(index.stride()),), (t.numel(),), (sizes,), (steps,),
        wraps,
    )  # fmt: skip


def advanced(t: Tensor, indices: Sequence[Tensor | None]) -> Spots:
    """``t[indices]`` of int tensors and None for whole dimensions: index and index_put.

    The indices are broadcast with each other; their dimensions come first, or take the place of the indexed ones where these are
    neighbours.
    """
    found = [(d, i) for d, i in enumerate(indices) if i is not None]
    dims = [d for d, _ in found]
    size = tuple(torch.broadcast_shapes(*[i.shape for _, i in found]))
    lead = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    rest = [d for d in range(t.ndim) if d not in dims]
    before, after = rest[:lead], rest[lead:]
    shape = (*[t.shape[d] for d in before], *size, *[t.shape[d] for d in after])
    strides = (*[t.stride(d) for d in before], *[0] * len(size), *[t.stride(d) for d in after])
    over = tuple((*[0] * len(before), *_layout.broadcast_strides(i, size), *[0] * len(after)) for _, i in found)
    return Spots(
        shape, strides, tuple(i for _, i in found), over, tuple(t.shape[d] for d in dims),
        tuple((t.shape[d],) for d in dims), tuple((t.stride(d),) for d in dims), True,
    )  # fmt: skip


# -- tiles -----------------------------------------------------------------------------------------------------------------


@jit
def place(i, i1, i0, m1, m0, sizes, strides, ALONG: tl.constexpr):
    """The offsets of a tile in an operand, and which of them are in the space: no larger than what the operand varies along."""
    R: tl.constexpr = len(sizes)
    at = _outer(i, sizes, strides)
    if ALONG == 3:
        return at + i1 * strides[R - 2] + i0 * strides[R - 1], m1 & m0
    elif ALONG == 2:
        return at + i1 * strides[R - 2], m1
    elif ALONG == 1:
        return at + i0 * strides[R - 1], m0
    else:
        return at + i0 * 0, m0


@jit
def tile(sizes, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr):
    """What this program has: its outer index, its indices along the last two dimensions, and which of them are in the space."""
    R: tl.constexpr = len(sizes)
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    t0 = tl.cdiv(sizes[R - 1], B0)
    i0 = ((i % t0) * B0 + tl.arange(0, B0))[None, :]
    i = i // t0
    t1 = tl.cdiv(sizes[R - 2], B1)
    i1 = ((i % t1) * B1 + tl.arange(0, B1))[:, None]
    return i // t1, i1, i0, i1 < sizes[R - 2], i0 < sizes[R - 1]


@jit
def locate(
    i, i1, i0, m1, m0, sizes, strides, mask, mask_strides, indices, over, bounds, splits, steps,
    ALONG: tl.constexpr, WRAPS: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The offset of each element of a tile by index, and whether there is one."""
    at, _ = place(i, i1, i0, m1, m0, sizes, strides, ALONG[0])
    ok = m1 & m0
    if mask is not None:
        where, live = place(i, i1, i0, m1, m0, sizes, mask_strides, ALONG[1])
        ok &= tl.load(mask + where, live, other=0) != 0
    for k in tl.static_range(len(indices)):
        where, live = place(i, i1, i0, m1, m0, sizes, over[k], ALONG[2 + k])
        j = tl.load(indices[k] + where, live, other=0)
        if SHIFT:
            j -= SHIFT
        if WRAPS:
            j = tl.where(j < 0, j + bounds[k], j)
        ok &= (j >= 0) & (j < bounds[k])
        if WIDE:
            j = j.to(tl.int64)
        else:
            j = j.to(tl.int32)
        at += offset(j, splits[k], steps[k])
    return at, ok


@jit
def _read(
    out, source, other, mask, indices, sizes, out_strides, other_strides, strides, mask_strides, over, bounds, splits, steps, s0,
    ALONG: tl.constexpr, SPOT: tl.constexpr, WRAPS: tl.constexpr, SHIFT: tl.constexpr, B1: tl.constexpr, B0: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # Where there is no element: other, or the number s0, or NaN (0 among ints).
    i, i1, i0, m1, m0 = tile(sizes, B1, B0, WIDE)
    at, ok = locate(
        i, i1, i0, m1, m0, sizes, strides, mask, mask_strides, indices, over, bounds, splits, steps,
        SPOT, WRAPS, SHIFT, WIDE,
    )  # fmt: skip
    missing = float("nan") if source.dtype.element_ty.is_floating() and s0 is None and other is None else 0
    value = tl.load(source + at, ok, other=missing)
    if other is not None:
        where, live = place(i, i1, i0, m1, m0, sizes, other_strides, ALONG[1])
        value = tl.where(ok, value, tl.load(other + where, live))
    elif s0 is not None:
        value = tl.where(ok, value, s0.to(value.dtype))
    where, live = place(i, i1, i0, m1, m0, sizes, out_strides, 3)
    tl.store(out + where, value, live)


_READS = {kind: fill(_read, "gather", {"s0": kind} if kind else {}) for kind in ("", "fp64", "i64")}


def typed(v: Number | None, dtype: torch.dtype) -> tuple[str, Number | None]:
    """The type in which a number reaches a kernel for elements of ``dtype``, and the number; none for None."""
    if v is None:
        return "", None
    return ("fp64", float(v)) if dtype.is_floating_point else ("i64", int(v))


@dataclass
class Tiling:
    """A space collapsed and cut into tiles, with the strides of its operands."""

    sizes: tuple[int, ...]
    strides: list[Strides]
    along: tuple[int, ...]
    grid: int
    meta: dict[str, Any]


def tiling(spots: Spots, operands: Sequence[Strides | None], itemsize: int, wide: bool = False) -> Tiling:
    """Tiles for ``operands`` (strides; None: absent), then for the tensor, the mask and the indices of ``spots``."""
    shape = spots.shape
    none = (0,) * len(shape)
    mask = none if spots.mask is None else _layout.broadcast_strides(spots.mask, shape)
    strides = [none if s is None else s for s in operands] + [spots.strides, mask, *spots.over]
    order = _layout.order(shape, [next((s for s in strides if any(s)), none)])
    sizes, found = _layout.collapse([shape[d] for d in order], [tuple(s[d] for d in order) for s in strides])
    if len(sizes) == 1:
        sizes, found = (1, *sizes), [(0, *s) for s in found]
    n1, n0 = sizes[-2:]
    by_element = any(s[-1] for s in found[len(operands) + 2 :])
    if by_element:
        config = backends.arch().config("pointwise")
        block = config["block"]
    else:
        # Rows are copied: 16 bytes for each lane.
        config = backends.arch().config("gather")
        block = max(1, config["block"] * 16 // itemsize)
    if any(s[-2] == 1 and s[-1] > 1 for s in found) and n1 > 1:
        side = backends.arch().config("pointwise")["side"]
        b1, b0 = min(side, _layout.next_power_of_2(n1)), min(side, _layout.next_power_of_2(n0))
    else:
        b0 = min(block, _layout.next_power_of_2(n0))
        b1 = min(max(1, block // b0), _layout.next_power_of_2(n1))
    meta = dict(
        WRAPS=spots.wraps, SHIFT=spots.shift, B1=b1, B0=b0, WIDE=wide or spots.wide or _layout.is_wide(sizes, found),
        num_warps=config["warps"],
    )  # fmt: skip
    kinds = tuple([(s[-1] != 0) + 2 * (s[-2] != 0) for s in found])
    return Tiling(sizes, found, kinds, math.prod(sizes[:-2]) * _layout.cdiv(n0, b0) * _layout.cdiv(n1, b1), meta)


def read(out: Tensor, source: Tensor, spots: Spots, other: Tensor | Number | None = None) -> None:
    """``out`` = the elements of ``source`` at ``spots``, whose space it has; ``other`` where there is none."""
    if 0 in spots.shape:
        return
    out = out.view(spots.shape) if out.ndim != len(spots.shape) else out
    if not source.numel():
        # There is nothing to read, but the kernel takes an address.
        source = out
    fallback = other if isinstance(other, Tensor) else None
    kind, number = typed(None if isinstance(other, Tensor) else other, out.dtype)
    also = None if fallback is None else _layout.broadcast_strides(fallback, spots.shape)
    t = tiling(spots, (tuple(out.stride()), also), out.element_size())
    out_strides, other_strides, strides, mask_strides, *over = t.strides
    args = (
        out, source, fallback, spots.mask, spots.indices, t.sizes, out_strides, other_strides, strides, mask_strides,
        tuple(over), spots.bounds, spots.splits, spots.steps, number,
    )  # fmt: skip
    launch(_READS[kind], (t.grid,), args, dict(t.meta, ALONG=t.along[:2], SPOT=t.along[2:]))


# -- the whole of a tensor -------------------------------------------------------------------------------------------------


def masked(spots: Spots, mask: Tensor) -> Spots:
    """Only where ``mask``, broadcast to the space, is True."""
    if torch.broadcast_shapes(mask.shape, spots.shape) != spots.shape:
        raise ShapeError(f"the mask of shape {list(mask.shape)} is larger than what it masks, {list(spots.shape)}")
    return dataclasses.replace(spots, mask=mask)


def corner(t: Tensor, index: Tensor) -> Tensor:
    """The part of ``t`` that an index smaller than it reads or writes."""
    t, index = at_least_1d(t), at_least_1d(index)
    for d, n in enumerate(index.shape):
        t = t.narrow(d, 0, n)
    return t
