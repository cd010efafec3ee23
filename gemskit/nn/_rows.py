"""What is behind every row-wise operator: how its rows are cut, and its kernel (:mod:`gemskit.nn._rows_kernel`) filled in.

The space is (rows, columns), each a collapsed set of dimensions. Operands broadcast along either: a weight varies along the
columns only, a saved statistic along the rows only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import SCALARS, adapter, arguments, fill, generated, given, parameters, scalar_types, slots
from gemskit._dtypes import TRITON
from gemskit._launch import launch
from gemskit._op import Named
from gemskit._plan import Planned
from gemskit.nn import _rows_kernel
from gemskit.nn._row_space import Space, Tiles
from gemskit.reduce._fold import identity_of


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
        kernel, runtime = self._bind(_rows_kernel.rows_kernel, named, space.operands, compute, path, space.precise)
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
                if not (steps or space.precise) and (*space.along, *space.outs_along) == (3, 3, 3):
                    # Halves, two in and one out, in shorter tiles: gradient of softmax of 1024x65536 115.1 -> 105.2 us (005).
                    return Tiles(1, 128 * count, count, 2 * held, True, 4, False)
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
        self, space: Space, compute: torch.dtype, path: str, pick: Sequence[int] | None,
        through: torch.dtype | None = None,
    ) -> dict[str, Any]:  # fmt: skip
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
            joined = fill(_rows_kernel.joined, f"{self.name}_joined", OBSERVE=looked, STEP=stepped)
            names: dict[str, Any] = dict(
                OBSERVE=looked,
                STEP=stepped,
                COMBINE=combined,
                FORMULA=formula,
                JOIN=joined,
                FOLD=fill(_rows_kernel.folded, f"{self.name}_folded", JOIN=joined, COMBINE=combined),
                GUESS=_choice("guess", pool.removeprefix("v, "), guess, functions),
                FINISH=fill(_rows_kernel.finish, f"{self.name}_finish", FORMULA=formula),
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
