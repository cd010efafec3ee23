"""Which tiles a product takes: a model of its time, no measurement at the call, or what ``python -m gemskit tune`` found."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemskit._layout import cdiv
from gemskit._native import cache_dir

#: Tiles (M, N), stages of K = 64 that fit into 227 KiB, and the time of one step of K in us when all programs work (H200).
TILES = (
    (128, 256, 4, 0.707), (256, 128, 4, 0.785), (128, 128, 6, 0.376), (128, 64, 8, 0.298), (128, 32, 10, 0.263),
    (128, 16, 11, 0.236), (192, 128, 5, 0.552), (64, 128, 9, 0.225), (64, 64, 12, 0.173), (64, 32, 16, 0.147),
)  # fmt: skip
#: Groups of four warps that multiply by the rows of a tile, where they are not two; each has 64 rows or more.
WORKERS = {64: 1, 192: 3}
#: Elements of a group's sum that take half of its registers.
LARGE = 128 * 128
STEP = 64
#: Tiles of 64 rows up to so many columns take two steps of K at once (H200, 512³ 8.0 us for 8.7, 64x4096x4096 18.8 for 19.3).
NARROW = 64
#: us: of a launch, of the second one that adds up parts; bytes a us that memory gives, and that parts have, there and back.
LAUNCH, JOIN, BANDWIDTH, PARTS = 5.0, 3.6, 4.2e6, 2.2e6
#: How much of the shorter of both, multiplying and moving, the longer one does not hide.
#: Fitted to all choices of 146 products of 4 to 4096 rows: those that follow take 1.007 times as long as the best.
EXPOSED = 0.44
#: us of a step for each row or column of a tile that is beyond the end: the copy engine writes zeros more slowly than it loads.
EMPTY = 0.003
#: The fewest tiles of a group's rows that programs take before the next columns, where it has as many; up to 15 stay one column.
PANEL = 8
#: How much longer a step of as many bytes of float8 takes: it has twice the products. H200, four sizes: within 4 % of the times.
FLOAT8_STEP = 1.1


@dataclass(frozen=True)
class Choice:
    """Tiles of BM x BN; ``whole`` of them, then ``split`` ones in ``pieces`` of ``part_steps`` steps along K each."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    GROUP: int
    processors: int
    whole: int
    split: int
    pieces: int
    part_steps: int
    #: Whether ``out.mT = b.mT @ a.mT`` is computed, so that many columns become rows.
    transposed: bool
    #: Estimated us.
    time: float

    @property
    def workers(self) -> int:
        """Groups of warps that multiply."""
        return WORKERS.get(self.BM, 2)


