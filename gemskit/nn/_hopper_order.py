"""Which tiles of attention a program takes, one after the other, so that all programs work until the end.

Programs stay, and nothing tells them how far the others are: the order is arithmetic. Under a causal rule tiles of the same plane
(batch and head) have from one block of keys to all of them.
"""

from __future__ import annotations

import functools
import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Bytes of keys and values that a section of planes may have, so that they stay in the L2 cache of 50 MB.
SECTION = 24 << 20

#: Plane by plane: programs that run together read the same keys.
PLAIN: gl.constexpr = gl.constexpr(0)
#: Section by section of planes, in each the tiles with most to do first, those of all planes.
SECTIONS: gl.constexpr = gl.constexpr(1)
#: Two planes at a time, tile m of one after tile ``tiles_m - 1 - m`` of the other: every pair has the same number of blocks.
PAIRS: gl.constexpr = gl.constexpr(2)
#: Tile by tile of a list in which they have ever less to do, each for all planes, and every second turn backwards: in plain turns
#: the first program would have the larger tile every time (6 % at 32 heads of 8192, 25 % at 8).
LISTED: gl.constexpr = gl.constexpr(3)


@gluon.jit
def number_of_tiles(tiles, ORDER: gl.constexpr):
    """How many tiles this program takes."""
    me, programs = gl.program_id(0), gl.num_programs(0)
    if ORDER == PAIRS:
        pairs = tiles // 2
        rest = pairs % programs
        last = gl.where(me < rest, 2, 0)
        if 2 * rest <= programs:
            last = gl.where(me < 2 * rest, 1, 0)
        count = pairs // programs * 2 + last
    elif ORDER == LISTED:
        whole = tiles // programs
        count = whole + gl.where(whole * programs + _seat(whole) < tiles, 1, 0)
    else:
        count = gl.cdiv(tiles - me, programs)
    return count


@gluon.jit
def _seat(turn):
    """This program's place among all at its ``turn``."""
    me, programs = gl.program_id(0), gl.num_programs(0)
    return gl.where(turn % 2 == 0, me, programs - 1 - me)


@gluon.jit
def tile_of(turn, tiles, tiles_m, planes, section, LAST_FIRST: gl.constexpr, ORDER: gl.constexpr):
    """Plane and place of the tile that this program takes at its ``turn``; with LAST_FIRST the last has most to do.

    The last pairs, where they are for at most half of the programs, are taken apart: they are those from the middle, which are
    alike.
    """
    me, programs = gl.program_id(0), gl.num_programs(0)
    t = turn * programs + me
    if ORDER == PAIRS:
        pairs = tiles // 2
        unit, second = turn // 2 * programs + me, turn % 2
        whole = pairs // programs
        if (turn >= 2 * whole) & (2 * (pairs % programs) <= programs):
            unit, second = whole * programs + me // 2, me % 2
        rank = unit % tiles_m
        m = gl.where(rank % 2 == 0, rank // 2, tiles_m - 1 - rank // 2)
        m = gl.where(second == 0, tiles_m - 1 - m, m)
        plane = 2 * (unit // tiles_m) + second
    elif ORDER == SECTIONS:
        before = t // (section * tiles_m) * section
        here = min(planes - before, section)
        rest = t - before * tiles_m
        plane, m = before + rest % here, rest // here
        if LAST_FIRST:
            m = tiles_m - 1 - m
    elif ORDER == LISTED:
        t = turn * programs + _seat(turn)
        plane, m = t % planes, t // planes
    else:
        plane, m = t // tiles_m, t % tiles_m
    return plane, m


# ---- the host's part -----------------------------------------------------------------------------------------------


def sections(planes: int, lines: int, width: int, group: int) -> int:
    """How many planes, of which ``group`` share ``lines`` of ``width`` halves, have theirs in the cache together."""
    return max(1, min(planes, SECTION // (lines * width * 2) * group))


@functools.lru_cache(maxsize=1024)
def order(planes: int, tiles_m: int, section: int, processors: int, causal: bool) -> tuple[int, int]:
    """How many programs there are, and in which order they take tiles: under a causal rule the one that ends first."""
    tiles = planes * tiles_m
    programs = min(processors, tiles)
    if not causal:
        return programs, PLAIN.value
    if planes % 2 or tiles < 2 * programs:
        return programs, SECTIONS.value
    # 0.4 us a line; with more lines than these a program's sum of many is near the mean.
    if tiles_m * -(-planes // section) > 4096:
        return programs, PAIRS.value
    pairs = tiles // 2
    rest = pairs % programs
    last = 0 if not rest else tiles_m + 3 if 2 * rest > programs else tiles_m // 2 + 3
    better = (tiles_m + 3) * (pairs // programs) + last < busiest(planes, tiles_m, section, programs)
    return programs, PAIRS.value if better else SECTIONS.value


def busiest(planes: int, tiles_m: int, section: int, programs: int) -> int:
    """Blocks of the program with most to do, one more for each tile, where sections come one after the other."""
    all_of_them, steps, at = 0, [0] * (programs + 1), 0
    for before in range(0, planes, section):
        here = min(planes - before, section)
        for m in range(tiles_m):
            # ``here`` tiles alike go to programs that follow each other, the first after the last.
            blocks = tiles_m - m + 1
            all_of_them += here // programs * blocks
            end = at + here % programs
            steps[at] += blocks
            steps[min(end, programs)] -= blocks
            if end > programs:
                steps[0] += blocks
                steps[end - programs] -= blocks
            at = end % programs
    return all_of_them + max(itertools.accumulate(steps[:-1]))
