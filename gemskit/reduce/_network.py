"""Sorting networks: words in the registers of a program, in order. Words must be different."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from gemskit._jit import jit
from gemskit.reduce._keys import log2


@jit
def _bit(rank: tl.constexpr, j: tl.constexpr):
    """Bit ``j`` of the position, in a cube of ``rank`` dimensions of size 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (rank - 1 - j) + [2] + [1] * j)


@jit
def _step(h, rank: tl.constexpr, j: tl.constexpr, OWN: tl.constexpr, LANES: tl.constexpr = 0):
    """Order each pair of words whose positions differ in bit ``j``."""
    if j < OWN:
        # Within a thread, where most steps are: a minimum and a maximum for each pair, nothing else is left of this.
        low = tl.min(h, rank - 1 - j, keep_dims=True)
        high = tl.max(h, rank - 1 - j, keep_dims=True)
        return tl.where(_bit(rank, j) == 1, high, low)
    elif LANES and 2**j >= 32 * 2**OWN:
        # Between warps: pairs meet in one thread, by two transpositions. A reduction would store with bank conflicts.
        pair = tl.permute(tl.reshape(h, (2 ** (rank - 1 - j), 2, 2**j)), (0, 2, 1))
        a, b = tl.split(pair)
        pair = tl.join(tl.minimum(a, b), tl.maximum(a, b))
        return tl.reshape(tl.permute(pair, (0, 2, 1)), [2] * rank)
    else:
        # One shuffle a word, which costs as much as four other instructions.
        other = h ^ tl.xor_sum(h, rank - 1 - j, True)
        return tl.where((h > other) ^ (_bit(rank, j) == 1), other, h)


@jit
def _merge(h, rank: tl.constexpr, stage: tl.constexpr, turn: tl.constexpr):
    """Sort bitonic runs of 2**stage; with ``turn`` every second one in descending order."""
    # Flipping all bits turns the order around: so every step is a plain minimum or maximum.
    if turn:
        h = h ^ (-_bit(rank, stage)).to(h.dtype)
    for i in tl.static_range(stage):
        h = _step(h, rank, stage - 1 - i, 0)
    if turn:
        h = h ^ (-_bit(rank, stage)).to(h.dtype)
    return h


@jit
def smallest(x, LOG: tl.constexpr, KEEP: tl.constexpr, RANK: tl.constexpr):
    """The 2**KEEP smallest words, in order, of each 2**LOG along the last dimension of a block of 2**RANK."""
    h = tl.reshape(x, [2] * RANK)
    for s in tl.static_range(1, KEEP + 1):
        h = _merge(h, RANK, s, s < LOG)
    for s in tl.static_range(KEEP + 1, LOG + 1):
        # Of two runs, one in descending order, the smaller halves: those form a bitonic run.
        h = tl.min(h, RANK - s)
        h = _merge(h, RANK - s + KEEP, KEEP, s < LOG)
    return tl.reshape(h, x.shape[:-1] + [2**KEEP])


@jit
def in_order(x, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr):
    """All 2**RANK words of one row in order.

    They are first read in another order, in which the 2**OWN words of a thread are neighbours: then most steps stay within
    threads. Where LANES threads loaded V neighbours each, in turns, no word moves for that. The stages that leave threads are
    one loop: code that stays in the cache, and few registers. What depends on the stage there is the same for all words of a
    thread, and known to be so by its shape.
    """
    h = tl.permute(tl.reshape(x, (2**RANK // (LANES * V), LANES, V)), (1, 0, 2))
    h = tl.reshape(h, [2] * RANK)
    for s in tl.static_range(1, OWN + 1):
        turn = (-_bit(RANK, s)).to(h.dtype)
        h = h ^ turn
        for i in tl.static_range(s):
            h = _step(h, RANK, s - 1 - i, OWN)
        if s < OWN:
            h = h ^ turn
    thread = tl.reshape(tl.arange(0, 2 ** (RANK - OWN)), [2] * (RANK - OWN) + [1] * OWN)
    for s in range(1, RANK - OWN + 1):
        # Out of the order of the stage before, and into that of this one.
        h = h ^ (-(((thread >> s) ^ (thread >> (s - 1))) & 1)).to(h.dtype)
        for i in tl.static_range(RANK - OWN):
            if s > RANK - OWN - 1 - i:
                h = _step(h, RANK, RANK - 1 - i, OWN, LANES)
        for i in tl.static_range(OWN):
            h = _step(h, RANK, OWN - 1 - i, OWN)
    return tl.reshape(h, x.shape)


@jit
def sorted_words(x, LOG: tl.constexpr, RANK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr):
    """Each 2**LOG words along the last dimension in order: one row by :func:`in_order`, several by :func:`smallest`."""
    if V:
        return in_order(x, RANK, V, LANES, OWN)
    else:
        return smallest(x, LOG, LOG, RANK)


def neighbours(x: Tensor, step: int, words: int, warps: int) -> dict[str, int]:
    """How a row is loaded: V elements by each of LANES threads in turns, 2**OWN in all, as :func:`in_order` takes it.

    All zero where no thread has two words, and :func:`smallest` serves.
    """
    lanes = 32 * warps
    if words <= lanes:
        return {"V": 0, "LANES": 0, "OWN": 0}
    each = min(16 // x.element_size() if step == 1 else 1, words // lanes)
    return {"V": each, "LANES": lanes, "OWN": log2(words // lanes)}
