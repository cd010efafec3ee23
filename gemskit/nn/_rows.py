"""The kernel behind every row-wise operator: statistics of a row, then a formula per element.

The space is (rows, columns), each a collapsed set of dimensions. Operands broadcast along either: a weight varies along the
columns only, a saved statistic along the rows only. A row that fits one tile is read once and stays in registers; a longer
one is read once per statistic and once for the formula (not at all for a formula of row values). Without statistics the
columns are spread over programs too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from gemskit.reduce._fold import identity_of

#: Filled in per operator.
OBSERVE: Any = None
MERGE: Any = None
STEP: Any = None
COMBINE: Any = None
FORMULA: Any = None


@jit
def _load(
    ins, row, col, rows, cols, row_sizes, col_sizes, row_strides, col_strides,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, ONCE: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    values = ()
    for k in tl.static_range(len(ins)):
        if ONCE and ALONG[k] != 2:
            v = row  # a place holder: the formula names no such operand
        elif ALONG[k] == 3:
            at = offset(row, row_sizes, row_strides[k]) + offset(col, col_sizes, col_strides[k])
            v = tl.load(ins[k] + at, (row < rows) & (col < cols), eviction_policy=EVICT)
        elif ALONG[k] == 2:
            v = tl.load(ins[k] + offset(row, row_sizes, row_strides[k]), row < rows)
        else:
            v = tl.load(ins[k] + offset(col, col_sizes, col_strides[k]), col < cols)
        if not KEEP[k]:
            v = v.to(ROUND).to(COMPUTE)
        values = values + (v,)
    return values


@jit
def _store(
    outs, results, row, col, rows, cols, row_sizes, col_sizes, row_strides, col_strides,
    ALONG: tl.constexpr, PICK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(len(outs)):
        v = results[PICK[k]].to(outs[k].dtype.element_ty)
        if ALONG[k] == 2:
            tl.store(outs[k] + offset(row, row_sizes, row_strides[k]), tl.broadcast_to(v, (BM, 1)), row < rows)
        else:
            at = offset(row, row_sizes, row_strides[k]) + offset(col, col_sizes, col_strides[k])
            tl.store(outs[k] + at, tl.broadcast_to(v, (BM, BN)), (row < rows) & (col < cols))


@jit
def _start(IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.full((BM, BN), IDENTITY[K][k], COMPUTE),)
    return state


@jit
def _masked(
    fresh, live, IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.where(live, fresh[k], tl.full((BM, BN), IDENTITY[K][k], COMPUTE)),)
    return state


@jit
def _grouped(fresh, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    state = ()
    for k in tl.static_range(len(fresh)):
        state = state + (tl.reshape(fresh[k], (BM, BN // GROUP, GROUP)),)
    return state


@jit
def _rows(
    outs, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, IDENTITY: tl.constexpr, LOOP: tl.constexpr, ONCE: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
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
    stats = ()
    if LOOP:
        for K in tl.static_range(len(IDENTITY)):
            state = _start(IDENTITY, K, COMPUTE, BM, BN // GROUP[K])
            for start in range(0, cols, BN):
                c = start + col
                v = _load(
                    ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, False,
                    "evict_last",
                )  # fmt: skip
                fresh = OBSERVE(K, v, stats, s0, s1, s2, s3, c, cols)
                fresh = _masked(fresh, (row < rows) & (c < cols), IDENTITY, K, COMPUTE, BM, BN)
                if GROUP[K] == 1:
                    state = MERGE(K, state, fresh)
                else:
                    state = STEP(K, state, _grouped(fresh, BM, BN, GROUP[K]))
            stats = stats + COMBINE(K, state)
        # From the end: what was read last is in the cache.
        for back in range(0, BN if ONCE else cols, BN):
            c = (0 if ONCE else (tl.cdiv(cols, BN) - 1) * BN - back) + col
            v = _load(
                ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, ONCE, "evict_first"
            )  # fmt: skip
            results = FORMULA(v, stats, s0, s1, s2, s3, c, cols)
            _store(outs, results, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, BM, BN)
    else:
        v = _load(
            ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, False, ""
        )  # fmt: skip
        for K in tl.static_range(len(IDENTITY)):
            fresh = OBSERVE(K, v, stats, s0, s1, s2, s3, col, cols)
            stats = stats + COMBINE(K, _masked(fresh, (row < rows) & (col < cols), IDENTITY, K, COMPUTE, BM, BN))
        results = FORMULA(v, stats, s0, s1, s2, s3, col, cols)
        _store(outs, results, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, BM, BN)


#: Elements of a group: as many halves as a thread reads at once.
VECTOR = 8


@dataclass(frozen=True)
class Statistic:
    """Values that are folded over a row: ``observe`` each element (operands, earlier statistics, ``col``, ``cols``, scalars)."""

    names: tuple[str, ...]
    observe: Any
    combine: Any
    identity: tuple[float | str, ...]
    #: ``"tile"``: only for rows that fit one tile; ``"loop"``: only for longer ones, where every statistic is a pass over memory.
    only: Literal["", "tile", "loop"] = ""
    #: For longer rows, where it is cheaper than ``combine`` for each element: the states of groups (rows by groups) and the
    #: states of their next elements (rows by groups by ``VECTOR``); returns the states of groups.
    step: Any = None


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
    ) -> None:
        self.name, self.formula, self.results = name, formula, results
        self.keep = frozenset(keep)
        self.statistics = {loop: tuple(s for s in statistics if s.only in ("", loop)) for loop in ("tile", "loop")}
        self.names = tuple(dict.fromkeys(p for f in (*(s.observe for s in statistics), formula) for p in parameters(f)))
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
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        full = [_layout.broadcast_strides(t, shape) for t in (*outs, *(named[n] for n in operands))]
        kept = [d for d in range(len(shape)) if d not in dims]
        row_sizes, row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in full])
        col_sizes, col = _layout.collapse([shape[d] for d in dims], [tuple(s[d] for d in dims) for s in full])
        rows, cols = math.prod(shape[d] for d in kept), math.prod(shape[d] for d in dims)
        n = len(outs)
        # An operand that does not vary at all counts as a row's: one value, loaded once per row. An empty one has no value.
        vary = [bool(any(c)) + 2 * bool(any(r)) for r, c in zip(row[n:], col[n:])]
        along = tuple(a or 2 if named[o].numel() else 3 for o, a in zip(operands, vary))
        padded = [(1,) * (len(shape) - o.ndim) + tuple(o.shape) for o in outs]
        outs_along = tuple(3 if all(o[d] == shape[d] for d in dims) else 2 for o in padded)

        config = backends.arch().config("rowwise")
        # The tile lives in registers: 16,384 floats in 16 warps just do not spill, so doubles, whose
        # exponential takes registers too, get a quarter of that.
        one_tile, loop_tile = (config[k] * 16 // max(4, compute.itemsize) ** 2 for k in ("one_tile_max", "loop_tile"))
        bn = _layout.next_power_of_2(max(cols, 1))
        # The first operand that is read by element says which way memory runs.
        lead = n + next((k for k, a in enumerate(along) if a == 3), 0)
        across = rows > 1 and row[lead][-1] == 1 and col[lead][-1] != 1
        bm = min(max(config["across"], config["short"] // bn), _layout.next_power_of_2(rows)) if across else 1
        split = not self.statistics["tile"] and 3 in outs_along
        loop = not split and bm * bn > one_tile
        if loop or split:
            bn = min(bn, max(16, loop_tile // bm))
        if not loop and not across:
            bm = max(1, min(config["short"] // bn, _layout.next_power_of_2(max(rows, 1))))
        path = "loop" if loop else "tile"
        if loop and max((len(s.identity) for s in self.statistics[path]), default=1) > 2:
            bn = max(16, bn // 2)  # four states of 16 elements a thread would spill
        wide = [t for t, a in zip((*outs, *(named[o] for o in operands)), (*outs_along, *along)) if a == 3]
        precise = any(t.dtype.itemsize > 2 for t in wide)
        by_element = {"col", *(o for o, a in zip(operands, along) if a != 2)}
        kernel, runtime = self._bind(named, operands, compute, path, precise)
        meta = dict(
            COMPUTE=TRITON[compute],
            ROUND=TRITON[through or compute],
            KEEP=tuple(int(o in self.keep) for o in operands),
            ALONG=along,
            OUT_ALONG=outs_along,
            PICK=tuple(pick if pick is not None else range(n)),
            IDENTITY=tuple(tuple(identity_of(v, compute) for v in s.identity) for s in self.statistics[path]),
            LOOP=loop,
            ONCE=3 not in outs_along and by_element.isdisjoint(parameters(self.formula)),
            SPLIT=split,
            GROUP=tuple(
                VECTOR if s.step is not None and not across and bn >= 32 * VECTOR else 1 for s in self.statistics[path]
            ),
            BM=bm,
            BN=bn,
            WIDE=_layout.is_wide(shape, full),
            num_warps=min(config["warps"], max(1, bm * bn * max(4, compute.itemsize) // 2048)),
        )
        grid = _layout.cdiv(rows, bm) * (_layout.cdiv(cols, bn) if split else 1) if any(o.numel() for o in outs) else 0
        strides = (tuple(row[:n]), tuple(col[:n]), tuple(row[n:]), tuple(col[n:]))

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if grid:
                ins = tuple([named[o] for o in operands])
                scalars = slots([named[s] for s in runtime])
                launch(kernel, (grid,), (tuple(outs), ins, row_sizes, col_sizes, *strides, *scalars, rows, cols), meta)

        return run

    def _bind(
        self, named: Named, operands: Sequence[str], compute: torch.dtype, path: str, precise: bool
    ) -> tuple[Any, tuple[str, ...]]:
        asked = (compute, path, precise, given(self.names, named))
        if asked in self._known:
            return self._known[asked]
        statistics = self.statistics[path]
        reads = {o: f"v[{k}]" for k, o in enumerate(operands)}
        known = [n for s in statistics for n in s.names]
        reads.update({n: f"stats[{k}]" for k, n in enumerate(known)}, col="col", cols="cols", precise=str(precise))
        values = {n: named.get(n) for n in self.names if n not in reads or n in operands}
        runtime, expressions = arguments(self.names, values, reads, compute)
        # Ints stay ints, so that one compared with indices is compared exactly.
        types = scalar_types(runtime, compute) | {
            s: "i64" for s, n in zip(SCALARS, runtime) if isinstance(named[n], int)
        }
        key = (tuple(operands), tuple(expressions.items()), tuple(types.items()), compute, path)
        if key not in self._bound:
            pool = f"v, stats, {', '.join(SCALARS)}, col, cols"
            observe, merge, step, combine = [], [], [], []
            functions: dict[str, Any] = {}
            for k, s in enumerate(statistics):
                n = len(s.names)
                one = "({},)" if n == 1 else "{}"
                functions |= {f"O{k}": s.observe, f"F{k}": s.combine, f"S{k}": s.step or s.combine}
                seen = ", ".join(expressions[p] for p in parameters(s.observe))
                both = ", ".join([f"a[{j}]" for j in range(n)] + [f"b[{j}]" for j in range(n)])
                lanes = "a[0]" if n == 1 else "a"
                observe.append(one.format(f"O{k}({seen})"))
                merge.append(one.format(f"F{k}({both})"))
                step.append(one.format(f"S{k}({both})"))
                combine.append(one.format(f"tl.reduce({lanes}, 1, F{k}, keep_dims=True)"))
            wrap = "({},)" if self.results == 1 else "{}"
            self._bound[key] = fill(
                _rows,
                self.name,
                types,
                OBSERVE=_choice(f"{self.name}_observe", pool, observe, functions),
                MERGE=_choice("merge", "a, b", merge, functions),
                STEP=_choice("step", "a, b", step, functions),
                COMBINE=_choice("combine", "a", combine, functions),
                FORMULA=adapter(f"{self.name}_formula", pool, self.formula, expressions, wrap),
            )
        self._known[asked] = self._bound[key], runtime
        return self._bound[key], runtime


def _choice(name: str, pool: str, expressions: Sequence[str], functions: dict[str, Any]) -> Any:
    """A jit function that returns expression number ``K``."""
    lines = [f"    {'el' * bool(k)}if K == {k}:\n        return {e}" for k, e in enumerate(expressions)]
    return generated(name, f"K: tl.constexpr, {pool}", "\n".join(lines) or "    return ()", **functions)
