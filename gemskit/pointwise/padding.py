"""Padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import _layout, backends
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Op, operator
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.pointwise._place import MODES, REFLECT, REPLICATE, SAME, WRAP, Axis, narrow, place

_MODES = {"constant": "window", "reflect": "reflect", "replicate": "replicate", "circular": "wrap"}


def _sides(pad: Sequence[int], ndim: int) -> list[tuple[int, int]]:
    """What is added before and after each dimension; ``pad`` begins with the last one."""
    sides = [(pad[k], pad[k + 1]) for k in range(0, len(pad), 2)]
    return [(0, 0)] * (ndim - len(sides)) + sides[::-1]


def _padded(out: Tensor, input: Tensor, pad: Sequence[int], mode: str, value: float = 0) -> None:
    axes = []
    for d, (left, right) in enumerate(_sides(pad, input.ndim)):
        if mode == "circular" and min(left, right) < 0:
            # What is cut off does not come back at the other end.
            input = input.narrow(d, max(0, -left), input.shape[d] + min(left, 0) + min(right, 0))
            left = max(left, 0)
        axes.append(Axis(_MODES[mode], left) if left or right else SAME)
    place(out, input, axes, value=value)


def _gradient(grad: Tensor, pad: Sequence[int], mode: str, like: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
    shape, dtype = like
    sides = _sides(pad, len(shape))
    if mode == "constant":
        if min(pad, default=0) < 0:
            axes = [Axis("window", -left) if left or right else SAME for left, right in sides]
            return place(torch.empty(shape, dtype=dtype, device=grad.device), grad, axes)
        for d, (left, _) in enumerate(sides):
            grad = narrow(grad, d, left, shape[d])
        return grad
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    inner, whole = dx, dx
    if mode == "circular" and min(pad, default=0) < 0:
        for d, (left, right) in enumerate(sides):
            inner = inner.narrow(d, max(0, -left), shape[d] + min(left, 0) + min(right, 0))
        sides = [(max(left, 0), max(right, 0)) for left, right in sides]
        inner = torch.empty(inner.shape, dtype=dtype, device=grad.device)
    _unpadded(inner, grad, sides, _MODES[mode])
    if inner is not whole:
        lefts = [left for left, _ in _sides(pad, len(shape))]
        place(whole, inner, [Axis("window", max(0, -left)) for left in lefts])
    return whole


@jit
def _reads(q, size, width, left, MODE: tl.constexpr):
    """Whether position ``q`` of ``size`` was read more often than once, or not at its place."""
    p = q + left
    if MODE == REFLECT:
        return (q <= left) | (q >= 2 * (size - 1) + left - width)
    elif MODE == REPLICATE:
        return (q == 0) | (q == size - 1)
    elif MODE == WRAP:
        return (p >= size) | (p + size < width)
    else:
        return q < 0


@jit
def _reader(q, turn, size, width, left, MODE: tl.constexpr):
    """The position in the padded dimension that reads ``q`` in this turn, and whether there is one."""
    p = q + left
    real = q < size
    if MODE == REFLECT:
        p = tl.where(turn == 1, left - q, tl.where(turn == 2, left + 2 * (size - 1) - q, p))
        real = real & ((turn != 1) | (q > 0)) & ((turn != 2) | (q < size - 1))
    elif MODE == REPLICATE:
        first, last = q == 0, q == size - 1
        p = tl.where(first, turn, tl.where(last, p + turn, p))
        real = real & ((turn == 0) | first | last) & ((first == 0) | (p <= left) | last)
    elif MODE == WRAP:
        p += tl.where(turn % 2 == 1, -((turn + 1) // 2), turn // 2) * size
    return p, real & (p >= 0) & (p < width)


@jit(repr=lambda _: "unpad")
def _unpad(
    out, grad, lead, sizes, widths, lefts, turns, out_lead, grad_lead, out_strides, grad_strides,
    MODES: tl.constexpr, ACC: tl.constexpr, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every element of the input sums the gradients of those that read it."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    t0, t1 = tl.cdiv(sizes[2], B0), tl.cdiv(sizes[1], B1)
    q0 = ((i % t0) * B0 + tl.arange(0, B0))[None, :]
    i = i // t0
    q1 = ((i % t1) * B1 + tl.arange(0, B1))[:, None]
    i = i // t1
    q2 = i % sizes[0]
    i = i // sizes[0]
    many0 = tl.max(_reads(q0, sizes[2], widths[2], lefts[2], MODES[2]).to(tl.int32)) * (turns[2] - 1) + 1
    many1 = tl.max(_reads(q1, sizes[1], widths[1], lefts[1], MODES[1]).to(tl.int32)) * (turns[1] - 1) + 1
    many2 = _reads(q2, sizes[0], widths[0], lefts[0], MODES[0]).to(tl.int32) * (turns[0] - 1) + 1
    base = offset(i, lead, grad_lead)
    total = tl.zeros((B1, B0), ACC)
    for a in range(many2):
        p2, ok2 = _reader(q2, a, sizes[0], widths[0], lefts[0], MODES[0])
        for b in range(many1):
            p1, ok1 = _reader(q1, b, sizes[1], widths[1], lefts[1], MODES[1])
            for c in range(many0):
                p0, ok0 = _reader(q0, c, sizes[2], widths[2], lefts[2], MODES[2])
                at = base + p2 * grad_strides[0] + p1 * grad_strides[1] + p0 * grad_strides[2]
                total += tl.load(grad + at, ok2 & ok1 & ok0, other=0).to(ACC)
    to = offset(i, lead, out_lead) + q2 * out_strides[0] + q1 * out_strides[1] + q0 * out_strides[2]
    tl.store(out + to, total.to(out.dtype.element_ty), (q1 < sizes[1]) & (q0 < sizes[2]))


def _unpadded(out: Tensor, grad: Tensor, sides: Sequence[tuple[int, int]], mode: str) -> None:
    if not out.numel():
        return
    fill = max(0, 3 - out.ndim)
    inner, wide = (t.reshape((1,) * fill + tuple(t.shape)) if fill else t for t in (out, grad))
    sides = [(0, 0)] * fill + list(sides)
    lead, (out_lead, grad_lead) = _layout.collapse(inner.shape[:-3], [inner.stride()[:-3], wide.stride()[:-3]])
    sizes, widths, pads = tuple(inner.shape[-3:]), tuple(wide.shape[-3:]), sides[-3:]
    turns = []
    for n, width, (left, right) in zip(sizes, widths, pads):
        if mode == "wrap":
            turns.append(2 * max(_layout.cdiv(left, n), _layout.cdiv(right, n)) + 1)
        elif mode == "replicate":
            turns.append(width if n == 1 else max(left, right, 0) + 1)
        else:
            turns.append(3)
    config = backends.arch().config("pointwise")
    b0 = min(config["block"], _layout.next_power_of_2(sizes[2]))
    b1 = min(max(1, config["block"] // b0), _layout.next_power_of_2(sizes[1]))
    grid = _layout.cdiv(sizes[2], b0) * _layout.cdiv(sizes[1], b1) * sizes[0]
    for n in lead:
        grid *= n
    wide_offsets = _layout.any_wide(wide, inner)
    modes = tuple(MODES.index(mode) if pad != (0, 0) else 0 for pad in pads)
    meta = dict(
        MODES=modes, ACC=TRITON[compute_type(out.dtype)], B1=b1, B0=b0, WIDE=wide_offsets, num_warps=config["warps"]
    )
    lefts = tuple(left for left, _ in pads)
    strides = (out_lead, grad_lead, tuple(inner.stride()[-3:]), tuple(wide.stride()[-3:]))
    launch(_unpad, (grid,), (out, grad, lead, sizes, widths, lefts, tuple(turns), *strides), meta)


def _check(name: str, input: Tensor, mode: str) -> None:
    if mode in ("reflect", "replicate") and input.dtype == torch.bool:
        raise DtypeError(
            f"{name}: mode {mode!r} takes no bools, given {input.dtype}; accepted: floating point and ints"
        )


def _once(input: Tensor, pad: Sequence[int]) -> None:
    """torch would read what it has not written yet."""
    if len(pad) % 2 == 0 and len(pad) <= 2 * input.ndim:
        for d, (left, right) in enumerate(_sides(pad, input.ndim)):
            rest = input.shape[d] + min(left, 0) + min(right, 0)
            if max(left, right) > rest and min(left, right) < 0:
                raise ShapeError(
                    f"pad: dimension {d} would wrap around more than once: {rest} elements are left of "
                    f"{list(input.shape)}, given {(left, right)}"
                )


@operator(aten="pad")
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """``input`` with ``pad[0]`` elements before and ``pad[1]`` after its last dimension, then those of the last but one, ...

    ``mode``: ``"constant"`` (``value``, 0 by default), ``"reflect"``, ``"replicate"`` (up to three dimensions) or
    ``"circular"``. Negative numbers cut off. Source: ``torch.nn.functional.pad``.
    """
    if mode not in _MODES:
        raise ArgumentError(f"pad: mode is {mode!r}; accepted: {', '.join(_MODES)}")
    _check("pad", input, mode)
    if mode == "circular":
        _once(input, pad)
    return F.pad(input, list(pad), mode, value)


@pad.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, pad: Sequence[int], mode: str, value: float | None
) -> None:  # fmt: skip
    _padded(outs[0], input, pad, mode, _fitting(value, input.dtype))


def _fitting(value: float | None, dtype: torch.dtype) -> float:
    """``value`` as it stands in a tensor of ``dtype``."""
    if value is None:
        return 0
    if dtype == torch.bool:
        return bool(value)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if limits.min <= value <= limits.max:
        return value if dtype.is_floating_point else int(value)
    if dtype.is_floating_point and not math.isfinite(value):
        return value
    raise ArgumentError(f"pad: value {value!r} does not fit into {dtype}; accepted: {limits.min} to {limits.max}")


@pad.gradient_by
def _(grad: Tensor, pad: Sequence[int], mode: str, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": _gradient(grad, pad, mode, like["input"])}


def _attach(op: Op[..., Tensor], mode: str) -> None:
    def kernel(outs: tuple[Tensor, ...], keep: Any, input: Tensor, padding: Sequence[int]) -> None:
        _padded(outs[0], input, padding, mode)

    def gradient(grad: Tensor, padding: Sequence[int], like: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input": _gradient(grad, padding, mode, like["input"])}

    op.kernel(kernel)
    op.gradient_by(gradient)


def _meant(name: str, mode: str, input: Tensor, padding: Sequence[int]) -> Tensor:
    _check(name, input, mode)
    run: Callable[..., Tensor] = getattr(torch.ops.aten, name)
    return run(input, list(padding))


@operator(aten="reflection_pad1d")
def reflection_pad1d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last dimension of ``input`` (2 or 3) by ``padding`` (2 numbers), mirrored."""
    return _meant("reflection_pad1d", "reflect", input, padding)


