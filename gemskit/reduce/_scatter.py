"""Writes by index, and sums, extremes and products of what is written to one element.

Every write is one kernel over the space of what is written (``pointwise/_indexing.py`` says where it goes). Sums of ints, counts
and extremes are atomic and the same in any order. Sums of floats are atomic in float32 or float64, in no fixed order, unless
``torch.use_deterministic_algorithms`` asks for one: then they are taken in fixed point, with a quantum for each element that
follows from its largest addend. Integers add up to the same in any order, so no sorting is needed, and hot spots cost no more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _interpret, _layout
from gemskit._bind import fill
from gemskit._dtypes import TRITON, Number, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._indexing import Spots, at_least_1d, locate, place, tile, tiling, typed
from gemskit.pointwise._place import clear, copy, zeros

#: Where the writes go in a tensor of the target's shape: asked for the target and for scratch memory.
Where = Callable[[Tensor], Spots]


@jit
def _power(peak, BITS):
    """The exponent by which addends whose largest has the bits ``peak`` become integers of 62 bits less ``BITS``."""
    if peak.dtype == tl.int64:
        # At most 2**1000: the sum of subnormals loses what lies below 2**-1000.
        return tl.minimum(62 - BITS + 1022 - (peak >> 52), 1000)
    else:
        return (62 - BITS + 126 - (peak >> 23)).to(tl.int64)


@jit
def _exp2(power):
    """``2**power`` in float64."""
    return ((power + 1023) << 52).to(tl.float64, bitcast=True)


@jit
def _finite(peak):
    if peak.dtype == tl.int64:
        return peak < 0x7FF0000000000000
    else:
        return peak < 0x7F800000


@jit
def _size(x):
    """The bits of ``|x|``, which are in its order; NaN is largest."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return tl.where(x == x, bits, 0x7FF8000000000000)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.where(x == x, bits, 0x7FC00000)


