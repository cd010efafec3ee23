"""What a kernel of rows is planned with: the space of a call, and how its rows are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemskit import _layout
from gemskit._bind import parameters
from gemskit._op import Named


@dataclass(frozen=True)
class Tiles:
    """How rows are cut into programs and tiles: the constants ``BM``, ``BN``, ``HELD``, ``LOOP``, ``UNROLL``, ``SPLIT``."""

    bm: int
    bn: int
    warps: int
    held: int
    loop: bool
    unroll: int
    split: bool
    #: Most registers of a thread; 0 leaves it to the compiler.
    registers: int = 0


@dataclass(frozen=True)
class Space:
    """The rows and columns of a call, collapsed, and what varies along which."""

    operands: tuple[str, ...]
    rows: int
    cols: int
    #: Row and column sizes, then the strides of results and operands in them.
    strided: tuple[Any, ...]
    #: Of every operand and result: 1 varies along the columns, 2 along the rows, 3 both.
    along: tuple[int, ...]
    outs_along: tuple[int, ...]
    #: Whether neighbours in memory are in different rows.
    across: bool
    wide: bool
    #: False where all that is read and written by element are halves.
    precise: bool
    #: Bytes of a position of a row in what is read by element.
    itemsize: int

    def others(self, functions: Sequence[Any]) -> tuple[int, ...]:
        """Which operands that are not read by element a function names."""
        known = {n for f in functions for n in parameters(f)}
        return tuple(int(o in known and a != 3) for o, a in zip(self.operands, self.along))

    @classmethod
    def of(
        cls, named: Named, outs: Sequence[Tensor], operands: Sequence[str], shape: Sequence[int], dims: Sequence[int]
    ) -> Space:
        """The space ``shape`` whose rows extend along ``dims``."""
        full = [_layout.broadcast_strides(t, shape) for t in (*outs, *(named[n] for n in operands))]
        kept = [d for d in range(len(shape)) if d not in dims]
        row_sizes, row = _layout.collapse([shape[d] for d in kept], [tuple(s[d] for d in kept) for s in full])
        col_sizes, col = _layout.collapse([shape[d] for d in dims], [tuple(s[d] for d in dims) for s in full])
        rows, n = math.prod(shape[d] for d in kept), len(outs)
        # An operand that does not vary at all counts as a row's: one value, loaded once per row. An empty one has no value.
        vary = [bool(any(c)) + 2 * bool(any(r)) for r, c in zip(row[n:], col[n:])]
        along = tuple(a or 2 if named[o].numel() else 3 for o, a in zip(operands, vary))
        padded = [(1,) * (len(shape) - o.ndim) + tuple(o.shape) for o in outs]
        outs_along = tuple(3 if all(o[d] == shape[d] for d in dims) else 2 for o in padded)
        # The first operand that is read by element says which way memory runs.
        lead = n + next((k for k, a in enumerate(along) if a == 3), 0)
        read = [named[o].dtype.itemsize for o, a in zip(operands, along) if a == 3]
        written = [o.dtype.itemsize for o, a in zip(outs, outs_along) if a == 3]
        return cls(
            operands=tuple(operands),
            rows=rows,
            cols=math.prod(shape[d] for d in dims),
            strided=(row_sizes, col_sizes, tuple(row[:n]), tuple(col[:n]), tuple(row[n:]), tuple(col[n:])),
            along=along,
            outs_along=outs_along,
            across=rows > 1 and row[lead][-1] == 1 and col[lead][-1] != 1,
            wide=_layout.is_wide(shape, full),
            precise=any(n > 2 for n in (*read, *written)),
            itemsize=max(1, sum(read)),
        )