@operator(aten="reflection_pad2d")
def reflection_pad2d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last two dimensions of ``input`` (3 or 4) by ``padding`` (4 numbers), mirrored."""
    return _meant("reflection_pad2d", "reflect", input, padding)


@operator(aten="reflection_pad3d")
def reflection_pad3d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last three dimensions of ``input`` (4 or 5) by ``padding`` (6 numbers), mirrored."""
    return _meant("reflection_pad3d", "reflect", input, padding)


@operator(aten="replication_pad1d")
def replication_pad1d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last dimension of ``input`` (2 or 3) by ``padding`` (2 numbers) copies of its ends."""
    return _meant("replication_pad1d", "replicate", input, padding)


@operator(aten="replication_pad2d")
def replication_pad2d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last two dimensions of ``input`` (3 or 4) by ``padding`` (4 numbers) copies of its edges."""
    return _meant("replication_pad2d", "replicate", input, padding)


@operator(aten="replication_pad3d")
def replication_pad3d(input: Tensor, padding: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """:func:`pad` of the last three dimensions of ``input`` (4 or 5) by ``padding`` (6 numbers) copies of its faces."""
    return _meant("replication_pad3d", "replicate", input, padding)


for _op in (reflection_pad1d, reflection_pad2d, reflection_pad3d):
    _attach(_op, "reflect")
for _op in (replication_pad1d, replication_pad2d, replication_pad3d):
    _attach(_op, "replicate")
