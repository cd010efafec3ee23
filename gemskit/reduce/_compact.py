"""Compaction: the elements that a flag chooses, written one after the other in logical order.

Two launches: each program counts the chosen elements of its piece; then each writes them, after those of the pieces before.
Between them the host reads the counts, at most 1024 of them, as it must know the size of the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _driver, _launch, _layout, backends
from gemskit._bind import fill
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit.errors import CaptureError
from gemskit.pointwise._place import copy

#: Filled in per operator.
FLAG: Any = None
EMIT: Any = None

#: Most pieces: every program adds up the counts of the pieces before its own.
PIECES = 1024
#: Elements that a thread counts by itself.
_RUN = 16


@jit
def _count(counts, ins, sizes, strides, n, part, B: tl.constexpr, WIDE: tl.constexpr):
    piece = tl.program_id(0)
    if WIDE:
        piece = piece.to(tl.int64)
    first = piece * part
    stop = tl.minimum(first + part, n)
    total = tl.zeros((B,), tl.int32)
    for start in range(first, stop, B):
        i = start + tl.arange(0, B)
        total += FLAG(ins, i, i < stop, sizes, strides).to(tl.int32)
    tl.store(counts + piece, tl.sum(total, 0))


@jit
def _write(
    outs, counts, ins, sizes, strides, extra, n, part,
    P: tl.constexpr, B: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    k = tl.arange(0, P)
    before = tl.load(counts + k, k < piece, other=0)
    if WIDE:
        piece, before = piece.to(tl.int64), before.to(tl.int64)
    first = piece * part
    stop = tl.minimum(first + part, n)
    base = tl.sum(before, 0) - 1
    for start in range(first, stop, B):
        # In columns: Triton stores along the first dimension, so that threads next to each other write side by side.
        i = start + (tl.arange(0, B // RUN) * RUN)[None, :] + tl.arange(0, RUN)[:, None]
        live = i < stop
        chosen = FLAG(ins, i, live, sizes, strides)
        one = chosen.to(tl.int32)
        run = tl.sum(one, 0)
        upto = tl.cumsum(run, 0)
        at = base + (upto - run)[None, :] + tl.cumsum(one, 0)
        EMIT(outs, ins, at, i, live, chosen & live, n, sizes, strides, extra)
        base += tl.sum(run, 0)


class Compaction:
    """A compaction as two kernels.

    Args:
        flag: jit function ``(ins, i, live, sizes, strides)`` that says which elements ``i`` are chosen, false where not ``live``.
        emit: jit function ``(outs, ins, at, i, live, chosen, n, sizes, strides, extra)`` that stores; ``at`` is the place of a
            chosen element among the chosen, and of any other that of the last chosen one before it.
    """

    def __init__(self, name: str, flag: Any, emit: Any) -> None:
        self._count, self._write = fill(_count, f"{name}_count", FLAG=flag), fill(_write, name, FLAG=flag, EMIT=emit)

    def count(self, ins: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """How many elements of each piece of ``ins``, broadcast to ``shape``, are chosen."""
        space = _space(shape, ins)
        counts = torch.empty(space.pieces, dtype=torch.int32, device=ins[0].device)
        if space.n:
            arguments = (counts, tuple(ins), space.sizes, space.strides, space.n, space.part)
            launch(self._count, (space.pieces,), arguments, space.counting)
        return counts

    def write(
        self, outs: Sequence[Tensor], counts: Tensor, ins: Sequence[Tensor], shape: Sequence[int], extra: Any = None
    ) -> None:
        """Store what ``emit`` makes of the elements, given their ``counts``."""
        space = _space(shape, ins)
        if space.n:
            arguments = (tuple(outs), counts, tuple(ins), space.sizes, space.strides, extra, space.n, space.part)
            launch(self._write, (space.pieces,), arguments, space.writing)


class _Space(NamedTuple):
    """How elements are cut into pieces."""

    n: int
    pieces: int
    part: int
    sizes: _layout.Strides
    strides: tuple[_layout.Strides, ...]
    counting: dict[str, Any]
    writing: dict[str, Any]


def _space(shape: Sequence[int], ins: Sequence[Tensor]) -> _Space:
    strides = tuple([t.stride() if t.shape == shape else _layout.broadcast_strides(t, shape) for t in ins])
    return _cut(backends.arch(), tuple(shape), strides)


# Between the count and the write the device waits for the host.
@functools.lru_cache(1024)
def _cut(arch: backends.Arch, shape: tuple[int, ...], strides: tuple[_layout.Strides, ...]) -> _Space:
    n = math.prod(shape)
    config = arch.config("scan_along")
    tile = config["tile"]
    part = _layout.cdiv(_layout.cdiv(max(n, 1), PIECES), tile) * tile
    pieces = max(1, _layout.cdiv(n, part))
    # Positions are written for each dimension, so that their memory is larger than what is read.
    wide = n * (len(shape) + 1) >= 2**31 or _layout.is_wide(shape, list(strides))
    sizes, collapsed = _layout.collapse(shape, list(strides))
    meta = dict(B=tile, WIDE=wide, num_warps=config["warps"])
    writing = dict(meta, P=_layout.next_power_of_2(pieces), RUN=_RUN)
    return _Space(n, pieces, part, sizes, tuple(collapsed), meta, writing)


def read(values: Tensor, most: int = 0) -> list[int]:
    """The integers ``values`` on the host: the one place where a call waits for the device.

    Where launches are only recorded (cross compilation) there is nothing to read; each is ``most`` then.
    """
    if _launch._capture is not None:
        return [most] * values.numel()
    _refuse_capture(values.device)
    found: list[int] = values.tolist()
    return found


def _refuse_capture(device: torch.device) -> None:
    if _driver.capturing(device):
        raise CaptureError("the size of the result depends on the data and cannot be read inside a graph capture")


def total(counts: Tensor, n: int) -> int:
    """How many elements were chosen of ``n``."""
    if not n or _launch._capture is not None:
        return n
    _refuse_capture(counts.device)
    # A tensor of the host adds up in 3 us, a list of 1024 numbers takes ten times that to be made. Pinned memory, as the wait
    # for a copy to other memory takes 75 us longer where the device was busy for 0.2 ms (H200).
    pinned = counts.device.type != "cpu"
    found = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=pinned).copy_(counts, non_blocking=True)
    if pinned:
        torch.accelerator.current_stream(counts.device).synchronize()
    return int(found.sum())


@jit
def is_set(ins, i, live, sizes, strides):
    """The flag of masks: ``ins[0]`` is not zero."""
    return tl.load(ins[0] + _layout.offset(i, sizes, strides[0]), live, other=0) != 0


def flat(input: Tensor) -> Tensor:
    """The elements as a vector, in logical order: a view where the memory is in that order."""
    if input.is_contiguous():
        return input.view(-1)
    found = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return copy(input, found).view(-1)
