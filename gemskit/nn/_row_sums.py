"""Rows whose formula is a gradient, together with the sums over all rows that are the gradients of weight and bias.

A program takes a block of rows, keeps the sums of its columns in registers and stores them once; a second, small kernel adds
those of all programs in order. So the elements are read once, where a fold of its own would read them a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import fill, generated, parameters, slots
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit.nn._row_space import Space
from gemskit.nn._rows import Rows, Statistic, _again, _converted, _masked, _nothing, _read, _start, _tiles

#: Filled in per operator.
SUMS: Any = None
COMBINE: Any = None
JOIN: Any = None
FINISH: Any = None
BLOCK: Any = None


@jit
def _row_sums(
    outs, sums, ins, row_sizes, col_sizes, out_row, out_col, in_row, in_col, s0, s1, s2, s3, rows, cols, part,
    COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, VECTORS: tl.constexpr, OTHERS: tl.constexpr, OBSERVED: tl.constexpr, NAMED: tl.constexpr,
    NONE: tl.constexpr, IDENTITY: tl.constexpr, ZEROS: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    lane = tl.arange(0, BM)[:, None]
    col = tl.arange(0, BN)[None, :]
    first = i * part
    stop = tl.minimum(first + part, rows)
    total = ()
    for _t in tl.static_range(COUNT):
        total = total + (_start(ZEROS, 0, COMPUTE, BM, BN),)
    none = _nothing(first + lane, ins)
    vectors = _read(
        none, ins, first + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, VECTORS, ALONG, EVEN, ""
    )
    if STAGES > 0:
        # Copied to shared memory, so many blocks of rows ahead less one.
        for start in tl.range(first, stop, BM, num_stages=STAGES):
            tiles = _tiles(
                vectors, ins, start + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, OTHERS, ALONG, EVEN,
                "evict_first", COUNT, BN,
            )  # fmt: skip
            total = BLOCK(
                total, tiles, outs, ins, s0, s1, s2, s3, start + lane, stop, col, rows, cols, row_sizes, col_sizes, out_row,
                out_col, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, OBSERVED, NAMED, NONE, IDENTITY, ZEROS,
                EVEN, COUNT, BM, BN,
            )  # fmt: skip
    else:
        tiles = _tiles(
            vectors, ins, first + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, OTHERS, ALONG, EVEN,
            "evict_first", COUNT, BN,
        )  # fmt: skip
        for start in range(first, stop, BM):
            # The next rows are on their way while these are summed.
            following = _tiles(
                vectors, ins, start + lane + BM, col, rows, cols, row_sizes, col_sizes, in_row, in_col, OTHERS, ALONG,
                2 if EVEN else 0, "evict_first", COUNT, BN,
            )  # fmt: skip
            total = BLOCK(
                total, tiles, outs, ins, s0, s1, s2, s3, start + lane, stop, col, rows, cols, row_sizes, col_sizes, out_row,
                out_col, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, OBSERVED, NAMED, NONE, IDENTITY, ZEROS,
                EVEN, COUNT, BM, BN,
            )  # fmt: skip
            tiles = following
    for t in tl.static_range(COUNT):
        for k in tl.static_range(len(sums)):
            c = col + t * BN
            tl.store(sums[k] + i * cols + c, tl.sum(total[t][k], 0, keep_dims=True), c < cols)


@jit
def _block(
    total, tiles, outs, ins, s0, s1, s2, s3, row, stop, col, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
    in_col, COMPUTE: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, OUT_ALONG: tl.constexpr,
    PICK: tl.constexpr, OBSERVED: tl.constexpr, NAMED: tl.constexpr, NONE: tl.constexpr, IDENTITY: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Finish a block of rows; the sums with what it adds."""
    stats = ()
    for K in tl.static_range(len(IDENTITY)):
        state = _start(IDENTITY, K, COMPUTE, BM, BN)
        for t in tl.static_range(COUNT):
            c = col + t * BN
            raw = _beside(tiles[t], ins, stop > 0, c, cols, col_sizes, in_col, OBSERVED, EVEN, BN)
            state = JOIN(
                state, (raw,), ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, K,
                COMPUTE, ROUND, KEEP, ALONG, NONE, IDENTITY, EVEN, COUNT == 1, BM, BN,
            )  # fmt: skip
        stats = stats + COMBINE(K, state)
        if COUNT > 1:
            tiles = _again(tiles, stats[K], ALONG)
    grown = ()
    for t in tl.static_range(COUNT):
        c = col + t * BN
        raw = _beside(tiles[t], ins, stop > 0, c, cols, col_sizes, in_col, NAMED, EVEN, BN)
        FINISH(
            outs, (raw,), ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
            in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NONE, EVEN, t == 0, BM, BN,
        )  # fmt: skip
        v = _converted(raw, COMPUTE, ROUND, KEEP)
        terms = SUMS(v, s0, s1, s2, s3, c, cols)
        terms = _masked(terms, (row < stop) & (c < cols), ZEROS, 0, COMPUTE, EVEN, BM, BN)
        grown = grown + (_added(total[t], terms),)
    return grown


