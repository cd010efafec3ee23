"""The kernel behind every row-wise operator: statistics of a row, then a formula per element.

The space is (rows, columns), each a collapsed set of dimensions. Operands broadcast along either: a weight varies along the
columns only, a saved statistic along the rows only. A row that fits one tile is read once and stays in registers; a longer
one is read once per statistic and once for the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import SCALARS, adapter, annotations, arguments, fill, generated, parameters, slots
from gemskit._dtypes import TRITON
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit.reduce._fold import identity_of

#: Filled in per operator.
OBSERVE: Any = None
MERGE: Any = None
COMBINE: Any = None
FORMULA: Any = None


@triton.jit
def _load(
    ins, row, col, rows, cols, row_sizes, col_sizes, row_strides, col_strides,
    COMPUTE: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    values = ()
    for k in tl.static_range(len(ins)):
        if ALONG[k] == 3:
            at = offset(row, row_sizes, row_strides[k]) + offset(col, col_sizes, col_strides[k])
            v = tl.load(ins[k] + at, (row < rows) & (col < cols))
        elif ALONG[k] == 2:
            v = tl.load(ins[k] + offset(row, row_sizes, row_strides[k]), row < rows)
        else:
            v = tl.load(ins[k] + offset(col, col_sizes, col_strides[k]), col < cols)
        if not KEEP[k]:
            v = v.to(COMPUTE)
        values = values + (v,)
    return values


@triton.jit
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


@triton.jit
def _start(IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.full((BM, BN), IDENTITY[K][k], COMPUTE),)
    return state


@triton.jit
def _masked(
    fresh, live, IDENTITY: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    state = ()
    for k in tl.static_range(len(IDENTITY[K])):
        state = state + (tl.where(live, fresh[k], tl.full((BM, BN), IDENTITY[K][k], COMPUTE)),)
    return state


@triton.jit
def _rows(
    outs, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols,
    COMPUTE: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr, PICK: tl.constexpr,
    IDENTITY: tl.constexpr, LOOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row = (i * BM + tl.arange(0, BM))[:, None]
    col = tl.arange(0, BN)[None, :]
    stats = ()
    if LOOP:
        for K in tl.static_range(len(IDENTITY)):
            state = _start(IDENTITY, K, COMPUTE, BM, BN)
            for start in range(0, cols, BN):
                c = start + col
                v = _load(ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, KEEP, ALONG)
                fresh = OBSERVE(K, v, stats, s0, s1, s2, s3, c, cols)
                state = MERGE(K, state, _masked(fresh, (row < rows) & (c < cols), IDENTITY, K, COMPUTE, BM, BN))
            stats = stats + COMBINE(K, state)
        for start in range(0, cols, BN):
            c = start + col
            v = _load(ins, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, KEEP, ALONG)
            results = FORMULA(v, stats, s0, s1, s2, s3, c, cols)
            _store(outs, results, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, BM, BN)
    else:
        v = _load(ins, row, col, rows, cols, row_sizes, col_sizes, in_row, in_col, COMPUTE, KEEP, ALONG)
        for K in tl.static_range(len(IDENTITY)):
            fresh = OBSERVE(K, v, stats, s0, s1, s2, s3, col, cols)
            stats = stats + COMBINE(K, _masked(fresh, (row < rows) & (col < cols), IDENTITY, K, COMPUTE, BM, BN))
        results = FORMULA(v, stats, s0, s1, s2, s3, col, cols)
        _store(outs, results, row, col, rows, cols, row_sizes, col_sizes, out_row, out_col, OUT_ALONG, PICK, BM, BN)


@dataclass(frozen=True)
class Statistic:
    """Values that are folded over a row: ``observe`` each element (operands, earlier statistics, ``col``, ``cols``, scalars)."""

    names: tuple[str, ...]
    observe: Any
    combine: Any
    identity: tuple[float | str, ...]


class Rows:
    """Statistics and a formula as a kernel. The formula names operands, statistics, scalars, ``col`` and ``cols``."""

    def __init__(
        self, name: str, formula: Any, statistics: Sequence[Statistic] = (), *, results: int = 1, keep: Sequence[str] = ()
    ) -> None:
        self.name, self.formula, self.statistics, self.results = name, formula, tuple(statistics), results
        self.keep = frozenset(keep)
        self.names = tuple(dict.fromkeys(p for f in (*(s.observe for s in self.statistics), formula) for p in parameters(f)))
        self._bound: dict[Any, Any] = {}

    def plan(
        self, named: Named, shape: Sequence[int], dims: Sequence[int], outs: Sequence[Tensor], compute: torch.dtype,
        pick: Sequence[int] | None = None,
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launch over rows of ``shape`` that extend along ``dims``; ``outs`` have that shape, or size 1 in ``dims``."""
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        full = [_layout.broadcast_strides(t, shape) for t in (*outs, *(named[n] for n in operands))]
        kept = [d for d in range(len(shape)) if d not in dims]
        row_sizes, row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in full])
        col_sizes, col = _layout.collapse([shape[d] for d in dims], [tuple(s[d] for d in dims) for s in full])
        rows, cols = math.prod(row_sizes), math.prod(col_sizes)
        if 0 in shape:
            rows, cols = math.prod(shape[d] for d in kept), math.prod(shape[d] for d in dims)
        n = len(outs)
        config = backends.arch().config("rowwise")
        one_tile, loop_tile = config["one_tile_max"], config["loop_tile"]
        bn = triton.next_power_of_2(max(cols, 1))
        across = row_sizes[-1] > 1 and row[n][-1] == 1 and col[n][-1] != 1
        bm = min(config["across"], triton.next_power_of_2(rows)) if across and rows else 1
        loop = bm * bn > one_tile
        if loop:
            bn = max(16, loop_tile // bm)
        elif not across:
            bm = max(1, min(config["short"] // bn, triton.next_power_of_2(max(rows, 1))))
        along = [(bool(any(c))) + 2 * bool(any(r)) for r, c in zip(row, col)]
        # An operand that does not vary at all counts as a row's: one value, loaded once per row.
        ins_along = tuple(a or 2 for a in along[n:])
        outs_along = tuple(3 if tuple(o.shape[d] for d in dims) == tuple(shape[d] for d in dims) else 2 for o in outs)
        kernel, runtime = self._bind(named, operands, compute)
        meta = dict(
            COMPUTE=TRITON[compute],
            KEEP=tuple(int(o in self.keep) for o in operands),
            ALONG=ins_along,
            OUT_ALONG=outs_along,
            PICK=tuple(pick if pick is not None else range(self.results)),
            IDENTITY=tuple(tuple(identity_of(v, compute) for v in s.identity) for s in self.statistics),
            LOOP=loop,
            BM=bm,
            BN=bn,
            WIDE=_layout.is_wide(row_sizes, row) or _layout.is_wide(col_sizes, col) or _layout.is_wide(shape, full),
            num_warps=min(config["warps"], max(1, bm * bn // 512)),
        )
        grid = triton.cdiv(rows, bm)
        strides = (tuple(row[:n]), tuple(col[:n]), tuple(row[n:]), tuple(col[n:]))

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if rows:
                ins = tuple([named[o] for o in operands])
                scalars = slots([named[s] for s in runtime])
                launch(kernel, (grid,), (tuple(outs), ins, row_sizes, col_sizes, *strides, *scalars, rows, cols), meta)

        return run

    def _bind(self, named: Named, operands: Sequence[str], compute: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        reads = {o: f"v[{k}]" for k, o in enumerate(operands)}
        known = [n for s in self.statistics for n in s.names]
        reads.update({n: f"stats[{k}]" for k, n in enumerate(known)}, col="col", cols="cols")
        given = {n: named.get(n) for n in self.names if n not in reads or n in operands}
        runtime, expressions = arguments(self.names, given, reads, compute)
        key = (tuple(operands), tuple(expressions.items()), compute)
        if key not in self._bound:
            pool = f"v, stats, {', '.join(SCALARS)}, col, cols"
            observe, merge, combine = [], [], []
            functions: dict[str, Any] = {}
            for k, s in enumerate(self.statistics):
                n = len(s.names)
                one = "({},)" if n == 1 else "{}"
                functions |= {f"O{k}": s.observe, f"F{k}": s.combine}
                seen = ", ".join(expressions[p] for p in parameters(s.observe))
                both = ", ".join([f"a[{j}]" for j in range(n)] + [f"b[{j}]" for j in range(n)])
                lanes = "a[0]" if n == 1 else "a"
                observe.append(one.format(f"O{k}({seen})"))
                merge.append(one.format(f"F{k}({both})"))
                combine.append(one.format(f"tl.reduce({lanes}, 1, F{k}, keep_dims=True)"))
            wrap = "({},)" if self.results == 1 else "{}"
            self._bound[key] = fill(
                _rows,
                self.name,
                annotations(runtime, compute),
                OBSERVE=_choice(f"{self.name}_observe", pool, observe, functions),
                MERGE=_choice("merge", "a, b", merge, functions),
                COMBINE=_choice("combine", "a", combine, functions),
                FORMULA=adapter(f"{self.name}_formula", pool, self.formula, expressions, wrap),
            )
        return self._bound[key], runtime


def _choice(name: str, pool: str, expressions: Sequence[str], functions: dict[str, Any]) -> Any:
    """A jit function that returns expression number ``K``."""
    lines = [f"    {'el' * bool(k)}if K == {k}:\n        return {e}" for k, e in enumerate(expressions)]
    return generated(name, f"K: tl.constexpr, {pool}", "\n".join(lines) or "    return ()", **functions)
