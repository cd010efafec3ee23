"""Data movement driven by the output: each element reads at most one element of a source, found by a map for each dimension.

`place` serves padding in all its modes, flips, rolls, scattered slices, diagonals and triangles; `copy` fills one strided view
from another; `join` fills several views in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import fill
from gemskit._dtypes import Number, compute_type, scalar_annotation
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.errors import ShapeError
from gemskit.pointwise._drive import Elementwise, _outer


@jit
def _value(value):
    return value


@jit
def _zero(index):
    return index * 0


_COPY = Elementwise("copy", _value, keep=("value",))
_ZEROS = Elementwise("zeros", _zero)


def copy(source: Tensor, out: Tensor) -> Tensor:
    """``source``, which may be expanded, in ``out``, converted to its dtype."""
    _COPY({"value": source}, [out], compute_type(out.dtype))
    return out


def clear(out: Tensor) -> Tensor:
    """``out``, all zero."""
    _ZEROS({}, [out], torch.int64)
    return out


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row-major zeros, written by a kernel."""
    return clear(torch.empty(tuple(shape), dtype=dtype, device=device))


def cast(source: Tensor, dtype: torch.dtype) -> Tensor:
    """``source`` itself if it has ``dtype``, else a copy that has."""
    return source if source.dtype == dtype else copy(source, torch.empty_like(source, dtype=dtype))


def fit(name: str, given: Tensor, part: Tensor) -> None:
    """Refuse ``given`` if it has not the shape of the part of a tensor that it goes to."""
    if given.shape != part.shape:
        raise ShapeError(f"{name}: what goes into {list(part.shape)} must have that shape, given {list(given.shape)}")


def stand_in(sizes: Sequence[int]) -> Tensor:
    """A tensor of these sizes without memory, to ask for the shape of a part of it."""
    return torch.empty(tuple(sizes), device="meta")


