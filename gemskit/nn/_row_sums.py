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
from gemskit._following import launch_next, previous
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit.nn._row_space import Space
from gemskit.nn._rows import Rows, Statistic
from gemskit.nn._rows_kernel import again, converted, identities, masked, placeholders, read, read_tiles

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
    NONE: tl.constexpr, IDENTITY: tl.constexpr, ZEROS: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr,
    STAGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
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
        total = total + (identities(ZEROS, 0, COMPUTE, BM, BN),)
    none = placeholders(first + lane, ins)
    vectors = read(
        none, ins, first + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, VECTORS, ALONG, EVEN, ""
    )
    if STAGES > 0:
        # Copied to shared memory, so many blocks of rows ahead less one.
        for start in tl.range(first, stop, BM, num_stages=STAGES):
            tiles = read_tiles(
                vectors, ins, start + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, OTHERS, ALONG, EVEN,
                "evict_first", COUNT, BN,
            )  # fmt: skip
            total = BLOCK(
                total, tiles, outs, ins, s0, s1, s2, s3, start + lane, stop, col, rows, cols, row_sizes, col_sizes, out_row,
                out_col, in_row, in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, OBSERVED, NAMED, NONE, IDENTITY, ZEROS,
                EVEN, COUNT, BM, BN,
            )  # fmt: skip
    else:
        tiles = read_tiles(
            vectors, ins, first + lane, col, rows, cols, row_sizes, col_sizes, in_row, in_col, OTHERS, ALONG, EVEN,
            "evict_first", COUNT, BN,
        )  # fmt: skip
        for start in range(first, stop, BM):
            # The next rows are on their way while these are summed.
            following = read_tiles(
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
        state = identities(IDENTITY, K, COMPUTE, BM, BN)
        for t in tl.static_range(COUNT):
            c = col + t * BN
            raw = _beside(tiles[t], ins, stop > 0, c, cols, col_sizes, in_col, OBSERVED, EVEN, BN)
            state = JOIN(
                state, (raw,), ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, in_row, in_col, K,
                COMPUTE, ROUND, KEEP, ALONG, NONE, IDENTITY, EVEN, COUNT == 1, BM, BN,
            )  # fmt: skip
        stats = stats + COMBINE(K, state)
        if COUNT > 1:
            tiles = again(tiles, stats[K], ALONG)
    grown = ()
    for t in tl.static_range(COUNT):
        c = col + t * BN
        raw = _beside(tiles[t], ins, stop > 0, c, cols, col_sizes, in_col, NAMED, EVEN, BN)
        FINISH(
            outs, (raw,), ins, stats, s0, s1, s2, s3, row, c, rows, cols, row_sizes, col_sizes, out_row, out_col, in_row,
            in_col, COMPUTE, ROUND, KEEP, ALONG, OUT_ALONG, PICK, NONE, EVEN, t == 0, BM, BN,
        )  # fmt: skip
        v = converted(raw, COMPUTE, ROUND, KEEP)
        terms = SUMS(v, s0, s1, s2, s3, c, cols)
        terms = masked(terms, (row < stop) & (c < cols), ZEROS, 0, COMPUTE, EVEN, BM, BN)
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
def _join(outs, sums, count, cols, BM: tl.constexpr, BN: tl.constexpr, FOLLOWS: tl.constexpr):
    """The sums of all programs, in their order."""
    previous(FOLLOWS)
    col = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    for k in tl.static_range(len(outs)):
        total = tl.zeros((BM, BN), sums[k].dtype.element_ty)
        for start in range(0, count, BM):
            row = start + tl.arange(0, BM)[:, None]
            total += tl.load(sums[k] + row * cols + col, (row < count) & (col < cols), other=0)
        tl.store(outs[k] + col, tl.sum(total, 0, keep_dims=True).to(outs[k].dtype.element_ty), col < cols)


class RowSums(Rows):
    """A formula of rows and sums over the rows, by name of the vectors that they are the gradients of."""

    def __init__(self, name: str, formula: Any, statistics: Sequence[Statistic], sums: Mapping[str, Any]) -> None:
        super().__init__(name, formula, statistics)
        self.sums = dict(sums)
        self.names = tuple(dict.fromkeys((*self.names, *(p for f in self.sums.values() for p in parameters(f)))))

    def fits(self, named: Named, cols: int, compute: torch.dtype) -> bool:
        """Whether a row and its sums stay in registers."""
        arch = backends.arch()
        config = arch.config("rowwise")
        if not self._long(cols, compute):
            return cols > 0
        grad: Tensor = named["grad"]
        read = [named[n] for n in self.names if isinstance(named.get(n), Tensor)]
        row = cols * sum(v.dtype.itemsize for v in read if v.ndim == grad.ndim and v.numel() == grad.numel())
        held = row + cols * compute.itemsize * len(self.sums)
        return bool(held <= config["sums_hold"] and 2 * row + 1024 <= arch.shared_memory)

    def _long(self, cols: int, compute: torch.dtype) -> bool:
        """Whether a row is more than one tile."""
        most: int = backends.arch().config("rowwise")["sums_max"] * 4 // max(4, compute.itemsize)
        return cols * (1 + len(self.sums)) > most

    def plan(  # type: ignore[override]
        self, named: Named, outs: Sequence[Tensor], shape: Sequence[int], dims: Sequence[int], compute: torch.dtype,
        pick: Sequence[int],
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launches for ``outs``: as many results of the formula as ``pick`` has, then the vectors."""
        n = len(pick)
        space = Space.of(named, outs[:n], [o for o in self.names if isinstance(named.get(o), Tensor)], shape, dims)
        rows, cols = space.rows, space.cols
        plain = self._plain(named, space, compute, pick)
        ring = self._ring(named, space, compute, pick)
        _, runtime = self._bind(_row_sums, named, space.operands, compute, "tile", space.precise)
        # H200, 32768x1024: 8 columns a program 67 us in all, 32 columns 72; 4096x16384: 127, 121.
        across = min(32, max(8, _layout.next_power_of_2(cols // 512)))
        again = dict(BM=4096 // across, BN=across, num_warps=8)

        def run(outs: Sequence[Tensor], named: Named) -> None:
            if not rows:
                return
            ins = tuple([named[o] for o in space.operands])
            scalars = slots([named[s] for s in runtime])
            aligned = ring is not None and not any(v.data_ptr() % 16 for v in ins)
            kernel, part, meta = ring if ring is not None and aligned else plain
            count = _layout.cdiv(rows, part)
            sums = tuple([torch.empty((count, cols), dtype=compute, device=ins[0].device) for _ in self.sums])
            launch(
                kernel, (count,), (tuple(outs[:n]), sums, ins, *space.strided, *scalars, rows, cols, part), meta
            )  # fmt: skip
            launch_next(_join, (_layout.cdiv(cols, across),), (tuple(outs[n:]), sums, count, cols), again)

        return run

    def _plain(
        self, named: Named, space: Space, compute: torch.dtype, pick: Sequence[int]
    ) -> tuple[Any, int, dict[str, Any]]:
        """The kernel, the rows of a program, and the constants."""
        config = backends.arch().config("rowwise")
        bn, tiles = _layout.next_power_of_2(space.cols), 1
        if self._long(space.cols, compute):
            # Tiles of 8 elements a thread, which stay in registers as they are stored.
            bm, warps, stages = 1, config["sums_warps"], config["long_stages"]
            bn = 256 * warps
            tiles = _layout.cdiv(space.cols, bn)
        else:
            # Several rows at a time wait once for each other's sums (H200, 8192x4096: 65 us, one by one 73; 32768x1024: 69
            # for 75).
            bm = config["sums_tile"] // (1 if bn >= 4096 else 2) // bn
            bm = max(1, min(bm, _layout.next_power_of_2(space.rows)))
            warps = min(config["warps"], max(1, bm * bn // 512))
            # Several rows and two sums leave too few registers for what copies need (32768x1024: 82 us for 72).
            stages = config["sums_stages"] if bm <= 2 or len(self.sums) == 1 else 0
        # Long rows: two programs do not fit on a processor (H200, 8192x4096: 79 us for 85; 32768x1024: 110 for 84).
        part = self._part(space, bm, config["programs"] // (2 if bn * tiles >= 4096 else 1))
        vectors = tuple(int(a == 1) for a in space.along)
        kernel, _ = self._bind(_row_sums, named, space.operands, compute, "tile", space.precise)
        meta = dict(
            **self._constants(space, compute, pick, tiles > 1),
            # Vectors of one tile are read once, others with every row.
            VECTORS=vectors if tiles == 1 else (0,) * len(vectors),
            OTHERS=tuple(1 - v for v in vectors),
            EVEN=int(part % bm == 0 == space.rows % part and space.cols == bn * tiles),
            COUNT=tiles,
            STAGES=stages,
            BM=bm,
            BN=bn,
            num_warps=warps,
        )
        return kernel, part, meta

    def _ring(
        self, named: Named, space: Space, compute: torch.dtype, pick: Sequence[int]
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """The same in Gluon, with at least two blocks of rows in shared memory; None where it cannot be."""
        arch = backends.arch()
        config = arch.config("rowwise")
        warps, cols = config["ring_warps"], space.cols
        _, _, _, _, in_row, in_col = space.strided
        read = [k for k, a in enumerate(space.along) if a in (1, 3)]
        # Copies of 16 bytes; the compiler knows multiples of 16 elements.
        lines = all(in_col[k] == (1,) and not any(s % 16 for s in in_row[k]) for k in read) and cols % 16 == 0
        zero = all(v == 0 for s in self.statistics["tile"] for v in s.identity)
        # Rows that stay in registers are faster there (8192x4096: 61 us, by the ring 105; 4096x16384: 196 us, by the ring 121).
        if not config["ring"] or not self._long(cols, compute) or compute != torch.float32 or not lines or not zero:
            return None
        # 32 elements of a row a thread, more where there are no more warps.
        side = min(warps, _layout.next_power_of_2(_layout.cdiv(cols, 1024)))
        bm, bn = warps // side, 256 * side
        tiles = _layout.cdiv(cols, bn)
        two = warps < 16
        sizes = {k: named[space.operands[k]].dtype.itemsize * bn * tiles for k in read}
        vectors = sum(s for k, s in sizes.items() if space.along[k] == 1)
        room = arch.shared_memory // (1 + two) - 1024 * (1 + two) - vectors
        stages = min(config["ring"], room // (bm * (sum(sizes.values()) - vectors)))
        if stages < 2 or tiles * len(self.sums) > 8:
            return None
        from gemskit.nn._row_sums_hopper import ring_sums

        part = self._part(space, bm, config["programs"] // (1 if two else 2))
        kernel, _ = self._bind(ring_sums, named, space.operands, compute, "tile", space.precise)
        kernel.aligned_only = True
        meta = dict(
            **self._constants(space, compute, pick, True),
            EVEN=int(part % bm == 0 == space.rows % part and cols == bn * tiles),
            COUNT=tiles,
            STAGES=stages,
            BM=bm,
            BN=bn,
            ACROSS=side,
            num_warps=warps,
        )
        if two:
            meta["maxnreg"] = 128
        return kernel, part, meta

    @staticmethod
    def _part(space: Space, bm: int, programs: int) -> int:
        return _layout.cdiv(_layout.cdiv(space.rows, bm), programs) * bm

    def _constants(self, space: Space, compute: torch.dtype, pick: Sequence[int], many: bool) -> dict[str, Any]:
        """Those of both kernels; ``many``: vectors are read with every row."""
        none = (0,) * len(space.operands)
        meta = self._meta(space, compute, "tile", pick)
        del meta["ELEMENTS"]
        return meta | dict(
            OBSERVED=self._vectors(space, [s.observe for s in self.statistics["tile"]]) if many else none,
            NAMED=self._vectors(space, [self.formula, *self.sums.values()]) if many else none,
            NONE=none,
            ZEROS=((0,) * len(self.sums),),
        )

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
        return {"SUMS": sums, "BLOCK": fill(_block, f"{self.name}_block", SUMS=sums, **parts)}
