"""The kernel behind every reduction: fold the columns of a (rows, columns) space by a monoid.

Rows and columns are each a collapsed set of dimensions, so no input is ever copied. A tile of rows and columns keeps
one running state per lane and folds the lanes at the end; few long rows are split over programs, whose partial states a
second launch of the same kernel folds in order, so results do not depend on timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._bind import SCALARS, adapter, arguments, fill, generated, given, parameters, scalar_types, slots
from gemskit._dtypes import TRITON, accumulate_type
from gemskit._following import launch_next, previous
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit._plan import Planned

#: Filled in per operator.
MAP: Any = None
MERGE: Any = None
COMBINE: Any = None
FINISH: Any = None


@jit
def _fold(
    outs, ins, row_sizes, col_sizes, out_strides, in_row_strides, in_col_strides, s0, s1, s2, s3,
    rows, cols, part, count,
    CAST: tl.constexpr, COMPUTE: tl.constexpr, KEEP: tl.constexpr, STATE: tl.constexpr, IDENTITY: tl.constexpr,
    ANCHORED: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr, UNROLL: tl.constexpr,
    AHEAD: tl.constexpr, TURNS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, FOLLOWS: tl.constexpr = False,
):  # fmt: skip
    previous(FOLLOWS)
    # EVEN: tiles cover rows and pieces exactly, so nothing is masked. That is a third of the instructions of a sum of halves.
    # ONE: a piece is one tile. WORDS: four bytes are a word, of neighbouring rows (1) or columns (2).
    TM: tl.constexpr = BM // 4 if WORDS == 1 else BM
    TN: tl.constexpr = BN // 4 if WORDS == 2 else BN
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(rows, BM)
    top = (i % blocks) * BM
    row = top + tl.arange(0, BM)[:, None]
    lane = tl.arange(0, BN)[None, :]
    piece = i // blocks
    # AHEAD: so many tiles are asked for before the ones that came are folded. The compiler moves loads of an unrolled loop
    # behind sums to save registers, so that two of a thread are under way.
    BATCH: tl.constexpr = (AHEAD if AHEAD else 1) * BN
    # TURNS: pieces take batches in turns, `part` apart, so that all programs together read the memory once from end to end.
    first = piece * (BATCH if TURNS else part)
    stop = cols if TURNS else tl.minimum(first + part, cols)
    hop = part if TURNS else BATCH
    none = _full(IDENTITY, first, STATE, TM, TN)
    state = none
    where = (ins, top, row, row_sizes, col_sizes, in_row_strides, in_col_strides)
    if AHEAD:
        held = _batch(where, first, stop, lane, rows, AHEAD, EVEN, RUN, WORDS, BN)
    if ANCHORED or ONE:
        live = (row < rows) & (first + lane < stop)
        if AHEAD:
            values = _taken(held, 0, len(ins))
        else:
            values = _load(where, first + lane, live, EVEN, RUN, WORDS)
        values = _typed_values(values, live, IDENTITY, CAST, COMPUTE, KEEP, EVEN, WORDS, BM, BN)
        fresh = _typed(MAP(values, s0, s1, s2, s3, first + lane, first), STATE, TM, TN)
        state = _where(live, fresh, none, EVEN or WORDS)
    if not ONE:
        if GROUP > 1:
            state = _full(IDENTITY, first, STATE, TM, TN // GROUP)
        for begin in tl.range(first, stop, hop, loop_unroll_factor=1 if AHEAD else UNROLL):
            if AHEAD:
                came = held
                held = _batch(where, begin + hop, stop, lane, rows, AHEAD, EVEN, RUN, WORDS, BN)
            for k in tl.static_range(BATCH // BN):
                start = begin + k * BN
                live = (row < rows) & (start + lane < stop)
                if AHEAD:
                    values = _taken(came, k * len(ins), len(ins))
                else:
                    values = _load(where, start + lane, live, EVEN, RUN, WORDS)
                values = _typed_values(values, live, IDENTITY, CAST, COMPUTE, KEEP, EVEN, WORDS, BM, BN)
                fresh = _typed(MAP(values, s0, s1, s2, s3, start + lane, start), STATE, TM, TN)
                if ANCHORED:
                    state = _where(live, MERGE(state, fresh), state, EVEN)
                elif GROUP > 1:
                    state = MERGE(state, _grouped(_where(live, fresh, none, EVEN), TM, TN, GROUP))
                else:
                    state = MERGE(state, _where(live, fresh, none, EVEN or WORDS))
    # In the shape of the states: a thread that held all of a row vector would count in it alone (20,000 instructions of var).
    lane = tl.broadcast_to(lane, (BM, BN))
    if ONE and EVEN:
        seen = tl.full((BM, BN), 1, tl.int32)
    else:
        seen = tl.maximum(stop - first - lane + (BN - 1), 0) // BN
    total = COMBINE(state, lane, seen, stop - first)
    if WORDS == 1:
        bits = (total[0][:, None, :] >> (8 * tl.arange(0, 4) + 7)[None, :, None]) & 1
        total = (tl.reshape(bits, (BM, 1)),)
    elif WORDS == 2:
        total = COMBINE(((total[0] >> (8 * tl.arange(0, 4) + 7)[None, :]) & 1,), lane, seen, stop - first)
    results = FINISH(total, s0, s1, s2, s3, count)
    for k in tl.static_range(len(outs)):
        at = _begin(top, row, row_sizes, out_strides[k], RUN) + piece * rows
        tl.store(outs[k] + at, results[k].to(outs[k].dtype.element_ty), row < rows)


@jit
def _full(IDENTITY: tl.constexpr, first, STATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    none = ()
    for k in tl.static_range(len(IDENTITY)):
        none = none + (tl.full((M, N), first if IDENTITY[k] is None else IDENTITY[k], STATE[k]),)
    return none


@jit
def _begin(top, row, sizes, strides, RUN: tl.constexpr):
    """Where rows begin. In a RUN of the last dimension one division serves the whole tile."""
    if RUN:
        last: tl.constexpr = len(sizes) - 1
        o = (row - top) * strides[last]
        i = top
        for k in tl.static_range(last, 0, -1):
            # Not `%`, of which the compiler knows no divisor where it is a scalar: loads would be of single elements.
            o += (i - i // sizes[k] * sizes[k]) * strides[k]
            i = i // sizes[k]
        return o + i * strides[0]
    else:
        return offset(row, sizes, strides)


@jit
def _batch(
    where, start, stop, lane, rows, AHEAD: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The elements of the next AHEAD tiles, as they are stored; those from ``stop`` on are not read."""
    values = ()
    for k in tl.static_range(AHEAD):
        col = start + k * BN + lane
        if EVEN:
            values = values + _load(where, col, start < stop, False, RUN, WORDS)
        else:
            values = values + _load(where, col, (where[2] < rows) & (col < stop), False, RUN, WORDS)
    return values