@jit
def _beside(tile, ins, always, col, cols, col_sizes, in_col, TAKE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr):
    """``tile`` with its vectors, for which there are no registers from row to row: they come from the cache."""
    values = ()
    for k in tl.static_range(len(ins)):
        v = tile[k]
        if TAKE[k]:
            v = tl.zeros((1, BN), ins[k].dtype.element_ty)
            # Always so, but where the compiler knows it it copies vectors ahead like rows, for which there is no room.
            if always:
                at = offset(col, col_sizes, in_col[k])
                if EVEN:
                    v = tl.load(ins[k] + at)
                else:
                    v = tl.load(ins[k] + at, col < cols)
        values = values + (v,)
    return values


@jit
def _added(total, terms):
    grown = ()
    for k in tl.static_range(len(total)):
        grown = grown + (total[k] + terms[k],)
    return grown


@jit(repr=lambda _: "row_sums_join")
def _join(outs, sums, count, cols, BM: tl.constexpr, BN: tl.constexpr):
    """The sums of all programs, in their order."""
    col = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    for k in tl.static_range(len(outs)):
        total = tl.zeros((BM, BN), sums[k].dtype.element_ty)
        for start in range(0, count, BM):
            row = start + tl.arange(0, BM)[:, None]
            total += tl.load(sums[k] + row * cols + col, (row < count) & (col < cols), other=0)
        tl.store(outs[k] + col, tl.sum(total, 0, keep_dims=True).to(outs[k].dtype.element_ty), col < cols)


