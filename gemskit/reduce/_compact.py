"""Compaction: the elements that a flag chooses, written one after the other in logical order.

Two launches: each program flags the elements of its piece, a bit for each, and counts them; then each writes the chosen ones
after those of the pieces before. Between them the host reads the counts, at most 1024 of them, as it must know the size of the
result. What the flags were made of is read once: the second launch finds a bit where it would read 16.
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
from gemskit._replay import Replayed
from gemskit.errors import CaptureError
from gemskit.pointwise._place import copy

#: Filled in per operator.
FLAG: Any = None
EMIT: Any = None

#: Most pieces: every program adds up the counts of the pieces before its own.
PIECES = 1024
#: Most bytes of a result that is written at its largest size, before the host knows how much of it is needed: one wait, with
#: all launched before it. A larger one is allocated when its size is known.
SMALL = 1 << 20
#: Elements whose flags a word holds.
_WORD = tl.constexpr(32)


@jit
def _ones(word):
    # How many bits are set; LLVM knows these lines and makes one instruction of them.
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@jit
def _flag(counts, words, ins, sizes, strides, n, part, B: tl.constexpr, WIDE: tl.constexpr):
    piece = tl.program_id(0)
    if WIDE:
        piece = piece.to(tl.int64)
    first = piece * part
    stop = tl.minimum(first + part, n)
    column = tl.arange(0, B // _WORD)
    place = tl.arange(0, _WORD)[None, :]
    bit = tl.full((1, _WORD), 1, tl.uint32) << place.to(tl.uint32)
    total = tl.zeros((B // _WORD,), tl.int32)
    for start in range(first, stop, B):
        i = start + (column * _WORD)[:, None] + place
        chosen = FLAG(ins, i, i < stop, sizes, strides)
        word = tl.sum(tl.where(chosen, bit, 0), 1)
        tl.store(words + start // _WORD + column, word.to(tl.int32, bitcast=True))
        total += _ones(word)
    tl.store(counts + piece, tl.sum(total, 0))


@jit
def _write(
    outs, counts, words, ins, sizes, strides, extra, n, part,
    P: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    k = tl.arange(0, P)
    before = tl.load(counts + k, k < piece, other=0)
    if WIDE:
        piece, before = piece.to(tl.int64), before.to(tl.int64)
    first = piece * part
    stop = tl.minimum(first + part, n)
    base = tl.sum(before, 0) - 1
    column = tl.arange(0, B // _WORD)
    bit = tl.arange(0, _WORD)[None, :].to(tl.uint32)
    # The bits up to each; all of them for the last, as 2 << 31 wraps to 0.
    upto = (tl.full((1, _WORD), 2, tl.uint32) << bit) - 1
    for start in range(first, stop, B):
        word = tl.load(words + start // _WORD + column).to(tl.uint32, bitcast=True)
        count = _ones(word)
        ahead = base + tl.cumsum(count, 0) - count
        at = ahead[:, None] + _ones(word[:, None] & upto)
        chosen = ((word[:, None] >> bit) & 1) != 0
        # As vectors, so that threads next to each other write side by side: of two dimensions, Triton's versions differ in which
        # one threads go along.
        i = start + tl.arange(0, B)
        EMIT(outs, ins, tl.reshape(at, (B,)), i, i < stop, tl.reshape(chosen, (B,)), n, sizes, strides, extra)
        base += tl.sum(count, 0)


class Chosen(NamedTuple):
    """What a flag chose: int32, a count for each piece and a bit for each element."""

    counts: Tensor
    words: Tensor


class Flag:
    """What chooses elements.

    Args:
        of: jit function ``(ins, i, live, sizes, strides)`` that says which elements ``i`` are chosen, false where not ``live``.
    """

    def __init__(self, name: str, of: Any) -> None:
        self._kernel = fill(_flag, name, FLAG=of)
        self._replayed = Replayed(self._run)

    def __call__(self, shape: tuple[int, ...], *ins: Tensor) -> Chosen:
        """Which elements of ``ins``, broadcast to ``shape``, are chosen."""
        return Chosen(*self._replayed(shape, *ins))

    def _run(self, shape: tuple[int, ...], *ins: Tensor) -> Chosen:
        space = _space(shape, ins)
        device, size = ins[0].device, _layout.cdiv(space.pieces * space.part, _WORD.value)
        counts = torch.empty(space.pieces, dtype=torch.int32, device=device)
        chosen = Chosen(counts, torch.empty(size, dtype=torch.int32, device=device))
        if space.n:
            arguments = (*chosen, ins, space.sizes, space.strides, space.n, space.part)
            launch(self._kernel, (space.pieces,), arguments, space.flagging)
        return chosen


class Compaction:
    """What is made of the chosen elements.

    Args:
        emit: jit function ``(outs, ins, at, i, live, chosen, n, sizes, strides, extra)`` that stores; ``at`` is the place of a
            chosen element among the chosen, and of any other that of the last chosen one before it.
    """

    def __init__(self, name: str, emit: Any) -> None:
        self._kernel = fill(_write, name, EMIT=emit)

    def __call__(
        self, outs: Sequence[Tensor], chosen: Chosen, ins: Sequence[Tensor], shape: Sequence[int], extra: Any = None
    ) -> None:
        """Store what is made of the elements of ``ins``, broadcast to ``shape``, given which of them are ``chosen``."""
        space = _space(shape, ins)
        if space.n:
            arguments = (tuple(outs), *chosen, tuple(ins), space.sizes, space.strides, extra, space.n, space.part)
            launch(self._kernel, (space.pieces,), arguments, space.writing)


class _Space(NamedTuple):
    """How elements are cut into pieces."""

    n: int
    pieces: int
    part: int
    sizes: _layout.Strides
    strides: tuple[_layout.Strides, ...]
    flagging: dict[str, Any]
    writing: dict[str, Any]


def _space(shape: Sequence[int], ins: Sequence[Tensor]) -> _Space:
    strides = tuple([t.stride() if t.shape == shape else _layout.broadcast_strides(t, shape) for t in ins])
    return _cut(backends.arch(), tuple(shape), strides)


# Between the flags and the write the device waits for the host.
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
    # Half the warps: 32 elements a thread are selected in 91 us where 16 take 108 (64M halves on H200).
    writing = dict(meta, P=_layout.next_power_of_2(pieces), num_warps=config["warps"] // 2)
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
    """How many of ``n`` elements were chosen."""
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


def flat(input: Tensor) -> Tensor:
    """The elements as a vector, in logical order: a view where the memory is in that order."""
    if input.is_contiguous():
        return input.view(-1)
    found = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return copy(input, found).view(-1)
