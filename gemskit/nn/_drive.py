"""The decorator that declares a row-wise operator: statistics of a row, then a formula per element."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._layout import contiguous
from gemskit._op import Named, Op, P, R
from gemskit.nn._row_sums import RowSums
from gemskit.nn._rows import Rows, Statistic
from gemskit.reduce._fold import Fold, add_pairs


def columns(named: Mapping[str, Any], ndim: int) -> tuple[int, ...]:
    """The dimensions a row extends along: the trailing ``normalized_shape``, or ``dim``."""
    if "normalized_shape" in named:
        return tuple(range(ndim - len(named["normalized_shape"]), ndim))
    return (named["dim"] % max(ndim, 1),)


def row_shape(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """``shape`` with size 1 along the rows: the shape of a value per row."""
    return [1 if d in dims else n for d, n in enumerate(shape)]


class Rowwise(Op[P, R]):
    """An operator of rows. Its first parameter gives the space; vectors broadcast along the rows."""

    family = "rowwise"
    passes_scalars = True
    elementwise = True

    def __init__(self, meaning: Callable[P, R], *, results: int = 1, saves: Sequence[str] = (), **options: Any) -> None:
        super().__init__(meaning, **options)
        self.results, self.saves = results, tuple(saves)
        self._statistics: list[Statistic] = []
        self._kernel: Rows | None = None

    def statistic(
        self, *names: str, combine: Any, identity: float | str | Sequence[float | str] = 0,
        only: Literal["", "tile", "loop"] = "", step: Any = None, guess: Any = None,
    ) -> Callable[[Any], Any]:  # fmt: skip
        """Attach what is folded over each row: a jit function of operands, earlier statistics, ``col``, ``cols``, scalars.

        It returns one value per name. Statistics are taken in the order of attachment, before the formula. ``only`` restricts
        it to rows that fit one tile, or to longer ones; ``step`` and ``guess`` are those of :class:`Statistic`.
        """
        one = isinstance(identity, (int, float, str))
        identities: tuple[Any, ...] = (identity,) * len(names) if one else tuple(identity)  # type: ignore[arg-type]

        def attach(fn: Any) -> Any:
            self._statistics.append(Statistic(names, fn, combine, identities, only, step, guess))
            return fn

        return attach

    def take(self, statistics: Sequence[Statistic]) -> None:
        """Attach statistics that others have too."""
        self._statistics.extend(statistics)

    def formula(self, fn: Any) -> Any:
        """Attach the value of each element, a jit function of operands, statistics, ``col``, ``cols`` and scalars.

        It returns the outputs, then the row values named by ``saves``.
        """
        self._kernel = Rows(self.name, fn, self._statistics, results=self.results + len(self.saves))
        return fn

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        named = dict(zip(self.params, values))
        size = tuple(values[0].shape)
        row = tuple(named.get("normalized_shape", ()))
        if 0 in size or not size or size[len(size) - len(row) :] != row:
            return None
        for v in values:
            if isinstance(v, Tensor) and (tuple(v.shape) not in (size, row) or v.stride() != contiguous(v.shape)):
                return None
        return (size,) * self.results

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        kernel = self._kernel
        if kernel is None:
            return super().plan(named, outs)
        input: Tensor = named[self.tensors[0]]
        shape = tuple(input.shape) or (1,)
        dims = columns(named, input.ndim)
        dtype = named.get("dtype") or input.dtype
        compute = compute_type(dtype)
        # With dtype= the input is converted first, so a narrower dtype rounds it.
        run = kernel.plan(named, outs, shape, dims, compute, through=named.get("dtype"))
        if not self.saves:
            return lambda outs, keep, arguments: run(outs, arguments)
        kept = row_shape(shape, dims)

        def saving(outs: Sequence[Tensor], keep: dict[str, Tensor] | None, arguments: Named) -> None:
            if keep is None:
                run(outs, arguments)
                return
            rows = [torch.empty(kept, dtype=compute, device=outs[0].device) for _ in self.saves]
            kernel(arguments, (*outs, *rows), shape, dims, compute)
            keep.update(zip(self.saves, rows))

        return saving


class RowGradient:
    """The gradient of a row-wise operator: a formula for the elements, and sums over the rows for the vectors, by name."""

    def __init__(
        self, name: str, formula: Any, statistics: Sequence[Statistic], sums: Mapping[str, Any], pair: Any = None
    ) -> None:
        """``pair`` returns what two ``sums`` add, for rows too long to be read once."""
        self.pair = pair and Fold(
            f"{name}_vectors", map=pair, combine=add_pairs, identity=(0, 0), state=("accumulate",) * 2
        )
        self.rows = Rows(name, formula, statistics)
        self.folds = {n: Fold(f"{name}_{n}", map=fn, combine=language.add, identity=(0,)) for n, fn in sums.items()}
        #: Elements and vectors in one pass, by the vectors that are wanted.
        self.together = {
            names: RowSums(f"{name}_{'_'.join(names)}", formula, statistics, {n: sums[n] for n in names})
            for k in range(1, len(sums) + 1) for names in itertools.combinations(sums, k)
        }  # fmt: skip

    def __call__(
        self, named: Mapping[str, Any], elements: Sequence[str], needs: set[str], like: Mapping[str, Any],
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The gradients that are in ``needs``: of ``elements``, which all have the same one, and of the vectors.

        ``like`` has the shape and dtype of every tensor, ``into`` those that are to be written.
        """
        found: dict[str, Tensor] = {}
        grad: Tensor = named["grad"]
        shape = tuple(grad.shape)
        dims, compute = columns(named, grad.ndim), compute_type(grad.dtype)

        def target(n: str) -> Tensor:
            return into[n] if into else torch.empty(like[n][0], dtype=like[n][1], device=grad.device)

        outs = {like[n][1]: target(n) for n in elements if n in needs}
        found.update({n: outs[like[n][1]] for n in elements if n in needs})
        vectors = tuple(n for n in self.folds if n in needs)
        both = self.together.get(vectors) if outs and grad.numel() else None
        if both is not None and both.fits(named, math.prod(shape[d] for d in dims), compute):
            found.update({n: target(n) for n in vectors})
            both(
                named, (*outs.values(), *(found[n] for n in vectors)), shape, dims, compute, (0,) * len(outs)
            )  # fmt: skip
            return found
        if outs:
            self.rows(named, tuple(outs.values()), shape, dims, compute, (0,) * len(outs))
        if self.pair is not None and len(vectors) == 2 and grad.numel():
            pair = [target(n) for n in vectors]
            kept = [v.reshape([1] * (len(shape) - v.ndim) + list(v.shape)) for v in pair]
            self.pair(named, kept, shape, tuple(d for d in range(len(shape)) if d not in dims), compute)
            return found | dict(zip(vectors, pair))
        for n in vectors:
            found[n] = self.folds[n].to_shape(named, shape, like[n], compute, into[n] if into else None)
        return found


def rowwise(
    *, aten: str | None = None, writes: Sequence[str] = (), results: int = 1, saves: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Rowwise[P, R]]:
    """Declare an operator of rows; attach ``@op.statistic``s, then ``@op.formula``, then ``@op.gradient_by``.

    Args:
        aten: the ATen overload it equals.
        writes: what the in-place variant overwrites.
        results: how many outputs the formula returns.
        saves: row values that it returns after them, kept for the gradient.
    """
    return functools.partial(Rowwise, aten=aten, writes=writes, results=results, saves=saves)