def narrow(t: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``t.narrow``, but ``t`` itself where that is all of it: a replay gives back no view of that kind."""
    return t if length == t.shape[dim] else t.narrow(dim, start, length)


# -- one source -------------------------------------------------------------------------------------------------------------


@jit
def search(table, i, size, live):
    """The number of entries of ``table`` (ascending, two or more) that are at most ``i``: at most ``size - 1``.

    With one entry Triton 3.6 fails on a loop whose condition is a constant.
    """
    low, high = i * 0, i * 0 + size - 1
    # 2**k entries are told apart in k steps.
    reach = 1
    while reach < size:
        middle = (low + high) // 2
        right = tl.load(table + middle, live, other=0) <= i
        high = tl.where(right | (low >= high), high, middle)
        low = tl.where(right & (low < high), middle + 1, low)
        reach *= 2
    return low


#: The modes of :class:`Axis`, in kernels by their numbers: Triton 3.6 hands on no strings out of tuples.
MODES = ("same", "window", "stepped", "flip", "reflect", "replicate", "wrap", "ends")
WINDOW, STEPPED, FLIP, REFLECT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
REPLICATE, WRAP, ENDS = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


@jit
def _source(p, table, size, count, start, step, MODE: tl.constexpr):
    """The index in a source of ``count`` elements for position ``p`` of ``size``, and whether there is one."""
    q = p
    if MODE != 0 and MODE != FLIP:
        q = p - start
    inside = p < size
    if MODE == WINDOW:
        inside = (q >= 0) & (q < count)
    elif MODE == STEPPED:
        inside = (q >= 0) & (q < count * step) & (q % step == 0)
        q = q // step
    elif MODE == FLIP:
        q = count - 1 - p
    elif MODE == REFLECT:
        q = tl.where(q < 0, -q, q)
        q = tl.where(q >= count, 2 * (count - 1) - q, q)
    elif MODE == REPLICATE:
        q = tl.minimum(tl.maximum(q, 0), count - 1)
    elif MODE == WRAP:
        q = q % count
        q = tl.where(q < 0, q + count, q)
    elif MODE == ENDS:
        q = search(table, p, count, inside)
    return q, inside


@jit
def _place(
    out, src, base, table, sizes, counts, starts, steps, out_strides, src_strides, base_strides, s0, band,
    MODES: tl.constexpr, BAND: tl.constexpr, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = len(sizes)
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    n0, n1 = sizes[R - 1], sizes[R - 2]
    t0 = tl.cdiv(n0, B0)
    c0 = (i % t0) * B0
    i0 = (c0 + tl.arange(0, B0))[None, :]
    i = i // t0
    t1 = tl.cdiv(n1, B1)
    r0 = (i % t1) * B1
    i1 = (r0 + tl.arange(0, B1))[:, None]
    i = i // t1
    live = (i1 < n1) & (i0 < n0)
    q0, in0 = _source(i0, table, n0, counts[R - 1], starts[R - 1], steps[R - 1], MODES[R - 1])
    q1, in1 = _source(i1, table, n1, counts[R - 2], starts[R - 2], steps[R - 2], MODES[R - 2])
    inside = live & in0 & in1
    to = i1 * out_strides[R - 2] + i0 * out_strides[R - 1]
    at = q1 * src_strides[R - 2] + q0 * src_strides[R - 1]
    under = i1 * base_strides[R - 2] + i0 * base_strides[R - 1]
    for d in tl.static_range(R - 3, -1, -1):
        p = i % sizes[d]
        i = i // sizes[d]
        q, ok = _source(p, table, sizes[d], counts[d], starts[d], steps[d], MODES[d])
        inside = inside & ok
        to += p * out_strides[d]
        at += q * src_strides[d]
        under += p * base_strides[d]
    # A triangle is read in whole tiles: loads with a mask of their own for each element are not vectorised.
    read = inside
    if BAND == "upper":
        read = inside & (c0 + B0 - 1 - r0 >= band)
        inside = inside & (i0 - i1 >= band)
    elif BAND == "lower":
        read = inside & (c0 - (r0 + B1 - 1) <= band)
        inside = inside & (i0 - i1 <= band)
    elif BAND == "diagonal":
        inside = inside & (i0 - i1 == band)
        read = inside
    element: tl.constexpr = out.dtype.element_ty
    fixed = tl.full((B1, B0), 0, element) + s0.to(element)
    if src is None and base is None:
        tl.store(out + to, fixed, live & (inside == 0))
    else:
        value = fixed
        if src is not None:
            value = tl.load(src + at, read, other=0).to(element)
            if base is None:
                value = tl.where(inside, value, fixed)
        if base is not None:
            value = tl.where(inside, value, tl.load(base + under, live & (inside == 0), other=0).to(element))
        tl.store(out + to, value, live)


@dataclass(frozen=True)
class Axis:
    """How a dimension of an output finds its index in the source: ``q = p - start`` by default.

    Modes: ``same``; ``window`` (outside of the source where q is no index of it); ``stepped`` (q / step, outside where that is
    no index); ``flip``; ``reflect``, ``replicate``, ``wrap`` (padding); ``ends`` (how many entries of a table are at most p).
    """

    mode: str = "same"
    start: int = 0
    step: int = 1


SAME = Axis()


@dataclass(frozen=True)
class _Dim:
    size: int
    count: int
    axis: Axis
    strides: tuple[int, int, int]


def _joined(a: _Dim, b: _Dim) -> _Dim | None:
    """Two neighbours as one dimension, where their memory and their maps allow it."""
    if b.axis.mode != "same" or a.axis.mode not in ("same", "window", "wrap"):
        return None
    (out_a, src_a, base_a), (out_b, src_b, base_b) = a.strides, b.strides
    if out_a != out_b * b.size or src_a != src_b * b.count or base_a != base_b * b.size:
        return None
    return _Dim(a.size * b.size, a.count * b.size, replace(a.axis, start=a.axis.start * b.size), b.strides)


_FILLED: dict[str, Any] = {}


def _filled(dtype: torch.dtype) -> Any:
    """The kernel for a number of ``dtype``."""
    kind = scalar_annotation(dtype)
    if kind not in _FILLED:
        _FILLED[kind] = fill(_place, "place", {"s0": kind})
    return _FILLED[kind]


def place(
    out: Tensor, source: Tensor | None, axes: Sequence[Axis] = (), *, base: Tensor | None = None, value: Number = 0,
    band: tuple[str, int] = ("", 0), table: Tensor | None = None, counts: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """``out[p] = source[map(p)]`` where there is such an element, elsewhere ``base[p]``, or ``value`` without a base.

    ``source`` has as many dimensions as ``out``. Without one, ``value`` goes into its place (of the shape ``counts``), and
    with neither source nor base what is inside stays as it is. ``band`` keeps inside where ``column - row`` of the last two
    dimensions is ``"upper"`` (at least), ``"lower"`` (at most) or ``"diagonal"`` (equal to) its number.
    """
    if not out.numel():
        return out
    axes = tuple(axes) or (SAME,) * out.ndim
    none = (0,) * out.ndim
    triples = zip(
        out.stride(), source.stride() if source is not None else none, base.stride() if base is not None else none
    )
    if counts is None:
        counts = source.shape if source is not None and not band[0] else out.shape
    dims = [_Dim(n, c, axis, s) for n, c, axis, s in zip(out.shape, counts, axes, triples)]
    kind, number = band
    tail: list[_Dim] = []
    if kind:
        *dims, rows, cols = dims
        if abs(rows.strides[0]) < abs(cols.strides[0]):
            # Columns are the dimension that is contiguous in the output.
            rows, cols, number = cols, rows, -number
            kind = {"upper": "lower", "lower": "upper"}.get(kind, kind)
        tail = [rows, cols]
    else:
        dims = [d for d in dims if d.size > 1 or d.axis.mode != "same"]
    merged: list[_Dim] = []
    for d in sorted(dims, key=lambda d: -d.strides[0]):
        both = _joined(merged[-1], d) if merged else None
        if both is None:
            merged.append(d)
        else:
            merged[-1] = both
    dims = [*[_Dim(1, 1, SAME, (0, 0, 0))] * max(0, 2 - len(merged) - len(tail)), *merged, *tail]
    sizes = tuple(d.size for d in dims)
    strides = [tuple(d.strides[k] for d in dims) for k in range(3)]
    n1, n0 = sizes[-2:]
    config = backends.arch().config("pointwise")
    block, side = config["block"], config["side"]
    if n1 > 1 and any(s[-2] == 1 and s[-1] != 1 for s in strides):
        b1, b0 = min(side, _layout.next_power_of_2(n1)), min(side, _layout.next_power_of_2(n0))
    else:
        b0 = min(block, _layout.next_power_of_2(n0))
        b1 = min(max(1, block // b0), _layout.next_power_of_2(n1))
    grid = _layout.cdiv(n0, b0) * _layout.cdiv(n1, b1)
    for n in sizes[:-2]:
        grid *= n
    reach = tuple(max(d.size, d.count) for d in dims)
    maps = [d.axis for d in dims]
    meta = dict(
        MODES=tuple(MODES.index(a.mode) for a in maps), BAND=kind, B1=b1, B0=b0, WIDE=_layout.is_wide(reach, strides),
        num_warps=config["warps"],
    )  # fmt: skip
    dtype = out.dtype
    fixed = float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)
    args = (
        out, source, base, table, sizes, tuple(d.count for d in dims), tuple(a.start for a in maps),
        tuple(a.step for a in maps), *strides, int(fixed) if isinstance(fixed, bool) else fixed, number,
    )  # fmt: skip
    launch(_filled(compute_type(dtype)), (grid,), args, meta)
    return out


# -- many sources -----------------------------------------------------------------------------------------------------------


@jit
def _part(out, src, i, sizes, out_strides, src_strides, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr):
    R: tl.constexpr = len(sizes)
    if WIDE:
        i = i.to(tl.int64)
    t0, t1 = tl.cdiv(sizes[R - 1], B0), tl.cdiv(sizes[R - 2], B1)
    i0 = ((i % t0) * B0 + tl.arange(0, B0))[None, :]
    i = i // t0
    i1 = ((i % t1) * B1 + tl.arange(0, B1))[:, None]
    i = i // t1
    live = (i1 < sizes[R - 2]) & (i0 < sizes[R - 1])
    at = _outer(i, sizes, src_strides) + i1 * src_strides[R - 2] + i0 * src_strides[R - 1]
    to = _outer(i, sizes, out_strides) + i1 * out_strides[R - 2] + i0 * out_strides[R - 1]
    tl.store(out + to, tl.load(src + at, live).to(out.dtype.element_ty), live)


@jit(repr=lambda _: "join")
def _join(
    outs, ins, firsts, sizes, out_strides, src_strides,
    B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    for k in tl.static_range(len(ins)):
        if (i >= firsts[k]) & (i < firsts[k + 1]):
            _part(outs[k], ins[k], i - firsts[k], sizes[k], out_strides[k], src_strides[k], B1, B0, WIDE)


def join(pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill each output view with its source of the same shape, all in one launch."""
    pieces = [(o, s) for o, s in pieces if o.numel()]
    if not pieces:
        return
    config = backends.arch().config("pointwise")
    shapes, strides = [], []
    for o, s in pieces:
        shape = tuple(o.shape)
        both: list[tuple[int, ...]] = [tuple(o.stride()), tuple(s.stride())]
        order = _layout.order(shape, both)
        sizes, flat = _layout.collapse([shape[d] for d in order], [tuple(t[d] for d in order) for t in both])
        if len(sizes) == 1:
            sizes, flat = (1, *sizes), [(0, *t) for t in flat]
        shapes.append(sizes)
        strides.append(flat)
    rows, cols = max(n[-2] for n in shapes), max(n[-1] for n in shapes)
    if any(n[-2] > 1 and t[-2] == 1 and t[-1] != 1 for n, flat in zip(shapes, strides) for t in flat):
        b1, b0 = (min(config["side"], _layout.next_power_of_2(n)) for n in (rows, cols))
    else:
        b0 = min(config["block"], _layout.next_power_of_2(cols))
        b1 = min(max(1, config["block"] // b0), _layout.next_power_of_2(rows))
    firsts = [0]
    for n in shapes:
        grid = _layout.cdiv(n[-1], b0) * _layout.cdiv(n[-2], b1)
        for m in n[:-2]:
            grid *= m
        firsts.append(firsts[-1] + grid)
    wide = any(_layout.is_wide(n, flat) for n, flat in zip(shapes, strides))
    outs, ins = tuple(o for o, _ in pieces), tuple(s for _, s in pieces)
    out_strides, src_strides = tuple(f[0] for f in strides), tuple(f[1] for f in strides)
    meta = dict(B1=b1, B0=b0, WIDE=wide, num_warps=config["warps"])
    launch(_join, (firsts[-1],), (outs, ins, tuple(firsts), tuple(shapes), out_strides, src_strides), meta)