def choices(
    M: int, N: int, K: int, batches: int, processors: int, gated: bool = False, small: bool = False, float8: int = 0,
    matrix: bool = False,
) -> Iterator[Choice]:  # fmt: skip
    """All that are considered. Tiles of a gated product are half gate, half up, so there are twice N columns.

    ``small`` leaves out those whose accumulator takes half of all registers: an operand of float32 beside it would spill.
    ``matrix`` leaves out those where any matrix beside it would: of three groups of warps (Triton 3.9: 344 bytes a thread),
    and large transposed ones (376).
    Factors of ``float8`` are multiplied by so many times 128 of K a step, those of halves (0) by 64.
    """
    if gated:
        N *= 2
    size = 1 if float8 else 2
    moved = batches * (size * (M * K + K * N) + 2 * M * N) / BANDWIDTH
    for transposed in (False,) if gated else (False, True):
        m, n = (N, M) if transposed else (M, N)
        for BM, BN, stages, step in TILES:
            workers = WORKERS.get(BM, 2)
            large = BM * BN // workers >= LARGE
            # A gated product has no tiles of fewer columns; two sums of float8 have no registers beside those of three groups.
            if (
                (gated and BN < 64)
                or ((float8 or matrix) and workers > 2)
                or (large and (small or (matrix and transposed)))
            ):
                continue
            # Factors of float8 are half as long, and two steps of halves are one of theirs.
            deep = float8 or 1 + (workers == 1 and BN <= NARROW and not gated)
            depth = STEP * deep * (1 + (float8 > 0))
            step += EMPTY * (max(0, BM - m) + max(0, BN - n))
            stages, step, steps = stages // deep, step * deep * (FLOAT8_STEP if float8 else 1), max(1, cdiv(K, depth))
            tiles = cdiv(m, BM) * cdiv(n, BN) * batches
            rounds, last = divmod(tiles, processors)
            whole = LAUNCH + _together(moved, (rounds + (last > 0)) * steps * step)
            group = 8 if BM <= BN else 4
            yield Choice(BM, BN, depth, stages, group, processors, tiles, 0, 1, steps, transposed, whole)
            # No part shorter than what it costs to begin one.
            pieces = min(processors // last if last else 1, max(1, steps // 4))
            if pieces > 1:
                part = cdiv(steps, pieces)
                pieces = cdiv(steps, part)
                parts = 2 * 4 * last * pieces * BM * BN / PARTS
                time = LAUNCH + JOIN + _together(moved, (rounds * steps + part) * step) + parts
                yield Choice(
                    BM, BN, depth, stages, group, processors, tiles - last, last, pieces, part, transposed, time
                )


def best_of_groups(
    rows: int, N: int, K: int, groups: int, processors: int, small: bool = False, matrix: bool = False
) -> Choice:
    """For ``rows`` in ``groups`` that end anywhere: as if all had as many, with the most tiles that they can have."""
    found = choices(cdiv(rows, groups), N, K, groups, processors, False, small, matrix=matrix)
    choice = min((c for c in found if not (c.split or c.transposed)), key=lambda c: c.time)
    return replace(choice, GROUP=PANEL, whole=(rows // choice.BM + min(groups + 1, rows)) * cdiv(N, choice.BN))


def _together(moving: float, multiplying: float) -> float:
    return max(moving, multiplying) + EXPOSED * min(moving, multiplying)


def best(
    M: int, N: int, K: int, batches: int, processors: int, gated: bool = False, small: bool = False, float8: int = 0,
    matrix: bool = False,
) -> Choice:  # fmt: skip
    """The fastest by the model."""
    return min(choices(M, N, K, batches, processors, gated, small, float8, matrix), key=lambda c: c.time)


@functools.lru_cache(maxsize=4096)
def choose(
    M: int, N: int, K: int, batches: int, processors: int, gated: bool = False, small: bool = False, arch: str = "",
    float8: int = 0, matrix: bool = False,
) -> Choice:  # fmt: skip
    """The one that was tuned for these sizes on ``arch`` (of halves), else the fastest by the model."""
    pick = tuned(arch).get(name_of(batches, M, N, K, gated))
    if pick is not None and not float8:
        for choice in choices(M, N, K, batches, processors, gated, small, matrix=matrix):
            if pick_of(choice) == tuple(pick):
                return choice
    return best(M, N, K, batches, processors, gated, small, float8, matrix)


# -- tuned choices --------------------------------------------------------------------------------------------------------


def name_of(batches: int, M: int, N: int, K: int, gated: bool = False) -> str:
    """A product in a table: ``MxNxK``, with ``B x`` before it for batches and ``gated`` after it."""
    return "x".join(str(n) for n in ((batches, M, N, K) if batches > 1 else (M, N, K))) + (" gated" if gated else "")


def pick_of(choice: Choice) -> tuple[int, int, bool, bool]:
    """What a table says of a choice: its tile, whether it is transposed, whether tiles are split."""
    return choice.BM, choice.BN, choice.transposed, choice.split > 0


def user_table() -> Path:
    """Where ``python -m gemskit tune`` writes."""
    return cache_dir() / "tuned.json"


@functools.cache
def tuned(arch: str) -> dict[str, Any]:
    """Picks by name for a row of the vendor table: those shipped with the package, then the user's."""
    found: dict[str, Any] = {}
    for path in (Path(__file__).with_name("tuned.json"), user_table()):
        if arch and path.is_file():
            found |= json.loads(path.read_text()).get(arch, {})
    return found