@jit
def _rank(x, FIRST: tl.constexpr):
    """An int in the order of ``x``, for floats too: NaN is the largest (the smallest if ``FIRST``)."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(x == x, bits, -0x7FFFFFFFFFFFFFFF if FIRST else 0x7FFFFFFFFFFFFFFF)
    elif x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(x == x, bits, -0x7FFFFFFF if FIRST else 0x7FFFFFFF)
    else:
        return x


@jit
def _write(
    out, low, aux, source, mask, indices, sizes, src_strides, lin_strides, aux_strides, strides, mask_strides, over, bounds,
    splits, steps, aux_splits, aux_steps, s0,
    HOW: tl.constexpr, COMPUTE: tl.constexpr, BITS: tl.constexpr, ALONG: tl.constexpr, SPOT: tl.constexpr, AUX: tl.constexpr,
    WRAPS: tl.constexpr, SHIFT: tl.constexpr, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, i1, i0, m1, m0 = tile(sizes, B1, B0, WIDE)
    at, ok = locate(
        i, i1, i0, m1, m0, sizes, strides, mask, mask_strides, indices, over, bounds, splits, steps,
        SPOT, WRAPS, SHIFT, WIDE,
    )  # fmt: skip
    at += tl.zeros((B1, B0), at.dtype)
    ok = ok & (at == at)
    if HOW == "claim" or HOW == "won":
        # The last of those that share an element, in the order of the index, wins.
        mine, _ = place(i, i1, i0, m1, m0, sizes, lin_strides, ALONG[1])
        mine = mine + 1 + tl.zeros((B1, B0), mine.dtype)
    if HOW == "claim":
        tl.atomic_max(out + at, mine.to(out.dtype.element_ty), ok, sem="relaxed")
    elif HOW == "count":
        tl.atomic_add(out + at, tl.full((B1, B0), 1, out.dtype.element_ty), ok, sem="relaxed")
    else:
        if source is not None:
            where, live = place(i, i1, i0, m1, m0, sizes, src_strides, ALONG[0])
            x = tl.load(source + where, live)
            if HOW != "store" and HOW != "won":
                x = x.to(COMPUTE)
            if s0 is not None:
                x = x * s0.to(COMPUTE)
            x = tl.broadcast_to(x, (B1, B0))
        else:
            x = tl.full((B1, B0), 0, COMPUTE) + s0.to(COMPUTE)
        if HOW == "store":
            tl.store(out + at, x.to(out.dtype.element_ty), ok)
        elif HOW == "won":
            there, _ = locate(
                i, i1, i0, m1, m0, sizes, aux_strides, mask, mask_strides, indices, over, bounds, aux_splits, aux_steps,
                AUX, WRAPS, SHIFT, WIDE,
            )  # fmt: skip
            winner = tl.load(aux + there, ok, other=0)
            tl.store(out + at, x.to(out.dtype.element_ty), ok & (winner == mine))
        elif HOW == "add":
            tl.atomic_add(out + at, x.to(out.dtype.element_ty), ok, sem="relaxed")
        elif HOW == "max":
            tl.atomic_max(out + at, _rank(x, False).to(out.dtype.element_ty), ok, sem="relaxed")
        elif HOW == "min":
            tl.atomic_min(out + at, _rank(x, True).to(out.dtype.element_ty), ok, sem="relaxed")
        elif HOW == "peak":
            tl.atomic_max(out + at, _size(x) + 1, ok, sem="relaxed")
        else:
            peak = tl.load(aux + at, ok, other=1) - 1
            finite = _finite(peak)
            y = tl.where(finite, x, 0).to(tl.float64) * _exp2(_power(peak, BITS))
            whole = y.to(tl.int64)
            # Among infinities and NaN they are counted: +inf below, -inf above.
            marks = tl.where(x == float("inf"), 1, 0).to(tl.int64) + (
                tl.where(x == -float("inf"), 1, 0).to(tl.int64) << 32
            )
            tl.atomic_add(out + at, tl.where(finite, whole, marks), ok, sem="relaxed")
            if low is not None:
                rest = ((y - whole.to(tl.float64)) * _exp2(tl.zeros_like(whole) + (62 - BITS))).to(tl.int64)
                tl.atomic_add(low + at, rest, ok, sem="relaxed")


_WRITES = {kind: fill(_write, "scatter", {"s0": kind} if kind else {}) for kind in ("", "fp64", "i64")}


def ordered() -> bool:
    """Whether the result must not depend on timing. The interpreter takes two stores to one element for a race."""
    return torch.are_deterministic_algorithms_enabled() or (_interpret.active() and _interpret.checking())


def _launch_write(
    how: str, out: Tensor, spots: Spots, source: Tensor | Number | None = None, *, aux: Tensor | None = None,
    also: Spots | None = None, lin: _layout.Strides | None = None, low: Tensor | None = None, bits: int = 0,
    compute: torch.dtype | None = None, by: Number | None = None,
) -> None:  # fmt: skip
    """``how`` to write ``source``, times ``by``, to ``out`` at ``spots``; ``aux`` is read at the spots ``also``."""
    if 0 in spots.shape or not out.numel():
        return
    tensor = source if isinstance(source, Tensor) else None
    compute = compute or compute_type(out.dtype)
    kind, number = typed(by if isinstance(source, Tensor) or source is None else source, compute)
    src = None if tensor is None else _layout.broadcast_strides(tensor, spots.shape)
    aux_strides = None if also is None else also.strides
    itemsize = (out if tensor is None else tensor).element_size()
    t = tiling(spots, (src, lin, aux_strides), itemsize, bool(lin) and math.prod(spots.shape) >= _layout.NARROW)
    also = also or spots
    args = (
        out, low, aux, tensor, spots.mask, spots.indices, t.sizes, *t.strides[:5], tuple(t.strides[5:]), spots.bounds,
        spots.splits, spots.steps, also.splits, also.steps, number,
    )  # fmt: skip
    meta = dict(
        t.meta, HOW=how, COMPUTE=TRITON[compute], BITS=bits, ALONG=t.along[:2], SPOT=t.along[3:],
        AUX=(t.along[2], *t.along[4:]),
    )  # fmt: skip
    launch(_WRITES[kind], (t.grid,), args, meta)


def start(out: Tensor, input: Tensor | None) -> None:
    """``out`` = ``input``; nothing to do where it is the very tensor (in place)."""
    if input is None:
        clear(out)
    elif out is not input:
        copy(input, out)


def store(out: Tensor, where: Where, source: Tensor | Number) -> None:
    """``source`` at its spots; of several for one element the last if :func:`ordered`, else any."""
    spots = where(out)
    if spots.most <= 1 or not ordered() or not out.numel():
        _launch_write("store", out, spots, source)
        return
    lin = _layout.contiguous(spots.shape)
    varies = [any(o[d] for o in spots.over) for d in range(len(spots.shape))]
    lin = tuple(s * v for s, v in zip(lin, varies))
    # What has the same index has the same winner: it is found once.
    kept = [d for d, v in enumerate(varies) if v and spots.strides[d]]
    sizes = [*[spots.shape[d] for d in kept], *spots.bounds]
    steps = _layout.contiguous(sizes)
    dtype = torch.int32 if math.prod(spots.shape) < 2**31 - 1 else torch.int64
    winners = zeros(sizes, dtype, out.device)
    by_dim = dict(zip(kept, steps))
    there = dataclasses.replace(
        spots,
        strides=tuple([by_dim.get(d, 0) for d in range(len(spots.shape))]),
        splits=tuple([(n,) for n in spots.bounds]),
        steps=tuple([(s,) for s in steps[len(kept) :]]),
    )
    shape = tuple(n if v else min(n, 1) for n, v in zip(spots.shape, varies))
    _launch_write("claim", winners, dataclasses.replace(there, shape=shape), lin=lin)
    _launch_write("won", out, spots, source, aux=winners, also=there, lin=lin)


def add(out: Tensor, input: Tensor | None, where: Where, source: Tensor | Number, by: Number | None = None) -> None:
    """``out`` = ``input`` (None: zeros) + the sum of ``source * by`` at each spot. Halves are summed in float32."""
    compute = compute_type(out.dtype)
    if out.dtype.is_floating_point and torch.are_deterministic_algorithms_enabled():
        _add_in_fixed_point(out, input, where, source, by)
        return
    if not compute.is_floating_point and compute != torch.int64:
        compute = torch.int32
    target = out if compute == out.dtype else torch.empty(out.shape, dtype=compute, device=out.device)
    start(target, input)
    _launch_write("add", target, where(target), source, compute=compute, by=by)
    if target is not out:
        copy(target, out)


def _add_in_fixed_point(
    out: Tensor, input: Tensor | None, where: Where, source: Tensor | Number, by: Number | None
) -> None:
    """:func:`add` in an order that makes no difference.

    The addends of an element are at most ``2**e``; they are rounded to multiples of ``2**(e + bits - 62)``, where ``2**bits``
    of them fit into an int64. In float64 what is rounded away is summed in a second int64.
    """
    compute, device = compute_type(out.dtype), out.device
    double = compute == torch.float64
    peak = zeros(out.shape, torch.int64 if double else torch.int32, device)
    spots = where(peak)
    bits = -(-(max(1, spots.most).bit_length() + 1) // 8) * 8
    total = zeros(out.shape, torch.int64, device)
    low = zeros(out.shape, torch.int64, device) if double else None
    _launch_write("peak", peak, spots, source, compute=compute, by=by)
    _launch_write(
        "fixed", total, where(total), source, aux=peak, also=spots, low=low, bits=bits, compute=compute, by=by
    )
    _SUM({"input": input, "peak": peak, "total": total, "low": low, "bits": bits}, [out], torch.float64)


@jit
def _sum(input, peak, total, low, bits):
    peak, bits = peak - 1, bits.to(tl.int64)
    value = total.to(tl.float64)
    if low is not None:
        value += low.to(tl.float64) * _exp2(bits - 62)
    value *= _exp2(-_power(peak, bits))
    above, below = (total >> 32) != 0, (total & 0xFFFFFFFF) != 0
    infinite = tl.where(above, -float("inf"), float("inf"))
    if peak.dtype == tl.int64:
        unsure = peak > 0x7FF0000000000000
    else:
        unsure = peak > 0x7F800000
    value = tl.where(_finite(peak), value, tl.where(unsure | (above & below), float("nan"), infinite))
    if input is not None:
        return tl.where(peak < 0, input.to(tl.float64), input.to(tl.float64) + value)
    else:
        return tl.where(peak < 0, 0, value)


_SUM = Elementwise("scatter_sum", _sum, keep=("input", "peak", "total", "low"))


@jit
def _scaled(value, by):
    return value * by


@jit
def _unmasked(grad, mask):
    return tl.where(mask != 0, 0, grad)


@jit
def hit(grad, hits):
    return tl.where(hits != 0, grad, 0)


SCALE = Elementwise("scale", _scaled)
UNMASKED = Elementwise("unmasked", _unmasked, keep=("mask",))


def wrapped(spots: Spots) -> Spots:
    """Negative indices count from the end."""
    return dataclasses.replace(spots, wraps=True)


def shifted(spots: Spots, by: int) -> Spots:
    """Every index reduced by ``by``."""
    return dataclasses.replace(spots, shift=by)


def put(out: Tensor, spots: Spots, source: Tensor) -> None:
    """``source`` at spots of which no two are the same."""
    _launch_write("store", out, spots, source)


def count(out: Tensor, where: Where) -> None:
    """``out`` += how often each element is a spot."""
    _launch_write("count", out, where(out))


def extreme(out: Tensor, where: Where, source: Tensor, least: bool, compute: torch.dtype) -> None:
    """``out``, ranks, raised (lowered if ``least``) to those of ``source`` at its spots."""
    _launch_write("min" if least else "max", out, where(out), source, compute=compute)


# -- products --------------------------------------------------------------------------------------------------------------


@jit
def _product(
    out, input, index, source, sizes, limits, out_strides, in_strides, index_strides, src_strides, index_step, src_step, count, n,
    s0, DIM: tl.constexpr, SELF: tl.constexpr, COMPUTE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Each element looks through the index for itself, in order: no hardware multiplies atomically.
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    rest = i * B + tl.arange(0, B)
    live = rest < n
    reach = live
    at_out, at_in, at_index, at_src, mine = rest * 0, rest * 0, rest * 0, rest * 0, rest * 0
    for d in tl.static_range(len(sizes) - 1, -1, -1):
        c = rest % sizes[d]
        rest = rest // sizes[d]
        at_out += c * out_strides[d]
        at_in += c * in_strides[d]
        if d == DIM:
            mine = c
        else:
            reach = reach & (c < limits[d])
            at_index += c * index_strides[d]
            at_src += c * src_strides[d]
    x = tl.load(input + at_in, live).to(COMPUTE)
    acc = x
    if not SELF:
        acc = tl.full((B,), 1, COMPUTE)
    hits = mine < 0
    for _j in range(count):
        hit = reach & (tl.load(index + at_index, reach, other=-1) == mine)
        if source is not None:
            v = tl.load(source + at_src, hit, other=1).to(COMPUTE)
            at_src += src_step
        else:
            v = tl.full((B,), 0, COMPUTE) + s0.to(COMPUTE)
        acc = tl.where(hit, acc * v, acc)
        hits = hits | hit
        at_index += index_step
    if not SELF:
        acc = tl.where(hits, acc, x)
    tl.store(out + at_out, acc.to(out.dtype.element_ty), live)


_PRODUCTS = {kind: fill(_product, "scatter_product", {"s0": kind} if kind else {}) for kind in ("", "fp64", "i64")}


def multiply(
    out: Tensor, input: Tensor, dim: int, index: Tensor, source: Tensor | Number, include_self: bool = True
) -> None:
    """``out`` = ``input`` times the product of ``source`` at each spot of :func:`along`, in the order of the index."""
    if not out.numel():
        return
    out, input, index = at_least_1d(out), at_least_1d(input), at_least_1d(index)
    tensor = at_least_1d(source) if isinstance(source, Tensor) else None
    dim %= out.ndim
    compute = compute_type(out.dtype)
    kind, number = typed(None if isinstance(source, Tensor) else source, compute)
    none = (0,) * out.ndim
    src = none if tensor is None else tuple(tensor.stride())
    spaces = [(t.shape, [tuple(t.stride())]) for t in (out, input, index, tensor) if t is not None]
    wide = any(_layout.is_wide(*space) for space in spaces)
    args = (
        out, input, index, tensor, tuple(out.shape), tuple(index.shape), tuple(out.stride()), tuple(input.stride()),
        tuple(index.stride()), src, index.stride(dim), src[dim], index.shape[dim] if index.numel() else 0, out.numel(), number,
    )  # fmt: skip
    meta = dict(DIM=dim, SELF=include_self, COMPUTE=TRITON[compute], B=256, WIDE=wide, num_warps=4)
    launch(_PRODUCTS[kind], (_layout.cdiv(out.numel(), 256),), args, meta)