class RowSums(Rows):
    """A formula of rows and sums over the rows, by name of the vectors that they are the gradients of."""

    def __init__(
        self,
        name: str,
        formula: Any,
        statistics: Sequence[Statistic],
        sums: Mapping[str, Any],
        keep: Sequence[str] = (),
    ) -> None:
        super().__init__(name, formula, statistics, keep=keep)
        self.sums = dict(sums)
        self.names = tuple(dict.fromkeys((*self.names, *(p for f in self.sums.values() for p in parameters(f)))))

    def fits(self, named: Named, cols: int, compute: torch.dtype) -> bool:
        """Whether a row and its sums stay in registers."""
        config = backends.arch().config("rowwise")
        return 0 < cols * (1 + len(self.sums)) <= config["sums_max"] * 4 // max(4, compute.itemsize) or (
            0 < self._held(named, cols, compute) <= config["sums_hold"]
        )

    def _held(self, named: Named, cols: int, compute: torch.dtype) -> int:
        """Bytes of the sums, and of a row as it is stored."""
        grad: Tensor = named["grad"]
        read = [
            v.dtype.itemsize
            for v in (named.get(n) for n in self.names)
            if isinstance(v, Tensor) and v.ndim == grad.ndim and v.numel() == grad.numel()
        ]
        return cols * (sum(read) + compute.itemsize * len(self.sums))

    def plan(  # type: ignore[override]
        self, named: Named, outs: Sequence[Tensor], shape: Sequence[int], dims: Sequence[int], compute: torch.dtype,
        pick: Sequence[int],
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launches for ``outs``: as many results of the formula as ``pick`` has, then the vectors."""
        n = len(pick)
        space = Space.of(named, outs[:n], [o for o in self.names if isinstance(named.get(o), Tensor)], shape, dims)
        config = backends.arch().config("rowwise")
        rows, cols = space.rows, space.cols
        bn = _layout.next_power_of_2(cols)
        tiles = 1
        if cols * (1 + len(self.sums)) > config["sums_max"] * 4 // max(4, compute.itemsize):
            # A row in tiles of 8 elements a thread, which stay in registers as they are stored.
            bn = 256 * config["sums_warps"]
            tiles = _layout.cdiv(cols, bn)
            bm, warps, stages = 1, config["sums_warps"], config["long_stages"]
        else:
            # Several rows at a time wait once for each other's sums (H200, 8192x4096: 65 us, one by one 73; 32768x1024: 69 for 75).
            bm = max(1, min(config["sums_tile"] // (1 if bn >= 4096 else 2) // bn, _layout.next_power_of_2(rows)))
            warps, stages = min(config["warps"], max(1, bm * bn // 512)), config["sums_stages"]
        # Long rows: two programs do not fit on a processor (H200, 8192x4096: 79 us for 85; 32768x1024: 110 for 84).
        programs = config["programs"] // (2 if bn >= 4096 else 1)
        part = _layout.cdiv(_layout.cdiv(rows, bm), programs) * bm
        count = _layout.cdiv(rows, part)
        kernel, runtime = self._bind(_row_sums, named, space.operands, compute, "tile", space.precise)
        many = tiles > 1
        none = (0,) * len(space.operands)
        meta = dict(
            **{
                n: v
                for n, v in self._meta(space, compute, "tile", pick).items()
                if n not in ("ELEMENTS", "OBSERVED", "NAMED")
            },
            # Vectors of one tile are read once, others with every row.
            VECTORS=none if many else tuple(int(a == 1) for a in space.along),
            OTHERS=tuple(int(a != 1) for a in space.along),
            OBSERVED=self._vectors(space, [s.observe for s in self.statistics["tile"]]) if many else none,
            NAMED=self._vectors(space, [self.formula, *self.sums.values()]) if many else none,
            NONE=none,
            ZEROS=((0,) * len(self.sums),),
            EVEN=int(part % bm == 0 == rows % part and cols == bn * tiles),
            COUNT=tiles,
            STAGES=stages,
            BM=bm,
            BN=bn,
            num_warps=warps,
        )
        across = config["join_cols"]
        again = dict(BM=config["join_tile"] // across, BN=across, num_warps=config["join_tile"] // 512)

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if not rows:
                return
            ins = tuple([named[o] for o in space.operands])
            scalars = slots([named[s] for s in runtime])
            sums = tuple([torch.empty((count, cols), dtype=compute, device=ins[0].device) for _ in self.sums])
            launch(
                kernel, (count,), (tuple(outs[:n]), sums, ins, *space.strided, *scalars, rows, cols, part), meta
            )  # fmt: skip
            launch(_join, (_layout.cdiv(cols, across),), (tuple(outs[n:]), sums, count, cols), again)

        return run

    @staticmethod
    def _vectors(space: Space, functions: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(o == 1 and a == 1) for o, a in zip(space.others(functions), space.along))

    def _more(self, pool: str, expressions: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, Any]:
        calls = [f"S{k}({', '.join(expressions[p] for p in parameters(f))})" for k, f in enumerate(self.sums.values())]
        sums = generated(
            f"{self.name}_sums", pool.replace("stats, ", ""), f"    return ({', '.join(calls)},)",
            **{f"S{k}": f for k, f in enumerate(self.sums.values())},
        )  # fmt: skip
        parts = {n: names[n] for n in ("COMBINE", "JOIN", "FINISH")}
        return {"BLOCK": fill(_block, f"{self.name}_block", SUMS=sums, **parts)}
