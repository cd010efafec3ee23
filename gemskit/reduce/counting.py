"""How often values occur."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemskit import _layout, backends, language
from gemskit._bind import fill
from gemskit._dtypes import TRITON, Number, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit._sized import sized
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import clear
from gemskit.reduce._block_count import MOST, THREADS, counted, places
from gemskit.reduce._block_order import WARPS
from gemskit.reduce._compact import read
from gemskit.reduce._fold import Fold
from gemskit.reduce.searching import search

#: Most bins that a program counts by itself; more are counted by atomic adds of integers, which are exact in any order.
_OWN = 1024
#: Elements of a thread that are counted in shared memory at once, and its registers for float32: five programs on a
#: multiprocessor. Of 64 bits they would spill.
_PER, _REGISTERS = 16, 48


@jit
def _count(
    counts, input, low, high, span, sizes, strides, n, part, bins,
    COMPUTE: tl.constexpr, OWN: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    if WIDE:
        piece = piece.to(tl.int64)
    first = piece * part
    stop = tl.minimum(first + part, n)
    lo, hi = _range(low, high, span, COMPUTE)
    own = tl.zeros((OWN if OWN else 1,), tl.int32)
    RANGE: tl.constexpr = low is not None or span is not None
    for start in range(first, stop, B):
        i = start + tl.arange(0, B)
        live = i < stop
        x = tl.load(input + offset(i, sizes, strides), live).to(COMPUTE)
        at, live = _bin(x, live, lo, hi, bins, RANGE, OWN > 0)
        if OWN:
            own += tl.histogram(tl.where(live, at, 0).to(tl.int32), OWN, live)
        else:
            tl.atomic_add(counts + at, tl.full((B,), 1, counts.dtype.element_ty), live, sem="relaxed")
    if OWN:
        bin = tl.arange(0, OWN)
        tl.store(counts + piece * bins + bin, own, bin < bins)


@gluon.jit
def _count_shared(
    counts, input, low, high, span, sizes, strides, n, part, bins,
    COMPUTE: gl.constexpr, OWN: gl.constexpr, PER: gl.constexpr, V: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`_count`, in shared memory; a thread reads V elements side by side."""
    piece = gl.program_id(0)
    if WIDE:
        piece = piece.to(gl.int64)
    first = piece * part
    stop = gl.minimum(first + part, n)
    lo, hi = _range(low, high, span, COMPUTE)
    RANGE: gl.constexpr = low is not None or span is not None
    place, bin, of_thread = places(PER, V)
    own = place * 0
    for start in range(first, stop, place.shape[1] * PER):
        i = start + place
        live = i < stop
        x = gl.load(input + offset(i, sizes, strides), live).to(COMPUTE)
        at, live = _bin(x, live, lo, hi, bins, RANGE, True)
        own += counted(gl.where(live, at, OWN).to(gl.int32), OWN)
    gl.store(counts + piece * bins + bin, own, (of_thread < OWN // place.shape[1]) & (bin < bins))


@jit
def _bin(x, live, lo, hi, bins, RANGE: tl.constexpr, FEW: tl.constexpr):
    """The bin of ``x``, and whether it has one: of equal bins from ``lo`` to ``hi``, or its value."""
    if RANGE:
        live = live & (x >= lo) & (x <= hi)
        if x.dtype.is_floating():
            share = _divided((x - lo) * bins, hi - lo)
            at = share.to(tl.int32) if FEW else share.to(tl.int64)
        else:
            at = (x - lo) * bins // tl.maximum(hi - lo, 1)
        at = tl.minimum(at, bins - 1)
    else:
        live = live & (x >= 0) & (x < bins)
        at = x.to(tl.int64)
    return at, live


@jit
def _divided(x, width):
    """``x / width``, correctly rounded; by one division for all where ``width`` is far from the ends of its type's range."""
    if x.dtype == tl.float32:
        if (width > 2.0**-60) & (width < 2.0**60):
            inverse = language.div(width * 0 + 1, width)
            share = x * inverse
            # Triton spends an instruction on the sign of a tensor.
            share = tl.math.fma(tl.math.fma(share, -width, x), inverse, share)
            share = tl.math.fma(tl.math.fma(share, -width, x), inverse, share)
        else:
            share = language.div(x, width)
        return share
    else:
        return language.div(x, width)


@jit
def _range(low, high, span, COMPUTE: tl.constexpr):
    """The first and the last edge: given, or those of the data."""
    if span is not None:
        lo, hi = tl.load(span).to(COMPUTE), tl.load(span + 1).to(COMPUTE)
        same = (lo == hi).to(COMPUTE)
        return lo - same, hi + same
    elif low is not None:
        return low.to(COMPUTE), high.to(COMPUTE)
    else:
        return 0, 0


@jit
def _finish(out, counts, span, step, bins, pieces, P: tl.constexpr, B: tl.constexpr):
    bin = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((P, B), tl.int64)
    for start in range(0, pieces, P):
        piece = (start + tl.arange(0, P))[:, None]
        total += tl.load(counts + piece * bins + bin[None, :], (piece < pieces) & (bin < bins)[None, :], other=0)
    result = tl.sum(total, 0).to(out.dtype.element_ty)
    if span is not None:
        # A range that is not finite, which torch refuses, shows without a wait for the device.
        width = tl.load(span + 1) - tl.load(span)
        result = tl.where(width - width == 0, result, float("nan")).to(out.dtype.element_ty)
    tl.store(out + bin.to(tl.int64) * step, result, bin < bins)


@jit
def _twice(input):
    return input, input


@jit
def _both(a, b, c, d):
    return language.minimum(a, c), language.maximum(b, d)


_SPAN = Fold("histogram_span", map=_twice, combine=_both, identity=("highest", "lowest"), state=("compute", "compute"))
#: By the type of the edges.
_COUNT, _COUNT_SHARED = (
    {kind: fill(count, name, {"low": kind, "high": kind} if kind else None) for kind in ("", "fp64", "i64")}
    for count, name in ((_count, "histogram"), (_count_shared, "histogram_shared"))
)


def _span(input: Tensor) -> Tensor:
    """The smallest and the largest element, of at least one."""
    compute = compute_type(input.dtype)
    found = torch.empty(2, dtype=compute, device=input.device)
    shape = tuple(input.shape) or (1,)
    ends = [found[k : k + 1].view((1,) * len(shape)) for k in (0, 1)]
    _SPAN({"input": input}, ends, shape, tuple(range(len(shape))), compute)
    return found


def _histogram(
    out: Tensor, input: Tensor, edges: tuple[Number, Number] | None, span: Tensor | None, compute: torch.dtype
) -> None:
    """Into ``out`` how many elements lie in each of its equal bins between edges; without any, how often each bin occurs."""
    n, bins = input.numel(), out.numel()
    config = backends.arch().config("histogram")
    shared = config["shared"] if bins <= MOST else 0
    tile = THREADS * _PER if shared else config["tile"]
    own = max(THREADS if shared else 1, _layout.next_power_of_2(bins)) if shared or bins <= _OWN else 0
    part = _layout.cdiv(_layout.cdiv(max(n, 1), shared or config["pieces"]), tile) * tile
    pieces = _layout.cdiv(n, part)
    sizes, strides = _layout.collapse(input.shape, [tuple(input.stride())])
    rows = pieces if own else 1
    wide = _layout.any_wide(input) or rows * bins >= 2**31
    counts = torch.empty((rows, bins), dtype=torch.int64 if n >= 2**31 else torch.int32, device=input.device)
    if not own:
        clear(counts)
    kind = "" if edges is None else "fp64" if compute.is_floating_point else "i64"
    low, high = edges or (None, None)
    meta: dict[str, Any] = dict(COMPUTE=TRITON[compute], OWN=own, WIDE=wide)
    arguments = (counts, input, low, high, span, sizes, *strides, n, part, bins)
    if n and shared:
        width = min(_PER, 16 // input.element_size()) if strides[0][-1:] == (1,) else 1
        if compute == torch.float32:
            meta["maxnreg"] = _REGISTERS
        launch(_COUNT_SHARED[kind], (pieces,), arguments, dict(meta, PER=_PER, V=width, num_warps=WARPS))
    elif n:
        launch(_COUNT[kind], (pieces,), arguments, dict(meta, B=tile, num_warps=config["warps"]))
    # All pieces at once, of the bins of a sector: one after the other they take 89 us on an H200.
    at_once = min(_layout.next_power_of_2(rows), 1024)
    block = min(max(8, 128 // at_once), _layout.next_power_of_2(bins))
    meta = dict(P=at_once, B=block, num_warps=4)
    launch(_finish, (_layout.cdiv(bins, block),), (out, counts, span, out.stride(0), bins, rows if n else 0), meta)


@operator(aten="histc")
def histc(
    input: Tensor, bins: int = 100, min: Number = 0, max: Number = 0, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """How many elements lie in each of ``bins`` equal bins from ``min`` to ``max``, both included: (bins,), in input's dtype.

    Equal bounds stand for those of the data. Elements outside and NaN are left out; halves are computed in float32, and ints
    are taken too. A range that is not finite raises on the CPU; on an accelerator all counts are NaN. Source: ``torch.histc``.
    """
    if input.dtype == torch.bool:
        raise DtypeError("histc: input is a bool tensor, which torch refuses too; convert it to uint8")
    if input.dtype in (torch.float32, torch.float64):
        return torch.histc(input, bins, min, max)
    if input.dtype.is_floating_point:
        return torch.histc(input.float(), bins, min, max).to(input.dtype)
    return torch.histc(input.double(), bins, int(min), int(max)).to(input.dtype)


@histc.kernel
def _(outs: tuple[Tensor], keep: Any, input: Tensor, bins: int, min: Number, max: Number) -> None:
    compute = compute_type(input.dtype) if input.dtype.is_floating_point else torch.int64
    min, max = (float(min), float(max)) if compute.is_floating_point else (int(min), int(max))
    if not (math.isfinite(min) and math.isfinite(max)):
        raise ArgumentError(f"histc: min and max must be finite, given {min} and {max}")
    if min > max:
        raise ArgumentError(f"histc: max must be larger than min, given min {min} and max {max}")
    if min != max:
        _histogram(outs[0], input, (min, max), None, compute)
    elif not input.numel():
        _histogram(outs[0], input, (min - 1, max + 1), None, compute)
    else:
        _histogram(outs[0], input, None, _span(input), compute)


@jit
def _weigh(out, weights, order, starts, step, ACC: tl.constexpr, B: tl.constexpr):
    # One program sums the weights of a bin in the order of the input.
    bin = tl.program_id(0)
    first, stop = tl.load(starts + bin), tl.load(starts + bin + 1)
    total = tl.zeros((B,), ACC)
    for start in range(first, stop, B):
        i = start + tl.arange(0, B)
        at = tl.load(order + i, i < stop, other=0)
        total += tl.load(weights + at * step, i < stop, other=0).to(ACC)
    tl.store(out + bin.to(tl.int64), tl.sum(total, 0))


@jit
def _index(index):
    return index


_INDEX = Elementwise("bincount_index", _index)


@sized(aten="bincount")
def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """How often each value of ``input`` (n,), ints from 0, occurs: (max + 1,) or (minlength,), int64.

    With ``weights`` (n,) their sums: float32 of float32, else float64; repeatable, as they are added in sorted order. The
    host reads the smallest and the largest value. Source: ``torch.bincount``.
    """
    return torch.bincount(input, weights, minlength)


@bincount.kernel
def _(keep: Any, input: Tensor, weights: Tensor | None, minlength: int) -> tuple[Tensor]:
    if input.dtype.is_floating_point or input.dtype == torch.bool or input.ndim != 1:
        raise DtypeError(f"bincount: input must be a vector of ints, given {input.dtype} {list(input.shape)}")
    if weights is not None and weights.shape != input.shape:
        raise ShapeError(f"bincount: weights {list(weights.shape)} must have the shape of input {list(input.shape)}")
    if minlength < 0:
        raise ArgumentError(f"bincount: minlength must not be negative, given {minlength}")
    bins = minlength
    if input.numel():
        least, most = read(_span(input))
        if least < 0:
            raise ArgumentError(f"bincount: input must not be negative, its smallest element is {least}")
        bins = max(bins, most + 1)
    if weights is None or not input.numel():
        out = torch.empty(bins, dtype=torch.int64, device=input.device)
        if bins:
            _histogram(out, input, None, None, torch.int64)
        return (out,)
    return (_weighted(input, weights, bins),)


def _weighted(input: Tensor, weights: Tensor, bins: int) -> Tensor:
    # At the head of this file the two would import each other.
    from gemskit.reduce.sorting import sort

    dtype = torch.float32 if weights.dtype == torch.float32 else torch.float64
    ordered, order = sort(input, 0, stable=True)
    index = torch.empty(bins + 1, dtype=torch.int64, device=input.device)
    _INDEX({}, [index], torch.int64)
    starts = torch.empty_like(index)
    search(starts, index, ordered)
    out = torch.empty(bins, dtype=dtype, device=input.device)
    meta = dict(ACC=TRITON[dtype], B=1024, num_warps=4)
    launch(_weigh, (bins,), (out, weights, order, starts, weights.stride(0)), meta)
    return out
