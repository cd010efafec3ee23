"""Iteration spaces: which elements a kernel visits, in which order, with which strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import triton.language as tl
from torch import Tensor

from gemskit._jit import jit

Strides: TypeAlias = tuple[int, ...]


def cdiv(n: int, by: int) -> int:
    """``n / by``, rounded up. (Triton's own, on the host, takes 3 us.)"""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is no less than ``n``."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def broadcast_strides(t: Tensor, shape: Sequence[int]) -> Strides:
    """The strides of ``t`` seen in ``shape``; 0 where it is broadcast."""
    lead = len(shape) - t.ndim
    return (0,) * lead + tuple(
        0 if n == 1 and shape[lead + d] != 1 else s for d, (n, s) in enumerate(zip(t.shape, t.stride()))
    )


def contiguous(sizes: Sequence[int]) -> Strides:
    """Row-major strides."""
    step, out = 1, []
    for n in reversed(sizes):
        out.append(step)
        step *= n
    return tuple(reversed(out))


def collapse(sizes: Sequence[int], strides: Sequence[Strides]) -> tuple[Strides, list[Strides]]:
    """Drop dimensions of size 1 and merge neighbours that are adjacent for every operand. Never returns rank 0."""
    kept: list[int] = []
    out: list[list[int]] = [[] for _ in strides]
    for d, n in enumerate(sizes):
        if n == 1:
            continue
        if kept and all(o[-1] == s[d] * n for o, s in zip(out, strides)):
            kept[-1] *= n
            for o, s in zip(out, strides):
                o[-1] = s[d]
        else:
            kept.append(n)
            for o, s in zip(out, strides):
                o.append(s[d])
    if not kept:
        return (1,), [(0,) for _ in strides]
    return tuple(kept), [tuple(o) for o in out]


def order(sizes: Sequence[int], strides: Sequence[Strides]) -> list[int]:
    """Dimensions from slowest to fastest by the strides of the first operand."""
    return sorted(range(len(sizes)), key=lambda d: [-s[d] for s in strides[:1]])


def reaches(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """The largest element offset that these strides reach."""
    total = 0
    for n, s in zip(sizes, strides):
        if n > 1:
            total += (n - 1) * abs(s)
    return total


#: What a count or an offset in int32 stays below: masked lanes go on for a tile beyond the end.
NARROW = 2**31 - (1 << 16)


def is_wide(sizes: Sequence[int], strides: Sequence[Strides]) -> bool:
    """Whether an element count or offset leaves int32."""
    return math.prod(sizes) >= NARROW or any(reaches(sizes, s) >= NARROW for s in strides)


def any_wide(*tensors: Tensor) -> bool:
    """:func:`is_wide` of any of these."""
    return any(is_wide(t.shape, [t.stride()]) for t in tensors)


@jit
def offset(i, sizes, strides):
    """The element offset of linear index ``i`` in a collapsed space."""
    o = i * 0
    for k in tl.static_range(len(sizes) - 1, -1, -1):
        if k == 0:
            o += i * strides[k]
        else:
            o += (i % sizes[k]) * strides[k]
            i = i // sizes[k]
    return o
