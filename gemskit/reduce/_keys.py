"""Elements as keys, which are signed integers in the same order, and a tensor as rows to be sorted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit


@jit
def key_of(x, DESCENDING: tl.constexpr):
    """A signed integer in the order of the elements: int64 for elements of 64 bits, else int32."""
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    if x.dtype.is_floating():
        if bits == 64:
            b = x.to(tl.int64, bitcast=True)
            infinity: tl.constexpr = 0x7FF0000000000000
        elif bits == 32:
            b = x.to(tl.int32, bitcast=True)
            infinity: tl.constexpr = 0x7F800000
        else:
            b = x.to(tl.int16, bitcast=True).to(tl.int32)
            infinity: tl.constexpr = 0x7C00 if x.dtype == tl.float16 else 0x7F80
        most: tl.constexpr = 2 ** (bits - 1) - 1
        size = b & most
        key = b ^ ((b >> (bits - 1)) & most)
        key = tl.where(size > infinity, most, tl.where(size == 0, 0, key))
    elif bits == 64:
        key = x
    elif x.dtype == tl.uint8 or x.dtype == tl.int1:
        key = x.to(tl.int32) - 128
    else:
        key = x.to(tl.int32)
    return ~key if DESCENDING else key


@jit
def store_element(out, x, key, at, live, DESCENDING: tl.constexpr):
    """Store to ``out`` the element of ``key``; that at ``x + at`` where the key does not tell (zeros and NaNs)."""
    ty: tl.constexpr = x.dtype.element_ty
    bits: tl.constexpr = ty.primitive_bitwidth
    if DESCENDING:
        key = ~key
    if ty.is_floating():
        most: tl.constexpr = 2 ** (bits - 1) - 1
        b = key ^ ((key >> (bits - 1)) & most)
        value = (b.to(tl.int16) if bits == 16 else b).to(ty, bitcast=True)
        value = tl.load(x + at, live & ((key == 0) | (key == most)), other=value)
    elif ty == tl.int1:
        value = key + 128 != 0
    elif ty == tl.uint8:
        value = (key + 128).to(ty)
    else:
        value = key.to(ty)
    tl.store(out, value, live)


@dataclass(frozen=True)
class Rows:
    """``x`` as rows along ``dim``, and the results beside it."""

    rows: int
    cols: int
    sizes: tuple[int, ...]
    #: Strides of the rows of x, values and indices, and those along them.
    by_row: tuple[tuple[int, ...], ...]
    by_col: tuple[int, ...]
    wide: bool

    @classmethod
    def of(cls, x: Tensor, values: Tensor | None, indices: Tensor | None, dim: int) -> Rows:
        """The results may be shorter along ``dim`` (topk) or missing."""
        shape = tuple(x.shape) or (1,)
        dim %= len(shape)
        strides = [(0,) * len(shape) if t is None else tuple(t.stride()) or (1,) for t in (x, values, indices)]
        kept = [d for d in range(len(shape)) if d != dim]
        sizes, by_row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in strides])
        # Row numbers times 256 digits count the counts.
        wide = _layout.is_wide(shape, strides) or math.prod(shape) >= 2**30
        return cls(math.prod(sizes), shape[dim], sizes, tuple(by_row), tuple(s[dim] for s in strides), wide)


def key_bits(dtype: torch.dtype) -> int:
    """How many bits of a key differ."""
    return dtype.itemsize * 8


def log2(n: int) -> int:
    """Of a power of 2."""
    return n.bit_length() - 1
