"""The kernels of group norm for rows that fit registers: a row is a tile of channels and positions, read once.

In a space of (rows, columns) weights would vary along both, and every element would be divided by the number of positions to find
its channel. Here the channel is an axis of the tile: a weight is loaded once per channel, and the sums that are the gradients of
weight and bias are sums along the other axis. Longer rows are folded and then mapped (:mod:`gemskit.nn.group_norm`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._bind import fill
from gemskit._dtypes import TRITON, scalar_annotation
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset


@jit
def _load(p, at, live, COMPUTE: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p + at).to(COMPUTE)
    else:
        return tl.load(p + at, live, other=0).to(COMPUTE)


@jit
def _store(p, at, v, live, EVEN: tl.constexpr):
    if EVEN:
        tl.store(p + at, v.to(p.dtype.element_ty))
    else:
        tl.store(p + at, v.to(p.dtype.element_ty), live)


@jit
def _where(row, chan, spot, strides, groups, channels, spot_sizes):
    """Element offsets, by the strides of samples and channels and those of positions."""
    n, g = row // groups, row % groups
    return n * strides[0] + (g * channels + chan) * strides[1] + offset(spot, spot_sizes, strides[2])


@jit
def _place(rows, channels, spots, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr):
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row = (i * BM + tl.arange(0, BM))[:, None, None]
    chan = tl.arange(0, BC)[None, :, None]
    spot = tl.arange(0, BS)[None, None, :]
    return row, chan, spot, (row < rows) & (chan < channels) & (spot < spots)


@jit
def _total(v):
    return tl.sum(tl.sum(v, 2, keep_dims=True), 1, keep_dims=True)


@jit
def _forward(
    out, mean_out, rstd_out, input, weight, bias, out_strides, in_strides, weight_stride, bias_stride, spot_sizes,
    rows, groups, channels, spots, s0,
    COMPUTE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, chan, spot, live = _place(rows, channels, spots, BM, BC, BS, WIDE)
    x = _load(input, _where(row, chan, spot, in_strides, groups, channels, spot_sizes), live, COMPUTE, EVEN)
    channel = (row % groups) * channels + chan
    count = tl.zeros((BM, 1, 1), COMPUTE) + channels * spots
    mean = language.div(_total(x), count)
    d = x - mean
    if not EVEN:
        d = tl.where(live, d, 0)
    rstd = 1 / language.sqrt(language.div(_total(d * d), count) + s0)
    y = d * rstd
    if weight is not None:
        y = y * _load(weight, channel * weight_stride, (row < rows) & (chan < channels), COMPUTE, EVEN)
    if bias is not None:
        y = y + _load(bias, channel * bias_stride, (row < rows) & (chan < channels), COMPUTE, EVEN)
    if mean_out is not None:
        tl.store(mean_out + row, mean, row < rows)
        tl.store(rstd_out + row, rstd, row < rows)
    _store(out, _where(row, chan, spot, out_strides, groups, channels, spot_sizes), y, live, EVEN)


@jit
def _backward(
    out, bias_sums, weight_sums, grad, input, mean, rstd, weight, out_strides, grad_strides, in_strides, mean_strides,
    rstd_strides, weight_stride, spot_sizes, rows, groups, channels, spots,
    COMPUTE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, chan, spot, live = _place(rows, channels, spots, BM, BC, BS, WIDE)
    g = _load(grad, _where(row, chan, spot, grad_strides, groups, channels, spot_sizes), live, COMPUTE, EVEN)
    x = _load(input, _where(row, chan, spot, in_strides, groups, channels, spot_sizes), live, COMPUTE, EVEN)
    m = _load(mean, row // groups * mean_strides[0] + row % groups * mean_strides[1], row < rows, COMPUTE, False)
    r = _load(rstd, row // groups * rstd_strides[0] + row % groups * rstd_strides[1], row < rows, COMPUTE, False)
    some = (row < rows) & (chan < channels)
    x = (x - m) * r
    if not EVEN:
        # Outside g is 0, but 0 * NaN is not.
        x = tl.where(live, x, 0)
    by_channel = tl.sum(g, 2, keep_dims=True)
    dots = tl.sum(g * x, 2, keep_dims=True)
    if bias_sums is not None:
        tl.store(bias_sums + row * channels + chan, by_channel, some)
        tl.store(weight_sums + row * channels + chan, dots, some)
    if weight is not None:
        w = _load(weight, ((row % groups) * channels + chan) * weight_stride, some, COMPUTE, EVEN)
        g, by_channel, dots = g * w, by_channel * w, dots * w
    count = tl.zeros((BM, 1, 1), COMPUTE) + channels * spots
    total = tl.sum(by_channel, 1, keep_dims=True) / count
    dot = tl.sum(dots, 1, keep_dims=True) / count
    dx = (g - total - x * dot) * r
    _store(out, _where(row, chan, spot, out_strides, groups, channels, spot_sizes), dx, live, EVEN)


@functools.cache
def _filled(driver: Any, name: str, compute: torch.dtype) -> Any:
    return fill(driver, name, {"s0": scalar_annotation(compute)})


@dataclass(frozen=True)
class Tile:
    """How rows are cut, and where their elements are."""

    rows: int
    groups: int
    channels: int
    spots: int
    spot_sizes: tuple[int, ...]
    #: Of every tensor: strides of samples and channels, and those of positions.
    strides: tuple[tuple[int, int, tuple[int, ...]], ...]
    meta: dict[str, Any]
    grid: int


def tile(tensors: Sequence[Tensor], groups: int, compute: torch.dtype, most: int) -> Tile | None:
    """The tiles of ``tensors`` (N, C, ...), or None where a row has more than ``most`` elements of four bytes."""
    first = tensors[0]
    samples, channels = first.shape[0], first.shape[1] // groups
    rows = samples * groups
    sizes, spot_strides = _layout.collapse(first.shape[2:], [tuple(t.stride()[2:]) for t in tensors])
    spots = first.numel() // max(samples * groups * channels, 1)
    if not first.numel():
        return None
    bc, bs = _layout.next_power_of_2(channels), _layout.next_power_of_2(spots)
    size = max(4, compute.itemsize)
    most = most * 16 // size**2
    if bc * bs > most:
        return None
    config = backends.arch().config("rowwise")
    bm = max(1, config["short"] // (bc * bs))
    if first.stride(1) == 1 and spots > 1:
        # Channels are neighbours in memory: enough of them for whole lines.
        bm = max(bm, min(config["across"] // bc, most // (bc * bs)))
    bm = min(bm, _layout.next_power_of_2(rows))
    elements = bm * bc * bs
    meta = dict(
        COMPUTE=TRITON[compute],
        EVEN=rows % bm == 0 and bc == channels and bs == spots,
        BM=bm,
        BC=bc,
        BS=bs,
        WIDE=_layout.is_wide(tuple(first.shape), [tuple(t.stride()) for t in tensors]),
        num_warps=min(config["warps"], max(1, elements * size // 2048)),
    )
    strides = tuple((t.stride(0), t.stride(1), s) for t, s in zip(tensors, spot_strides))
    return Tile(rows, groups, channels, spots, sizes, strides, meta, _layout.cdiv(rows, bm))


def forward(
    how: Tile, out: Tensor, rows: tuple[Tensor | None, Tensor | None], input: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, compute: torch.dtype,
) -> None:  # fmt: skip
    """Group norm into ``out``, and mean and ``1 / sqrt(var + eps)`` into ``rows`` if they are wanted."""
    steps = [0 if v is None else v.stride(0) for v in (weight, bias)]
    arguments = (
        out, *rows, input, weight, bias, *how.strides, *steps, how.spot_sizes, how.rows, how.groups, how.channels, how.spots, eps,
    )  # fmt: skip
    launch(_filled(_forward, "group_norm", compute), (how.grid,), arguments, how.meta)


def backward(
    how: Tile, out: Tensor, sums: tuple[Tensor | None, Tensor | None], grad: Tensor, input: Tensor, mean: Tensor,
    rstd: Tensor, weight: Tensor | None, compute: torch.dtype,
) -> None:  # fmt: skip
    """The gradient of the input into ``out``, and those of bias and weight of every sample and channel into ``sums``."""
    arguments = (
        out, *sums, grad, input, mean, rstd, weight, *how.strides, tuple(mean.stride()[:2]), tuple(rstd.stride()[:2]),
        0 if weight is None else weight.stride(0), how.spot_sizes, how.rows, how.groups, how.channels, how.spots,
    )  # fmt: skip
    launch(_filled(_backward, "group_norm_grad", compute), (how.grid,), arguments, how.meta)
