"""Drawn indices: from weights, and permutations. A seed is drawn on the device from torch's generator, without a host read."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import _launch, language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import cdiv, is_wide, next_power_of_2
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import copy
from gemskit.pointwise.copying import copy_
from gemskit.pointwise.random import _seed
from gemskit.reduce._select import topk_into
from gemskit.reduce._sort import sort_into
from gemskit.reduce.scans import cumsum


@jit
def _bits(seed, index):
    """Two words for each logical index, int32 or int64."""
    low = index.to(tl.uint32, bitcast=index.dtype.primitive_bitwidth == 32)
    high = (index.to(tl.int64) >> 32).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, low, high, high * 0, high * 0)
    return a, b


@jit
def _race(input, seed, index):
    """The weight over an exponential: the largest of them is each with the probability of its weight."""
    word, _ = _bits(seed, index)
    # In (0, 1): fine where it is small, as small times win.
    share = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    time = -libdevice.log1p(-tl.minimum(share, 0.99999994))
    return language.div(input, time.to(input.dtype))


@jit
def _key32(seed, index):
    word, _ = _bits(seed, index)
    return word.to(tl.int32, bitcast=True)


@jit
def _key64(seed, index):
    high, low = _bits(seed, index)
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


_RACE = Elementwise("multinomial_race", _race, keep=("seed",))
_KEYS = {
    torch.int32: Elementwise("randperm_keys", _key32, keep=("seed",)),
    torch.int64: Elementwise("randperm_keys", _key64, keep=("seed",)),
}


@jit
def _choose(
    out, sums, seed, samples, n, count, steps, row, col, out_row, out_col, B: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The first category whose running sum is above a uniform share of the whole; those without weight are never first."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * B + tl.arange(0, B)
    live = i < count
    r = i // samples
    whole = tl.load(sums + r * row + (n - 1) * col, live)
    word, _ = _bits(tl.load(seed), i)
    share = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    mark = whole * share.to(whole.dtype)
    low = i * 0
    high = low + (n - 1)
    for _ in range(steps):
        mid = low + (high - low) // 2
        open = live & (low < high)
        above = tl.load(sums + r * row + mid * col, open) > mark
        low = tl.where(open & (above == 0), mid + 1, low)
        high = tl.where(open & above, mid, high)
    tl.store(out + r * out_row + (i % samples) * out_col, low.to(tl.int64), live)


@operator(random=True, floats=("input",))
def _multinomial(input: Tensor, num_samples: int, replacement: bool, seed: Tensor | None) -> Tensor:
    """:func:`multinomial` with the numbers that ``seed`` (int64, 0-dim) draws; ``None`` draws from torch, on CPU tensors only."""
    return torch.multinomial(input, num_samples, replacement)


@_multinomial.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, num_samples: int, replacement: bool, seed: Tensor) -> None:
    (out,) = outs
    if not out.numel():
        return
    compute = compute_type(input.dtype)
    rows = input.shape[0] if input.ndim == 2 else 1
    if num_samples == 1 or not replacement:
        keys = torch.empty(input.shape, dtype=compute, device=input.device)
        _RACE({"input": input, "seed": seed}, [keys], compute)
        best = torch.empty(out.shape, dtype=compute, device=input.device)
        topk_into(best, out, keys, num_samples, -1, True)
        return
    sums = cumsum(input, -1, dtype=compute)
    n, count = input.shape[-1], out.numel()
    strides = (sums.stride(0) if input.ndim == 2 else 0, sums.stride(-1), out.stride(0) if input.ndim == 2 else 0)
    wide = is_wide((rows, n), []) or is_wide(out.shape, [out.stride()])
    block = min(256, next_power_of_2(count))
    arguments = (out, sums, seed, num_samples, n, count, n.bit_length(), *strides, out.stride(-1))
    launch(_choose, (cdiv(count, block),), arguments, dict(B=block, WIDE=wide, num_warps=4))


def multinomial(
    input: Tensor, num_samples: int, replacement: bool = False, *, generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``num_samples`` categories of each row of weights ``input`` (n,) or (m, n), float: (num_samples,) or (m, num_samples).

    Weights need not sum to 1; without ``replacement`` no category comes twice. The same seed gives the same categories. On
    an accelerator weights are not looked at: negative or infinite ones, or too few that are not zero, raise on the CPU only.
    Source: ``torch.multinomial``.
    """
    if not isinstance(input, Tensor) or not input.dtype.is_floating_point:
        raise DtypeError(f"multinomial: input must be a floating-point tensor, given {getattr(input, 'dtype', input)}")
    if input.ndim not in (1, 2) or not input.shape[-1]:
        raise ShapeError(f"multinomial: input has shape (n,) or (m, n) with n > 0, given {list(input.shape)}")
    if num_samples < 1 or (not replacement and num_samples > input.shape[-1]):
        most = "" if replacement else f" and at most {input.shape[-1]}, as there is no replacement"
        raise ArgumentError(f"multinomial: num_samples must be positive{most}; given {num_samples}")
    seed = _seed(input, generator)
    if seed is None:
        return torch.multinomial(input, num_samples, replacement, generator=generator, out=out)
    found = _multinomial(input.detach(), num_samples, replacement, seed)
    if out is None:
        return found
    if out.dtype != torch.int64:
        raise DtypeError(f"multinomial: out must be int64, given {out.dtype}")
    return copy_(out.resize_(found.shape), found)


#: Most elements that keys of 32 bits order: about one permutation in eight has two equal keys then.
_SHORT = 1 << 15


@operator(random=True)
def _randperm(seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """:func:`randperm` of ``seed`` (int64, 0-dim): the order of random keys."""
    return torch.randperm(n, dtype=dtype, device=seed.device)


@_randperm.kernel
def _(outs: tuple[Tensor, ...], keep: Any, seed: Tensor, n: int, dtype: torch.dtype) -> None:
    (out,) = outs
    if not n:
        return
    kind = torch.int32 if n <= _SHORT else torch.int64
    keys = torch.empty(n, dtype=kind, device=seed.device)
    _KEYS[kind]({"seed": seed}, [keys], kind)
    if dtype == torch.int64:
        return sort_into(None, out, keys, 0, False)
    order = torch.empty(n, dtype=torch.int64, device=seed.device)
    sort_into(None, order, keys, 0, False)
    copy(order, out)


def randperm(
    n: int, *, generator: torch.Generator | None = None, out: Tensor | None = None, dtype: torch.dtype = torch.int64,
    layout: torch.layout = torch.strided, device: torch.device | str | int | None = None, pin_memory: bool = False,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """The numbers from 0 to ``n - 1`` in random order. The same seed gives the same order. Source: ``torch.randperm``."""
    if n < 0:
        raise ArgumentError(f"randperm: n must not be negative, given {n}")
    if layout is not torch.strided:
        raise ArgumentError(f"randperm: layout must be torch.strided, given {layout}")
    # One element that says where: nothing is read of it.
    place = torch.empty(0, dtype=torch.int64, device=device) if out is None else out
    if not _launch.has_kernels(place.device):
        if out is not None:
            return torch.randperm(n, generator=generator, out=out)
        return torch.randperm(
            n, generator=generator, dtype=dtype, device=device, pin_memory=pin_memory, requires_grad=requires_grad
        )
    seed = _seed(place, generator)
    assert seed is not None
    found = _randperm(seed, n, dtype if out is None else out.dtype)
    if out is None:
        return found.requires_grad_(requires_grad)
    return copy_(out.resize_(n), found)
