"""The kernel behind every row-wise operator: statistics of a row, then a formula per element.

The space is (rows, columns), each a collapsed set of dimensions. Operands broadcast along either: a weight varies along the
columns only, a saved statistic along the rows only. A row that fits one tile is read once and stays in registers; a longer
one is read once per statistic and once for the formula (not at all for a formula of row values). Without statistics the
columns are spread over programs too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import SCALARS, adapter, arguments, fill, generated, given, parameters, scalar_types, slots
from gemskit._dtypes import TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit._plan import Planned
from gemskit.nn._row_space import Space, Tiles
from gemskit.reduce._fold import identity_of

#: Filled in per operator.
OBSERVE: Any = None
STEP: Any = None
COMBINE: Any = None
FORMULA: Any = None
JOIN: Any = None
FOLD: Any = None
GUESS: Any = None
FINISH: Any = None


@jit
def _read(
    given, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col,
    TAKE: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Operands as they are stored (halves stay halves, two to a register): those of ``TAKE`` are loaded, others are given.

    ``EVEN`` is 1 where nothing lies outside, 2 where only rows do.
    """
    values = ()
    for k in tl.static_range(len(ins)):
        if not TAKE[k]:
            v = given[k]
        elif ALONG[k] == 3:
            at = offset(row, row_sizes, in_row[k]) + offset(col, col_sizes, in_col[k])
            if EVEN == 1:
                v = tl.load(ins[k] + at, eviction_policy=EVICT)
            elif EVEN == 2:
                v = tl.load(ins[k] + at, row < rows, eviction_policy=EVICT)
            else:
                v = tl.load(ins[k] + at, (row < rows) & (col < cols), eviction_policy=EVICT)
        elif ALONG[k] == 2:
            v = tl.load(ins[k] + offset(row, row_sizes, in_row[k]), row < rows)
        elif EVEN:
            v = tl.load(ins[k] + offset(col, col_sizes, in_col[k]))
        else:
            v = tl.load(ins[k] + offset(col, col_sizes, in_col[k]), col < cols)
        values = values + (v,)
    return values


