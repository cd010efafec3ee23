"""The decorator that declares a row-wise operator: statistics of a row, then a formula per element."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._bind import parameters
from gemskit._dtypes import compute_type
from gemskit._op import Named, Op, P, R
from gemskit.nn._rows import Rows, Statistic
from gemskit.reduce._fold import Fold


def columns(named: Mapping[str, Any], ndim: int) -> tuple[int, ...]:
    """The dimensions a row extends along: the trailing ``normalized_shape``, or ``dim``."""
    if "normalized_shape" in named:
        n = named["normalized_shape"]
        return tuple(range(ndim - (1 if isinstance(n, int) else len(n)), ndim))
    return (named["dim"] % max(ndim, 1),)


class Rowwise(Op[P, R]):
    """An operator of rows. Its first parameter gives the space; vectors broadcast along the rows."""

    family = "rowwise"
    elementwise = True

    def __init__(self, meaning: Callable[P, R], *, results: int = 1, **options: Any) -> None:
        super().__init__(meaning, **options)
        self.results = results
        self._statistics: list[Statistic] = []
        self._kernel: Rows | None = None

    def statistic(
        self, *names: str, combine: Any, identity: float | str | Sequence[float | str] = 0
    ) -> Callable[[Any], Any]:
        """Attach what is folded over each row: a jit function of operands, earlier statistics, ``col``, ``cols``, scalars.

        It returns one value per name. Statistics are taken in the order of attachment, before the formula.
        """
        identities = identity if isinstance(identity, tuple) else (identity,)

        def attach(fn: Any) -> Any:
            self._statistics.append(Statistic(names, fn, combine, identities))
            return fn

        return attach

    def formula(self, fn: Any) -> Any:
        """Attach the value of each element, a jit function of operands, statistics, ``col``, ``cols`` and scalars."""
        self._kernel = Rows(self.name, fn, self._statistics, results=self.results)
        return fn

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        if self._kernel is None:
            return super().plan(named, outs)
        input: Tensor = named[self.tensors[0]]
        shape = tuple(input.shape) or (1,)
        dtype = named.get("dtype") or input.dtype
        run = self._kernel.plan(named, shape, columns(named, input.ndim), outs, compute_type(dtype))
        return lambda outs, keep, arguments: run(outs, arguments)


class RowGradient:
    """The gradient of a row-wise operator: a formula per element, and sums over the rows for the vectors.

    ``rows`` is the kernel for the elements; it may also return statistics that ``folds`` (by vector) then read.
    """

    def __init__(self, rows: Rows, folds: Mapping[str, Fold], statistics: Sequence[str] = ()) -> None:
        self.rows, self.folds, self.statistics = rows, dict(folds), tuple(statistics)

    def __call__(
        self, named: Mapping[str, Any], like: Tensor, needs: set[str], vectors: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the elements (with the shape and dtype of ``like``), and those of the vectors needed."""
        shape = tuple(like.shape)
        dims = columns(named, like.ndim)
        compute = compute_type(like.dtype)
        dx = torch.empty_like(like)
        wanted = [n for n in self.folds if n in needs]
        kept = [1 if d in dims else n for d, n in enumerate(shape)]
        extra = [torch.empty(kept, dtype=compute, device=like.device) for _ in (self.statistics if wanted else ())]
        outs = [dx, *extra]
        self.rows.plan(named, shape, dims, outs, compute, range(len(outs)))(outs, named)
        have = {**named, **dict(zip(self.statistics, extra))}
        return dx, {n: self.folds[n].to_shape(have, shape, *vectors[n], compute) for n in wanted}


def rowwise(
    *, aten: str | None = None, writes: Sequence[str] = (), results: int = 1
) -> Callable[[Callable[P, R]], Rowwise[P, R]]:
    """Declare an operator of rows; attach ``@op.statistic``s, then ``@op.formula``, then ``@op.gradient_by``."""
    return functools.partial(Rowwise, aten=aten, writes=writes, results=results)


__all__ = ["Fold", "RowGradient", "Rows", "Rowwise", "Statistic", "columns", "parameters", "rowwise"]