@jit
def _taken(values, first: tl.constexpr, count: tl.constexpr):
    found = ()
    for k in tl.static_range(count):
        found = found + (values[first + k],)
    return found


@jit
def _load(where, col, live, EVEN: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr):
    ins, top, row, row_sizes, col_sizes, in_row_strides, in_col_strides = where
    values = ()
    for k in tl.static_range(len(ins)):
        at = _begin(top, row, row_sizes, in_row_strides[k], RUN) + offset(col, col_sizes, in_col_strides[k])
        p = ins[k]
        if WORDS:
            p = p.to(tl.pointer_type(tl.uint8))
        # Read once: evicting other lines for it would write back what is dirty among them (41 us for 36, 128 MiB).
        if EVEN:
            values = values + (tl.load(p + at, eviction_policy="evict_first"),)
        else:
            values = values + (tl.load(p + at, live, eviction_policy="evict_first"),)
    return values


@jit
def _typed_values(
    values, live, IDENTITY: tl.constexpr, CAST: tl.constexpr, COMPUTE: tl.constexpr, KEEP: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    found = ()
    for k in tl.static_range(len(values)):
        v = values[k]
        if WORDS:
            v = _packed(v if EVEN else tl.where(live, v, IDENTITY[0] & 1), WORDS, BM, BN)
        elif not KEEP[k]:
            v = v.to(CAST).to(COMPUTE)
        found = found + (v,)
    return found


@jit
def _packed(v, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Four bytes as one word, whatever the alignment: the compiler drops the shifts where they were loaded as one."""
    at = 8 * tl.arange(0, 4)
    if WORDS == 1:
        return tl.reduce(tl.reshape(v.to(tl.int32), (BM // 4, 4, BN)) << at[None, :, None], 1, _either)
    else:
        return tl.reduce(tl.reshape(v.to(tl.int32), (BM, BN // 4, 4)) << at[None, None, :], 2, _either)


@jit
def _either(a, b):
    return a | b


@jit
def _typed(mapped, STATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    states = ()
    for k in tl.static_range(len(STATE)):
        states = states + (tl.broadcast_to(mapped[k].to(STATE[k]), (BM, BN)),)
    return states


@jit
def _grouped(fresh, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    states = ()
    for k in tl.static_range(len(fresh)):
        states = states + (tl.reshape(fresh[k], (M, N // GROUP, GROUP)),)
    return states


@jit
def _where(live, new, old, ALL: tl.constexpr):
    chosen = new
    if not ALL:
        chosen = ()
        for k in tl.static_range(len(new)):
            chosen = chosen + (tl.where(live, new[k], old[k]),)
    return chosen


@jit
def add_pairs(a0, a1, b0, b1):
    """The combine function of two sums."""
    return a0 + b0, a1 + b1


class Fold(Planned):
    """A reduction as a kernel: ``map`` each element to a state, ``combine`` states, ``finish`` the last one.

    Args:
        map: jit function of operands by name, ``col``, the position along the reduced dimensions, and ``start``, that of
            lane 0; returns the state.
        combine: jit function of two states, flattened: ``(a0, a1, .., b0, b1, ..)``. Associative and commutative.
        step: the same for a lane's state and an element after all others that the lane has seen, where that is cheaper.
        group: so many neighbouring elements are stepped at once along rows, as a third dimension.
        words: jit function of ``word``, four elements of one byte, whose state has the highest bit of each byte set
            where that is true; ``combine`` is a bitwise operation.
        anchored: a lane starts with the state of its first element, which ``step`` gets once more.
        join: jit function of all lanes at once, where that is cheaper than ``combine`` by pairs, or where ``step`` leaves
            states of its own: it names ``state0 ..`` (rows by lanes), ``lane``, ``seen``, how many elements each has seen, and
            ``length``, how many all have; it returns the state of each row (with size 1).
        identity: one value per state; ``"lowest"`` and ``"highest"`` are those of the type, None is where the first lane of
            a program starts.
        finish: jit function of ``state0, state1 ..``, scalars and ``count``; the states themselves if None.
        state: the type of each state: ``"accumulate"`` (float32 for halves, int64 for ints), ``"compute"`` or
            ``"index"`` (int32, or int64 where positions need it).
    """

    def __init__(
        self, name: str, *, map: Any, combine: Any, identity: Sequence[float | str | None], finish: Any = None,
        state: Sequence[str] = ("accumulate",), results: int | None = None, keep: Sequence[str] = (),
        wrap: str | None = None, step: Any = None, join: Any = None, anchored: bool = False, group: int = 1,
        words: Any = None,
    ) -> None:  # fmt: skip
        self.name, self.map, self.combine, self.finish = name, map, combine, finish
        self.identity, self.state, self.keep = tuple(identity), tuple(state), frozenset(keep)
        # Positions count the reduced dimensions in their logical order.
        self.ordered = not {"col", "start"}.isdisjoint(parameters(map))
        self.results = len(self.identity) if results is None else results
        self.names = (*parameters(map), *(parameters(finish) if finish else ()))
        self.step, self.join, self.anchored = step, join, anchored
        self.group, self.words = group, words
        self.wrap = wrap or ("({},)" if len(self.identity) == 1 else "{}")
        self._bound: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Any, tuple[str, ...]]] = {}
        super().__init__()

    @classmethod
    def of_formula(cls, name: str, formula: Any, results: int, pick: int, keep: Sequence[str]) -> Fold:
        """The sum of one result of an elementwise formula: the gradient of a broadcast operand."""
        wrap = "({},)" if results == 1 else f"({{}}[{pick}],)"
        return cls(name, map=formula, combine=language.add, identity=(0,), keep=keep, wrap=wrap)

    def to_shape(
        self, named: Named, shape: Sequence[int], like: tuple[Sequence[int], torch.dtype], compute: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Fold the space ``shape`` down to an operand that was broadcast into it, given its shape and dtype."""
        want, dtype = like
        lead = len(shape) - len(want)
        dims = [d for d in range(len(shape)) if d < lead or want[d - lead] == 1 != shape[d]]
        device = next(v.device for v in named.values() if isinstance(v, Tensor))
        if out is None:
            out = torch.empty(tuple(want), dtype=dtype, device=device)
        kept = out.reshape([1] * lead + list(want)).expand([1 if d in dims else n for d, n in enumerate(shape)])
        self(named, [kept], tuple(shape), tuple(dims), compute)
        return out

    def plan(
        self, named: Named, outs: Sequence[Tensor], shape: Sequence[int], dims: Sequence[int], compute: torch.dtype,
        cast: torch.dtype | None = None,
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launch that folds ``dims`` of ``shape`` into ``outs``, which have size 1 there.

        Elements are converted to ``cast`` (a ``dtype=`` argument) before they are mapped in ``compute``.
        """
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        full = [_layout.broadcast_strides(named[n], shape) for n in operands]
        # Any order of rows, and mostly of columns, gives the same result; the one by memory has the fewest dimensions.
        kept = by_memory([d for d in range(len(shape)) if d not in dims], full)
        inner = list(dims) if self.ordered else by_memory(dims, full)
        out_full = [tuple(o.stride()) for o in outs]
        row_sizes, row = _layout.collapse(
            [shape[d] for d in kept], [tuple(s[d] for d in kept) for s in out_full + full]
        )
        col_sizes, col = _layout.collapse([shape[d] for d in inner], [tuple(s[d] for d in inner) for s in full])
        rows, cols = math.prod(row_sizes), math.prod(shape[d] for d in inner)
        out_rows, in_rows = tuple(row[: len(outs)]), tuple(row[len(outs) :])
        across = bool(in_rows) and row_sizes[-1] > 1 and in_rows[0][-1] == 1 and col[0][-1] != 1
        # States take registers: lanes that keep several get fewer elements of a tile each.
        kind = ("across" if across else "along") + ("" if self.step is None else "_states")
        config = backends.arch().config(f"reduction_{kind}")
        size = named[operands[0]].element_size() if operands else 4
        # Tiles are counted in bytes, so that threads have loads of 16 bytes in flight whatever the type.
        warps, width = config["warps"], _layout.next_power_of_2(max(cols, 1))
        # Of folds with several states only anchored ones, which wait for memory once less, gain by tiles asked for ahead: argmax
        # of 8192² over columns 43.7 us, with four ahead 45.8. Bools as words 26.2, 28.6.
        early = len(operands) == 1 and self.words is None and (self.step is None or self.anchored)
        flight = config["flight"] if early else 0
        # Powers (norms of any order) take registers: 198 with eight tiles ahead, and they spill in 32 warps.
        light = early and [*parameters(self.map)] == operands
        split_into = config["split_into"]
        if across:
            # Fewer columns a program where that makes enough programs, and as many warps as fill the machine together.
            bm = min(max(config["rows"] // size, 1), _layout.next_power_of_2(rows))
            narrow = config["fill" if flight else "narrow"]
            if bm > 1 and _layout.cdiv(rows, bm) < narrow and _layout.cdiv(rows, bm // 2) >= config["fill"]:
                # Half a line of L2 is not read ahead: 47 us for 44.
                bm, flight = bm // 2, 0
            blocks = _layout.cdiv(rows, bm)
            if blocks >= config["fill"]:
                warps = min(_layout.next_power_of_2(config["warps"] * 1024 // blocks), config["most"])
            bn = max(1, min(warps * config["tile"] // (size * bm), width))
            # Few columns are few loads: 4M x 4 of float32 took 80 us in tiles of 512 bytes, of which the memory needs 20.
            while bn == width and bm * bn * size < config["few"] and rows // (2 * bm) >= 8 * config["fill"]:
                bm *= 2
            warps = max(1, min(warps, bm * bn * size // config["tile"]))
        elif width * size <= config["one_tile"]:
            bn, short = width, config["short_tile"] // size
            bm = max(1, min(short // bn, _layout.next_power_of_2(max(rows, 1))))
            warps = max(1, min(bm * bn * size // (32 * config["thread"]), config["most"]))
        else:
            if light and rows == 1 and cols * size >= config["long"] > 0:
                # 64M of bf16: sum, amax and norm 40.3 -> 35.5 us in pieces of four tiles, as many as a loop reads at once, not of
                # two; 36.4 in 16 warps. 32M 23.4 -> 21.9. 100 rows of 655,360 lose (36.0, so 36.4).
                warps, split_into = 2 * warps, split_into // 4
            bm, bn = 1, min(warps * config["tile"] // size, width)
        packed = self.words is not None and len(operands) == 1 == size and 4 <= (bm if across else bn)
        words = 0 if not packed else 1 if across else 2 if col[0][-1] == 1 else 0
        grouped = self.group > 1 and not across and bn >= 32 * self.group
        blocks = _layout.cdiv(rows, bm)
        pieces = 1
        if blocks < config["fill"] and cols > 2 * bn:
            pieces = min(_layout.cdiv(cols, 2 * bn), _layout.cdiv(split_into, max(1, blocks)))
        # As many bytes ahead as all programs together may ask for, where those of a program are worth it, in two batches or
        # more, and not at the cost of masks.
        tile = bm * bn * size
        asked = (n for n in (8, 4) if config["ahead"] <= n * tile and n * tile * blocks * pieces <= flight)
        ahead = next((n for n in asked if n * bn * pieces < cols and (cols % bn or cols % (n * bn) == 0)), 0)
        if light and across and pieces == 1 and ahead == 4 and warps > 1:
            # The same bytes ahead in half the warps: sum and norm of 1024x65536 36.8 -> 35.5 us.
            warps, bn, ahead = warps // 2, bn // 2, 8
        step = bn * max(ahead, 1)
        part = _layout.cdiv(_layout.cdiv(cols, pieces), step) * step if cols else 0
        pieces = _layout.cdiv(cols, part) if cols else 1
        turns = pieces > 1 and ahead > 0 and self.join is None and not self.ordered
        states = state_types(self.state, compute, cols)

        def identities(joined: bool = False) -> tuple[float | None, ...]:
            # Among the states of pieces no position is better than any.
            values = ["highest" if joined and v is None else v for v in self.identity]
            if words and not joined:
                values = [-int(v or 0) for v in self.identity]
            return tuple(identity_of(v, s) for v, s in zip(values, states))

        meta = dict(
            CAST=TRITON[cast or compute],
            COMPUTE=TRITON[compute],
            KEEP=tuple(int(n in self.keep) for n in operands),
            STATE=tuple(TRITON[s] for s in states),
            IDENTITY=identities(),
            ANCHORED=self.anchored,
            ONE=part <= bn,
            EVEN=rows % bm == 0 and cols % step == 0 < cols,
            RUN=row_sizes[-1] % bm == 0,
            GROUP=self.group if grouped else 1,
            WORDS=words,
            AHEAD=ahead,
            TURNS=turns,
            UNROLL=config["unroll"] if len(operands) < 3 else 1,
            BM=bm,
            BN=bn,
            WIDE=_layout.is_wide(shape, full) or _layout.is_wide(row_sizes, out_rows),
            num_warps=warps,
        )
        split = pieces > 1
        by = "words" if words else "groups" if grouped else ""
        kernel, runtime = self._bind(named, operands, compute, "first" if split else "whole", by)
        last = self._bind(named, [], compute, "last") if split else None

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if not rows:
                return
            ins = tuple([named[n] for n in operands])
            scalars = slots([named[n] for n in runtime])
            common = (in_rows, tuple(col), *scalars, rows, cols, pieces * step if turns else part, cols)
            if last is None:
                launch(kernel, (blocks,), (tuple(outs), ins, row_sizes, col_sizes, out_rows, *common), meta)
                return
            partial = tuple(torch.empty((pieces, rows), dtype=s, device=ins[0].device) for s in states)
            dense = tuple(_layout.contiguous(row_sizes) for _ in partial)
            launch(kernel, (blocks * pieces,), (partial, ins, row_sizes, col_sizes, dense, *common), meta)
            again = dict(
                meta, KEEP=(1,) * len(partial), ANCHORED=False, AHEAD=0, TURNS=False, GROUP=1, WORDS=0, IDENTITY=identities(True),
                **_second(pieces, rows, row_sizes[-1]),
            )  # fmt: skip
            arguments = (
                tuple(outs), partial, row_sizes, (pieces,), out_rows, dense, tuple((rows,) for _ in partial),
                *scalars, rows, pieces, pieces, cols,
            )  # fmt: skip
            launch_next(last[0], (_layout.cdiv(rows, again["BM"]),), arguments, again)

        return run

    def _bind(
        self, named: Named, operands: Sequence[str], compute: torch.dtype, step: str, by: str = ""
    ) -> tuple[Any, tuple[str, ...]]:
        """The filled driver for a whole fold, or for the first or the last step of a split one, ``by`` words or groups."""
        asked = (compute, step, by, given(self.names, named))
        if asked in self._known:
            return self._known[asked]
        reads = {n: f"values[{k}]" for k, n in enumerate(operands)}
        # A sum of many wants what it adds as it is, not rounded to a half.
        values = {**{n: named.get(n) for n in self.names}, "precise": True}
        runtime, expressions = arguments(
            self.names, values, {**reads, "col": "col", "start": "start", "count": "count"}, compute
        )
        key = (tuple(operands), tuple(expressions.items()), compute, step, by)
        if key not in self._bound:
            n = len(self.identity)
            scalars = ", ".join(SCALARS)
            pool = f"values, {scalars}, col, start"
            if step == "last":
                mapped = generated("same", pool, "    return values")
            elif by == "words":
                mapped = adapter(f"{self.name}_words", pool, self.words, {"word": "values[0]"}, "({},)")
            else:
                mapped = adapter(f"{self.name}_map", pool, self.map, expressions, self.wrap)
            one = "({},)" if n == 1 else "{}"
            both = ", ".join([f"a[{k}]" for k in range(n)] + [f"b[{k}]" for k in range(n)])
            stepped = self.step if step != "last" and (self.group == 1 or by == "groups") else None
            merge = generated("merge", "a, b", f"    return {one.format(f'F({both})')}", F=stepped or self.combine)
            lanes = "a[0]" if n == 1 else "a"
            pool = "a, lane, seen, length"
            if self.join is not None and step != "last":
                named_states = {f"state{k}": f"a[{k}]" for k in range(n)}
                combine = adapter("join", pool, self.join, {**named_states, **{p: p for p in pool.split(", ")}}, one)
            else:
                tree = one.format(f"tl.reduce({lanes}, 1, F, keep_dims=True)")
                combine = generated("combine", pool, f"    return {tree}", F=self.combine)
            if step == "first" or self.finish is None:
                finish = generated("finish", f"total, {scalars}, count", "    return total")
            else:
                states = {f"state{k}": f"total[{k}]" for k in range(n)}
                wrap = "({},)" if self.results == 1 else "{}"
                finish = adapter(
                    f"{self.name}_finish", f"total, {scalars}, count", self.finish, {**expressions, **states}, wrap
                )
            name = self.name + {"whole": "", "first": "_part", "last": "_join"}[step]
            self._bound[key] = fill(
                _fold, name, scalar_types(runtime, compute), MAP=mapped, MERGE=merge, COMBINE=combine, FINISH=finish
            )
        self._known[asked] = self._bound[key], runtime
        return self._bound[key], runtime


def by_memory(dims: Sequence[int], strides: Sequence[_layout.Strides]) -> list[int]:
    """``dims`` from the largest stride of the first operand to the smallest; expanded ones change slowest."""
    return sorted(dims, key=lambda d: [-(abs(s[d]) or math.inf) for s in strides[:1]])


def state_types(kinds: Sequence[str], compute: torch.dtype, cols: int) -> list[torch.dtype]:
    """The types of states over ``cols`` columns. The largest index stands for none."""
    index = torch.int64 if cols >= 2**31 - 1 else torch.int32
    types = {"accumulate": accumulate_type(compute), "compute": compute, "index": index}
    return [types[k] for k in kinds]


def identity_of(v: float | str | None, dtype: torch.dtype) -> float | None:
    """The number that ``"lowest"`` and ``"highest"`` stand for in ``dtype``."""
    if not isinstance(v, str):
        return v
    if dtype == torch.bool:
        return v == "highest"
    if dtype.is_floating_point:
        return -math.inf if v == "lowest" else math.inf
    info = torch.iinfo(dtype)
    return info.min if v == "lowest" else info.max


def _second(pieces: int, rows: int, run: int) -> dict[str, int]:
    """The tile of the launch that folds the states of pieces: small, as it is mostly waited for."""
    bn = min(1024, _layout.next_power_of_2(pieces))
    bm = max(1, min(1024 // bn, _layout.next_power_of_2(rows), 32))
    even = rows % bm == 0 and pieces % bn == 0
    return dict(BN=bn, BM=bm, ONE=pieces <= bn, EVEN=even, RUN=run % bm == 0, num_warps=4)