@jit
def _tiles(
    given, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col,
    TAKE: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``COUNT`` tiles."""
    tiles = ()
    for t in tl.static_range(COUNT):
        raw = _read(
            given, ins, row, col + t * BN, rows, cols, row_sizes, col_sizes, in_row, in_col, TAKE, ALONG, EVEN, EVICT
        )  # fmt: skip
        tiles = tiles + (raw,)
    return tiles


@jit
def _nothing(row, ins):
    """A place holder for every operand."""
    values = ()
    for _k in tl.static_range(len(ins)):
        values = values + (row,)
    return values


@jit
def _converted(raw, COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr):
    """The operands as formulas get them."""
    values = ()
    for k in tl.static_range(len(raw)):
        v = raw[k]
        if not KEEP[k]:
            v = v.to(ROUND).to(COMPUTE)
        values = values + (v,)
    return values


@jit
def _again(tiles, stat, ALONG: tl.constexpr):
    """The same tiles, but not to the compiler: it would keep their elements as floats, in twice the registers.

    There is one program along the last axis; with ``stat`` in it nothing of this can be computed before the statistic.
    """
    zero = (stat.to(tl.int32, bitcast=True) & tl.program_id(2)).to(tl.int16)
    fresh = ()
    for t in tl.static_range(len(tiles)):
        values = ()
        for k in tl.static_range(len(tiles[t])):
            v = tiles[t][k]
            if ALONG[k] == 3 and v.dtype.primitive_bitwidth == 16:
                v = (v.to(tl.int16, bitcast=True) ^ zero).to(v.dtype, bitcast=True)
            values = values + (v,)
        fresh = fresh + (values,)
    return fresh


@jit
def _store(
    outs, results, row, col, rows, cols, row_sizes, col_sizes, row_strides, col_strides,
    ALONG: tl.constexpr, PICK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(len(outs)):
        v = results[PICK[k]].to(outs[k].dtype.element_ty)
        if ALONG[k] == 2:
            if ROWS:
                tl.store(outs[k] + offset(row, row_sizes, row_strides[k]), tl.broadcast_to(v, (BM, 1)), row < rows)
        else:
            at = offset(row, row_sizes, row_strides[k]) + offset(col, col_sizes, col_strides[k])
            if EVEN:
                tl.store(outs[k] + at, tl.broadcast_to(v, (BM, BN)))
            else:
                tl.store(outs[k] + at, tl.broadcast_to(v, (BM, BN)), (row < rows) & (col < cols))


@jit
def _start(IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.full((BM, BN), IDENTITY[K][k], COMPUTE),)
    return state


@jit
def _masked(
    fresh, live, IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        if EVEN:
            v = tl.broadcast_to(fresh[k], (BM, BN))
        else:
            v = tl.where(live, fresh[k], tl.full((BM, BN), IDENTITY[K][k], COMPUTE))
        state = state + (v,)
    return state


@jit
def _first(tiles):
    return tiles[0]


@jit
def _joined(
    state, tiles, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, K: tl.constexpr,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OBSERVED: tl.constexpr,
    IDENTITY: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The states of lanes after ``tiles``; with ``ONE`` there is one tile and nothing before it."""
    fresh = ()
    for t in tl.static_range(len(tiles)):
        c = col + t * BN
        raw = _read(
            tiles[t], ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, OBSERVED, ALONG, EVEN, ""
        )  # fmt: skip
        v = _converted(raw, COMPUTE, ROUND, KEEP)
        seen = OBSERVE(K, v, stats, s0, s1, s2, s3, c, cols)
        seen = _masked(seen, (row < rows) & (c < cols), IDENTITY, K, COMPUTE, EVEN, BM, BN)
        fresh = fresh + (seen,)
    if not ONE:
        state = STEP(K, state, fresh)
    else:
        state = _first(fresh)
    return state


@jit
def _folded(
    kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K: tl.constexpr,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, ELEMENTS: tl.constexpr,
    OBSERVED: tl.constexpr, IDENTITY: tl.constexpr, LOOP: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The values of statistic ``K``; tiles up to column ``whole`` need no masks."""
    state = _start(IDENTITY, K, COMPUTE, BM, BN)
    if LOOP:
        for start in range(HELD * BN, whole, UNROLL * BN):
            tiles = _tiles(
                none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, True, EVICT,
                UNROLL, BN,
            )  # fmt: skip
            state = JOIN(
                state, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, in_row,
                in_col, K, COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, True, False, BM, BN,
            )  # fmt: skip
        if not EVEN:
            for start in range(whole, cols, BN):
                tiles = _tiles(
                    none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG,
                    False, EVICT, 1, BN,
                )  # fmt: skip
                state = JOIN(
                    state, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, in_row,
                    in_col, K, COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, False, False, BM, BN,
                )  # fmt: skip
    if HELD > 0:
        state = JOIN(
            state, kept, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, K,
            COMPUTE, ROUND, KEEP, ALONG, OBSERVED, IDENTITY, EVEN, HELD == 1 and not LOOP, BM, BN,
        )  # fmt: skip
    return COMBINE(K, state)


@jit
def _finish(
    outs, tiles, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row, in_col,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, NAMED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the results of ``tiles``; row values with the first one if ``ROWS``."""
    ready = _read(tiles[0], ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, NAMED, ALONG, EVEN, "")
    for t in tl.static_range(len(tiles)):
        c = col + t * BN
        v = _converted(ready, COMPUTE, ROUND, KEEP)
        if t + 1 < len(tiles):
            # Weights of the next tile: a load that comes after a store waits for it.
            ready = _read(
                tiles[t + 1], ins, row, c + BN, rows, cols, row_sizes, col_sizes, in_row, in_col, NAMED, ALONG, EVEN, ""
            )  # fmt: skip
        results = FORMULA(v, stats, s0, s1, s2, s3, c, cols)
        _store(
            outs, results, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, EVEN, ROWS and t == 0,
            BM, BN,
        )  # fmt: skip


@jit
def _rows(
    outs, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, ELEMENTS: tl.constexpr, OBSERVED: tl.constexpr, NAMED: tl.constexpr, IDENTITY: tl.constexpr,
    LOOP: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, ROWS_EVEN: tl.constexpr, GATHER_OF: tl.constexpr, GATHER_AT: tl.constexpr,
    GUESSES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # HELD tiles from the first on stay in registers; with LOOP there are others, read once per statistic and once more.
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    col = tl.arange(0, BN)[None, :]
    if WIDE:
        col = col.to(tl.int64)
    if SPLIT:
        blocks = tl.cdiv(cols, BN)
        col += (i % blocks) * BN
        i = i // blocks
    row = (i * BM + tl.arange(0, BM))[:, None]
    none = _nothing(row, ins)
    held = _tiles(
        none, ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, EVEN,
        "evict_first" if LOOP else "", HELD, BN,
    )  # fmt: skip
    EVICT: tl.constexpr = "evict_first" if ONCE else "evict_last"
    whole = cols
    if not EVEN:
        whole = HELD * BN
        if ROWS_EVEN:
            whole += (cols - whole) // (UNROLL * BN) * (UNROLL * BN)
    kept = held
    stats = ()
    for K in tl.static_range(len(IDENTITY)):
        if GUESSES[K]:
            found, sure = GUESS(K, stats, s0, s1, s2, s3, col, cols)
            if tl.min(tl.min(sure.to(tl.int32), 1), 0) == 0:
                found = FOLD(
                    kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K,
                    COMPUTE, ROUND, KEEP, ALONG, ELEMENTS, OBSERVED, IDENTITY, LOOP, HELD, UNROLL, EVEN, EVICT, BM, BN,
                )  # fmt: skip
        else:
            found = FOLD(
                kept, none, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, whole, K,
                COMPUTE, ROUND, KEEP, ALONG, ELEMENTS, OBSERVED, IDENTITY, LOOP, HELD, UNROLL, EVEN, EVICT, BM, BN,
            )  # fmt: skip
        stats = stats + found
        if HELD > 1:
            kept = _again(held, stats[len(stats) - 1], ALONG)
    for g in tl.static_range(len(GATHER_AT)):
        at = tl.load(ins[GATHER_AT[g]] + offset(row, row_sizes, in_row[GATHER_AT[g]]), row < rows).to(tl.int64)
        there = (row < rows) & (at >= 0) & (at < cols)
        at = offset(row, row_sizes, in_row[GATHER_OF[g]]) + offset(at, col_sizes, in_col[GATHER_OF[g]])
        stats = stats + (tl.load(ins[GATHER_OF[g]] + at, there, other=float("nan")).to(ROUND).to(COMPUTE),)
    if ONCE:
        FINISH(
            outs, (none,), ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
            in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, EVEN, True, BM, BN,
        )  # fmt: skip
    else:
        if LOOP:
            # From the end: what was read last is in the cache.
            if not EVEN:
                for start in range(whole, cols, BN):
                    tiles = _tiles(
                        none, ins, row, start + col, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG,
                        False, "evict_first", 1, BN,
                    )  # fmt: skip
                    FINISH(
                        outs, tiles, ins, stats, s0, s1, s2, s3, row, start + col, rows, cols, row_sizes, col_sizes, out_row,
                        out_col, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, False, HELD == 0, BM, BN,
                    )  # fmt: skip
            for back in range(HELD * BN, whole, UNROLL * BN):
                c = whole - UNROLL * BN - (back - HELD * BN) + col
                tiles = _tiles(
                    none, ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, ELEMENTS, ALONG, True, "evict_first",
                    UNROLL, BN,
                )  # fmt: skip
                FINISH(
                    outs, tiles, ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col,
                    in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, True, HELD == 0, BM, BN,
                )  # fmt: skip
        if HELD > 0:
            FINISH(
                outs, kept, ins, stats, s0, s1, s2, s3, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
                in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NAMED, EVEN, True, BM, BN,
            )  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """Values that are folded over a row: ``observe`` each element (operands, earlier statistics, ``col``, ``cols``, scalars)."""

    names: tuple[str, ...]
    observe: Any
    combine: Any
    identity: tuple[float | str, ...]
    #: ``"tile"``: only for rows that fit one tile; ``"loop"``: only for longer ones, where every statistic is a pass over memory.
    only: Literal["", "tile", "loop"] = ""
    #: For longer rows, where it is cheaper than ``combine`` for each element: the states of lanes, and a tuple of the states of
    #: their next elements (as many tuples as tiles are read at once); returns the states of lanes.
    step: Any = None
    #: A jit function of earlier statistics and scalars that spares the fold: the values of a row, and whether they are exact
    #: enough; a program folds where one of its rows says no.
    guess: Any = None


class Rows(Planned):
    """Statistics and a formula as a kernel. The formula names operands, statistics, scalars, ``col``, ``cols`` and ``precise``.

    ``precise`` is False where all that is read and written by element are halves (see :mod:`gemskit.pointwise._fast`).
    """

    def __init__(
        self,
        name: str,
        formula: Any,
        statistics: Sequence[Statistic] = (),
        *,
        results: int = 1,
        keep: Sequence[str] = (),
        gathers: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.name, self.formula, self.results = name, formula, results
        #: Statistics that are one element: of an operand, at the column that a row value gives; NaN where there is none.
        self.gathers = dict(gathers or {})
        self.keep = frozenset(keep)
        self.statistics = {loop: tuple(s for s in statistics if s.only in ("", loop)) for loop in ("tile", "loop")}
        asked = (*(s.observe for s in statistics), *(s.guess for s in statistics if s.guess), formula)
        self.names = tuple(dict.fromkeys(p for f in asked for p in parameters(f)))
        self.names = tuple(dict.fromkeys((*self.names, *itertools.chain(*self.gathers.values()))))
        self._bound: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Any, tuple[str, ...]]] = {}
        super().__init__()

    def plan(
        self, named: Named, outs: Sequence[Tensor], shape: Sequence[int], dims: Sequence[int], compute: torch.dtype,
        pick: Sequence[int] | None = None, through: torch.dtype | None = None,
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launch over rows of ``shape`` that extend along ``dims``; ``outs`` have that shape, or size 1 in ``dims``.

        Operands are rounded to ``through`` before they are converted to ``compute``.
        """
        space = Space.of(named, outs, [n for n in self.names if isinstance(named.get(n), Tensor)], shape, dims)
        by_element = {"col", *(o for o, a in zip(space.operands, space.along) if a != 2)}
        once = 3 not in space.outs_along and by_element.isdisjoint(parameters(self.formula))
        tiles = self.tiles(space, compute, once)
        path = "loop" if tiles.loop else "tile"
        gathers = [pair for pair in self.gathers.values() if {*pair} <= {*space.operands}]
        meta = dict(
            **self._meta(space, compute, path, pick, through),
            HELD=tiles.held,
            EVEN=int(
                space.rows % tiles.bm == 0
                and (space.cols - tiles.held * tiles.bn) % (tiles.bn * tiles.unroll) == 0 < space.cols
            ),
            LOOP=tiles.loop,
            UNROLL=tiles.unroll,
            ONCE=once,
            SPLIT=tiles.split,
            ROWS_EVEN=space.rows % tiles.bm == 0,
            GATHER_OF=tuple(space.operands.index(of) for of, at in gathers),
            GATHER_AT=tuple(space.operands.index(at) for of, at in gathers),
            GUESSES=tuple(int(s.guess is not None) for s in self.statistics[path]),
            BM=tiles.bm,
            BN=tiles.bn,
            num_warps=tiles.warps,
        )
        if tiles.registers:
            meta["maxnreg"] = tiles.registers
        kernel, runtime = self._bind(_rows, named, space.operands, compute, path, space.precise)
        programs = _layout.cdiv(space.rows, tiles.bm) * (_layout.cdiv(space.cols, tiles.bn) if tiles.split else 1)
        grid = programs if any(o.numel() for o in outs) else 0

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if grid:
                ins = tuple([named[o] for o in space.operands])
                scalars = slots([named[s] for s in runtime])
                launch(kernel, (grid,), (tuple(outs), ins, *space.strided, *scalars, space.rows, space.cols), meta)

        return run

    def tiles(self, space: Space, compute: torch.dtype, once: bool = False) -> Tiles:
        """How a row is cut: one tile or several held ones, tiles that are read again, or, without statistics, any."""
        config = backends.arch().config("rowwise")
        rows, cols, across = space.rows, space.cols, space.across
        # The tile lives in registers: 16,384 floats in 16 warps just do not spill, so doubles, whose
        # exponential takes registers too, get a quarter of that.
        one_tile, loop_tile = (config[k] * 16 // max(4, compute.itemsize) ** 2 for k in ("one_tile_max", "loop_tile"))

        def warps(elements: int) -> int:
            return min(config["warps"], max(1, elements * max(4, compute.itemsize) // 2048))

        bn = _layout.next_power_of_2(max(cols, 1))
        if not self.statistics["tile"] and 3 in space.outs_along:
            bm = min(max(config["across"], config["short"] // bn), _layout.next_power_of_2(rows)) if across else 1
            bn = min(bn, max(16, loop_tile // bm))
            if not across:
                bm = max(1, min(config["short"] // bn, _layout.next_power_of_2(max(rows, 1))))
            return Tiles(bm, bn, warps(bm * bn), 1, False, 1, True)
        guessed = any(s.guess is not None for s in self.statistics["tile"])
        if not across and config["hold"] and compute.itemsize <= 4 and bn > config["short"] // (4 if guessed else 1):
            # Registers keep what is read as it is stored, 128 bytes in each thread. Two programs have to find room beside one
            # another, or loads wait for what is computed: H200, 2048x32768 bf16 0.098 ms with one, 4096x16384 0.071 with three.
            size, wide = space.itemsize, max(1, space.along.count(3))
            bytes_, limit = cols * size, min(config["hold"] * wide, config["hold_most"])
            # Half of that beside a guess in up to 4 warps: layer_norm of 32768x1024 bf16 38.4 us in one warp a row, 39.6 in two.
            share = 2048 if guessed and bytes_ <= 8192 else 4096
            count = min(config["warps"], _layout.next_power_of_2(_layout.cdiv(bytes_, share)))
            if once and len(self.statistics["loop"]) == 1:
                # One pass, nothing is read again: cross_entropy of 8192x128256 0.499 ms in 8 warps, 0.556 in 16, 0.765 in 32.
                count = min(count, config["fold_warps"])
                return Tiles(1, 256 * count, count, 0, True, config["unroll"], False)
            if bytes_ <= limit:
                count = 8 if count == 16 and wide == 1 else count
                limited = self._registers(count) if bytes_ > 8 * 4096 else 0
                return Tiles(1, 256 * count, count, _layout.cdiv(cols, 256 * count), False, 1, False, limited)
            if bytes_ > config["hold_most"]:
                # What is not held is read again from the cache: of 132 rows, that is all it has room for.
                steps = any(s.step is not None for s in self.statistics["loop"])
                held = config["hold_most"] // (2 if steps else 1) // (256 * count * size)
                # A guess needs registers: layer_norm of 256x131072 bf16 46.5 us with six tiles held, 51.2 with eight; odd: masks.
                held = held * 3 // 8 * 2 if guessed else held
                return Tiles(1, 256 * count, count, held, True, config["unroll"] if steps else 2, False)
        bm = min(max(config["across"], config["short"] // bn), _layout.next_power_of_2(rows)) if across else 1
        if bm * bn <= one_tile:
            if not across:
                bm = max(1, min(config["short"] // bn, _layout.next_power_of_2(max(rows, 1))))
            return Tiles(bm, bn, warps(bm * bn), 1, False, 1, False)
        bn = min(bn, max(16, loop_tile // bm))
        if max((len(s.identity) for s in self.statistics["loop"]), default=1) > 2:
            bn = max(16, bn // 2)  # four states of 16 elements a thread would spill
        # Doubles of four tiles at once would spill.
        unroll = config["unroll"] * 4 // max(4, compute.itemsize)
        return Tiles(bm, bn, warps(bm * bn), 0, True, unroll, False, self._registers(warps(bm * bn)))

    @staticmethod
    def _registers(warps: int) -> int:
        """Registers of a thread such that two programs fit a multiprocessor; 0 where that is not for us to say."""
        registers: int = backends.arch().config("rowwise")["registers"]
        return registers // (64 * warps) if warps in (8, 16) else 0

    def _meta(
        self,
        space: Space,
        compute: torch.dtype,
        path: str,
        pick: Sequence[int] | None,
        through: torch.dtype | None = None,
    ) -> dict[str, Any]:
        return dict(
            COMPUTE=TRITON[compute],
            ROUND=TRITON[through or compute],
            KEEP=tuple(int(o in self.keep) for o in space.operands),
            ALONG=space.along,
            OUT_ALONG=space.outs_along,
            PICK=tuple(pick if pick is not None else range(len(space.outs_along))),
            ELEMENTS=tuple(int(a == 3) for a in space.along),
            # What was not read with the elements.
            OBSERVED=space.others([s.observe for s in self.statistics[path]]),
            NAMED=space.others([self.formula]),
            IDENTITY=tuple(tuple(identity_of(v, compute) for v in s.identity) for s in self.statistics[path]),
            WIDE=space.wide,
        )

    def _bind(
        self, driver: Any, named: Named, operands: Sequence[str], compute: torch.dtype, path: str, precise: bool
    ) -> tuple[Any, tuple[str, ...]]:
        asked = (driver, compute, path, precise, given(self.names, named))
        if asked in self._known:
            return self._known[asked]
        statistics = self.statistics[path]
        reads = {o: f"v[{k}]" for k, o in enumerate(operands)}
        known = [n for s in statistics for n in s.names]
        known += [n for n, pair in self.gathers.items() if {*pair} <= {*operands}]
        reads.update({n: f"stats[{k}]" for k, n in enumerate(known)}, col="col", cols="cols", precise=str(precise))
        values = {n: named.get(n) for n in self.names if n not in reads or n in operands}
        runtime, expressions = arguments(self.names, values, reads, compute)
        # Ints stay ints, so that one compared with indices is compared exactly.
        types = scalar_types(runtime, compute) | {
            s: "i64" for s, n in zip(SCALARS, runtime) if isinstance(named[n], int)
        }
        key = (driver, tuple(operands), tuple(expressions.items()), tuple(types.items()), compute, path)
        if key not in self._bound:
            pool = f"v, stats, {', '.join(SCALARS)}, col, cols"
            observe, step, combine, guess = [], [], [], []
            functions: dict[str, Any] = {}
            for k, s in enumerate(statistics):
                n = len(s.names)
                one = "({},)" if n == 1 else "{}"
                functions |= {f"O{k}": s.observe, f"F{k}": s.combine}
                seen = ", ".join(expressions[p] for p in parameters(s.observe))
                lanes = "a[0]" if n == 1 else "a"
                observe.append(one.format(f"O{k}({seen})"))
                if s.step is None:
                    both = ", ".join([f"a[{j}]" for j in range(n)] + [f"b[t][{j}]" for j in range(n)])
                    merged = one.format(f"F{k}({both})")
                    functions[f"S{k}"] = generated(
                        f"{self.name}_merge{k}", "a, b", _MERGE.format(merged), **{f"F{k}": s.combine}
                    )
                    step.append(f"S{k}(a, b)")
                else:
                    functions[f"S{k}"] = s.step
                    step.append(one.format(f"S{k}({', '.join(f'a[{j}]' for j in range(n))}, b)"))
                if s.guess is None:
                    guess.append("stats")
                else:
                    functions[f"G{k}"] = s.guess
                    guess.append(f"G{k}({', '.join(expressions[p] for p in parameters(s.guess))})")
                combine.append(one.format(f"tl.reduce({lanes}, 1, F{k}, keep_dims=True)"))
            wrap = "({},)" if self.results == 1 else "{}"
            looked = _choice(f"{self.name}_observe", pool, observe, functions)
            stepped = _choice("step", "a, b", step, functions)
            formula = adapter(f"{self.name}_formula", pool, self.formula, expressions, wrap)
            combined = _choice("combine", "a", combine, functions)
            joined = fill(_joined, f"{self.name}_joined", OBSERVE=looked, STEP=stepped)
            names: dict[str, Any] = dict(
                OBSERVE=looked,
                STEP=stepped,
                COMBINE=combined,
                FORMULA=formula,
                JOIN=joined,
                FOLD=fill(_folded, f"{self.name}_folded", JOIN=joined, COMBINE=combined),
                GUESS=_choice("guess", pool.removeprefix("v, "), guess, functions),
                FINISH=fill(_finish, f"{self.name}_finish", FORMULA=formula),
            )
            self._bound[key] = fill(driver, self.name, types, **names, **self._more(pool, expressions, names))
        self._known[asked] = self._bound[key], runtime
        return self._bound[key], runtime

    def _more(self, pool: str, expressions: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, Any]:
        """What else a driver needs, beside ``names``."""
        return {}


_MERGE = "    for t in tl.static_range(len(b)):\n        a = {}\n    return a"


def _choice(name: str, pool: str, expressions: Sequence[str], functions: dict[str, Any]) -> Any:
    """A jit function that returns expression number ``K``."""
    lines = [f"    {'el' * bool(k)}if K == {k}:\n        return {e}" for k, e in enumerate(expressions)]
    return generated(name, f"K: tl.constexpr, {pool}", "\n".join(lines) or "    return ()", **functions)
