"""The kernel behind every scan: running states along the columns of a (rows, columns) space.

A program walks the tiles of its columns and carries the state of what came before; the next tile is on its way while one is
scanned. Few long rows are cut into pieces: one launch takes the state of each piece, one scans those, one scans the pieces,
each from the state before it. So whole rows cost one read and one write of each element, cut ones a second read. What is
combined with what depends on the shape alone, so results do not depend on timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import adapter, fill, generated, parameters
from gemskit._dtypes import TRITON
from gemskit._following import launch_next, previous
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit._plan import Planned
from gemskit.reduce._fold import by_memory, identity_of, state_types

#: Filled in per operator.
MAP: Any = None
MERGE: Any = None
COMBINE: Any = None
SCAN: Any = None
FINISH: Any = None


@jit
def _tile(
    ins, row, lane, start, rows, cols, first, part, row_sizes, in_rows, in_cols, REVERSE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """What is in a tile, as it is in memory, its columns, and which of them belong to the piece."""
    if REVERSE:
        col = cols - BN - start + lane
        live = (row < rows) & (col >= cols - first - part) & (col >= 0) & (col < cols - first)
    else:
        col = start + lane
        # Not below the smaller of the two: of a minimum no divisibility is known, and a vector needs one answer.
        live = (row < rows) & (col < first + part) & (col < cols)
    values = ()
    for k in tl.static_range(len(ins)):
        values = values + (tl.load(ins[k] + offset(row, row_sizes, in_rows[k]) + col * in_cols[k], live),)
    return values, col, live


@jit
def _scan(
    outs, ins, carries, row_sizes, out_rows, in_rows, out_cols, in_cols, rows, cols, part,
    CAST: tl.constexpr, COMPUTE: tl.constexpr, KEEP: tl.constexpr, STATE: tl.constexpr, IDENTITY: tl.constexpr,
    TOTALS: tl.constexpr, COMMUTES: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, FOLLOWS: tl.constexpr = False,
):  # fmt: skip
    previous(FOLLOWS)
    # Pieces, tiles and carries are counted in the order of the scan; REVERSE only mirrors where a tile lies in memory.
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(rows, BM)
    row = ((i % blocks) * BM + tl.arange(0, BM))[:, None]
    lane = tl.arange(0, BN)[None, :]
    piece = i // blocks
    if carries is not None:
        # The last pieces first: they were read last for their totals and may still be cached.
        piece = tl.cdiv(cols, part) - 1 - piece
    first = piece * part
    stop = tl.minimum(first + part, cols)
    state = ()
    for k in tl.static_range(len(IDENTITY)):
        if TOTALS and COMMUTES:
            start_state = tl.full((BM, BN), IDENTITY[k], STATE[k])
        else:
            start_state = tl.full((BM, 1), IDENTITY[k], STATE[k])
            if carries is not None:
                before = tl.load(carries[k] + (piece - 1) * rows + row, (row < rows) & (piece > 0))
                start_state = tl.where(piece > 0, before, start_state)
        state = state + (start_state,)
    raw, col, live = _tile(ins, row, lane, first, rows, cols, first, part, row_sizes, in_rows, in_cols, REVERSE, BN)
    for start in range(first, stop, BN):
        ahead, next_col, next_live = _tile(
            ins, row, lane, start + BN, rows, cols, first, part, row_sizes, in_rows, in_cols, REVERSE, BN
        )
        values = ()
        for k in tl.static_range(len(ins)):
            v = raw[k]
            if not KEEP[k]:
                v = v.to(CAST).to(COMPUTE)
            values = values + (v,)
        fresh = MAP(values, col)
        masked = ()
        for k in tl.static_range(len(IDENTITY)):
            masked = masked + (tl.where(live, fresh[k].to(STATE[k]), tl.full((BM, BN), IDENTITY[k], STATE[k])),)
        if TOTALS and COMMUTES:
            state = MERGE(state, masked)
        else:
            running = MERGE(state, SCAN(masked))
            carry = ()
            for k in tl.static_range(len(IDENTITY)):
                last = lane == (0 if REVERSE else BN - 1)
                nothing = tl.full((BM, BN), 0, STATE[k])
                if STATE[k].is_floating():
                    nothing = -1.0 * nothing  # -0.0, which changes no sum: 0.0 would change -0.0
                carry = carry + (tl.sum(tl.where(last, running[k], nothing), 1, keep_dims=True).to(STATE[k]),)
            state = carry
            if not TOTALS:
                results = FINISH(values, running, col)
                for k in tl.static_range(len(outs)):
                    at = offset(row, row_sizes, out_rows[k]) + col * out_cols[k]
                    tl.store(outs[k] + at, results[k].to(outs[k].dtype.element_ty), live)
        raw, col, live = ahead, next_col, next_live
    if TOTALS:
        total = state
        if COMMUTES:
            total = COMBINE(state)
        for k in tl.static_range(len(outs)):
            tl.store(outs[k] + piece * rows + row, total[k], row < rows)


class Scan(Planned):
    """A scan as a kernel: ``map`` each element to a state, store the combination of all states up to it.

    Args:
        map: jit function of operands by name and ``col``, the position along the row, returning the state.
        combine: jit function of two states, flattened: ``(a0, a1, .., b0, b1, ..)``. Associative; a comes before b in the
            order of the scan.
        identity: one value per state; ``"lowest"`` and ``"highest"`` are those of the type. It need only be one to the right,
            as b, and for the state before the first element, as a.
        finish: jit function of ``state0, state1 ..``, operands by name and ``col``, returning what is stored; the states
            themselves if None.
        state: the type of each state, as of :class:`gemskit.reduce._fold.Fold`.
        reverse: from the last column to the first.
        commutes: whether ``combine`` is commutative too; then the states of pieces are folded by lanes, which is cheaper.
    """

    def __init__(
        self, name: str, *, map: Any, combine: Any, identity: Sequence[float | str],
        finish: Any = None, state: Sequence[str] = ("accumulate",), keep: Sequence[str] = (),
        reverse: bool = False, commutes: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.map, self.combine, self.finish = name, map, combine, finish
        self.identity, self.state, self.keep = tuple(identity), tuple(state), frozenset(keep)
        self.reverse, self.commutes = reverse, commutes
        self.names = tuple(dict.fromkeys((*parameters(map), *(parameters(finish) if finish else ()))))
        self._bound: dict[tuple[str, ...], Any] = {}
        super().__init__()

    def plan(
        self, named: Named, outs: Sequence[Tensor], shape: Sequence[int], dim: int, compute: torch.dtype,
        cast: torch.dtype | None = None,
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launch along ``dim`` of ``shape`` into ``outs``, which have that shape.

        Elements are converted to ``cast`` (a ``dtype=`` argument) before they are mapped in ``compute``.
        """
        if 0 in shape:
            return lambda outs, named: None
        shape = tuple(shape) or (1,)
        dim %= len(shape)
        operands = tuple(n for n in self.names if isinstance(named.get(n), Tensor))
        ins = [_layout.broadcast_strides(named[n], shape) for n in operands]
        both = [_layout.broadcast_strides(o, shape) for o in outs] + ins
        kept = by_memory([d for d in range(len(shape)) if d != dim], ins)
        row_sizes, row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in both])
        col = tuple(s[dim] for s in both)
        rows, cols, n = math.prod(row_sizes), shape[dim], len(outs)
        across = bool(ins) and row[n][-1] == 1 and col[n] != 1 and rows > 1
        config = backends.arch().config("scan_across" if across else "scan_along")
        # Several states, and doubles, take the registers of more elements.
        tile = config["tile"] * 4 // max(4, compute.itemsize) // (1 if len(self.state) < 3 else 2)
        if across:
            bm = min(config["rows"], _layout.next_power_of_2(rows))
            bn = min(2 * tile // bm, _layout.next_power_of_2(cols))
        else:
            bn = min(tile, _layout.next_power_of_2(cols))
            bm = min(tile // bn, _layout.next_power_of_2(rows))
        blocks = _layout.cdiv(rows, bm)
        pieces = 1
        # Half of what fills the device hides latency well enough not to pay for a second read.
        if blocks < config["split_below"] // 2 and cols > 2 * bn:
            pieces = min(_layout.cdiv(cols, 2 * bn), _layout.cdiv(config["split_below"], blocks))
        part = _layout.cdiv(_layout.cdiv(cols, pieces), bn) * bn
        pieces = _layout.cdiv(cols, part)
        states = state_types(self.state, compute, cols)
        kernel, join = self._bind(operands), self._bind(()) if pieces > 1 else None
        meta = dict(
            CAST=TRITON[cast or compute],
            COMPUTE=TRITON[compute],
            KEEP=tuple(int(n in self.keep) for n in operands),
            STATE=tuple(TRITON[s] for s in states),
            IDENTITY=tuple(identity_of(v, s) for v, s in zip(self.identity, states)),
            TOTALS=False,
            COMMUTES=self.commutes,
            REVERSE=self.reverse,
            BM=bm,
            BN=bn,
            WIDE=_layout.is_wide(shape, both),
            num_warps=config["warps"],
        )
        width = _layout.next_power_of_2(pieces)
        again = dict(meta, KEEP=(1,) * len(states), REVERSE=False, BN=width, BM=min(max(1, tile // width), 64))
        layout = (row_sizes, tuple(row[:n]), tuple(row[n:]), col[:n], col[n:])
        # Scratch is (pieces, rows).
        zeros, ones, steps = ((0,) * len(row_sizes),) * len(states), ((1,),) * len(states), (rows,) * len(states)

        def run(outs: Sequence[Tensor], named: Named) -> None:
            ins = tuple([named[o] for o in operands])
            carries = None
            if join is not None:
                totals = tuple(torch.empty((pieces, rows), dtype=s, device=ins[0].device) for s in states)
                carries = tuple(torch.empty_like(t) for t in totals)
                only_ins = (row_sizes, zeros, layout[2], steps, layout[4])
                launch(
                    kernel,
                    (blocks * pieces,),
                    (totals, ins, None, *only_ins, rows, cols, part),
                    dict(meta, TOTALS=True),
                )
                dense = ((rows,), ones, ones, steps, steps)
                launch_next(
                    join,
                    (_layout.cdiv(rows, again["BM"]),),
                    (carries, totals, None, *dense, rows, pieces, pieces),
                    again,
                )
            last = launch if carries is None else launch_next
            last(kernel, (blocks * pieces,), (tuple(outs), ins, carries, *layout, rows, cols, part), meta)

        return run

    def _bind(self, operands: tuple[str, ...]) -> Any:
        """The filled driver; without operands the one that scans the states of pieces, in their order."""
        if operands not in self._bound:
            n = len(self.identity)
            one = "({},)" if n == 1 else "{}"
            both = ", ".join([f"a[{k}]" for k in range(n)] + [f"b[{k}]" for k in range(n)])
            lanes = "a[0]" if n == 1 else "a"
            reverse = self.reverse and bool(operands)

            def step(name: str, pool: str, expression: str) -> Any:
                return generated(name, pool, f"    return {one.format(expression)}", F=self.combine)

            reads = {o: f"values[{k}]" for k, o in enumerate(operands)} | {"col": "col"}
            states = {f"state{k}": f"running[{k}]" for k in range(n)}
            pool = "values, running, col"
            self._bound[operands] = fill(
                _scan,
                self.name if operands else f"{self.name}_join",
                MAP=adapter(f"{self.name}_map", "values, col", self.map, reads, one)
                if operands
                else generated("same", "values, col", "    return values"),
                MERGE=step("merge", "a, b", f"F({both})"),
                COMBINE=step("combine", "a", f"tl.reduce({lanes}, 1, F, keep_dims=True)"),
                SCAN=step("scan", "a", f"tl.associative_scan({lanes}, 1, F, reverse={reverse})"),
                FINISH=adapter(f"{self.name}_finish", pool, self.finish, reads | states, "({},)")
                if operands and self.finish
                else generated("finish", pool, "    return running"),
            )
        return self._bound[operands]
