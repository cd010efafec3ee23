"""The decorator that declares a reduction: a monoid and the dimensions it folds away."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._layout import contiguous
from gemskit._op import Named, Op, P, R
from gemskit.errors import DimError
from gemskit.reduce._fold import Fold
from gemskit.reduce._scan import Scan

#: One dimension, several, or all (None or empty).
Dims: TypeAlias = int | tuple[int, ...] | list[int] | None


@jit
def element(input):
    """The map of most reductions."""
    return input


def always(named: Named) -> bool:
    """Serves any arguments."""
    return True


def floating(named: Named) -> bool:
    """Serves a floating ``input``."""
    input: Tensor = named["input"]
    return input.dtype.is_floating_point


def dims_of(dim: Dims, ndim: int) -> tuple[int, ...]:
    """The dimensions that ``dim`` names; None and the empty tuple name all of them."""
    given = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return tuple(sorted(d % max(ndim, 1) for d in given)) or tuple(range(max(ndim, 1)))


def count_of(shape: Sequence[int], dim: Dims) -> int:
    """How many elements are reduced to one."""
    return math.prod(shape[d] for d in dims_of(dim, len(shape))) if shape else 1


def spread(t: Tensor, dim: Dims, ndim: int, keepdim: bool) -> Tensor:
    """``t``, the result of a reduction, as a view with size 1 where dimensions were folded away."""
    if keepdim or not ndim:
        return t
    for d in dims_of(dim, ndim):
        t = t.unsqueeze(d)
    return t


class Reduction(Op[P, R]):
    """An operator that folds ``dim`` of its first parameter away."""

    family = "reduction"
    passes_scalars = True

    def __init__(self, meaning: Callable[P, R], **options: Any) -> None:
        super().__init__(meaning, **options)
        self._folds: list[tuple[Callable[[Named], bool], Fold]] = []

    def combine(
        self, *, identity: float | str | Sequence[float | str | None], map: Any = element, finish: Any = None,
        state: Sequence[str] | None = None, results: int | None = None, when: Callable[[Named], bool] = always,
        step: Any = None, join: Any = None, anchored: bool = False, group: int = 1,
    ) -> Callable[[Any], Any]:  # fmt: skip
        """Attach the associative step, a jit function of two states (see :class:`gemskit.reduce._fold.Fold`).

        ``when`` restricts it to some arguments; the first attached that fits is taken.
        """
        identities = identity if isinstance(identity, tuple) else (identity,)

        def attach(fn: Any) -> Any:
            fold = Fold(
                self.name, map=map, combine=fn, identity=identities, finish=finish, results=results, step=step, join=join,
                anchored=anchored, group=group,
                state=state or ("accumulate",) * len(identities),
            )  # fmt: skip
            self._folds.append((when, fold))
            return fn

        return attach

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        named = dict(zip(self.params, values))
        input: Tensor = values[0]
        size = tuple(input.shape)
        if 0 in size or not size or len(self.tensors) > 1 or input.stride() != contiguous(size):
            return None
        dims = dims_of(named.get("dim"), len(size))
        if named.get("keepdim"):
            shape = tuple([1 if d in dims else n for d, n in enumerate(size)])
        else:
            shape = tuple([n for d, n in enumerate(size) if d not in dims])
        return (shape,) * (2 if self.named else 1)

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        fold = next((f for when, f in self._folds if when(named)), None)
        if fold is None:
            return super().plan(named, outs)
        input: Tensor = named[self.tensors[0]]
        dim, keepdim = named.get("dim"), bool(named.get("keepdim"))
        kept = [spread(o, dim, input.ndim, keepdim) for o in outs]
        shape = tuple(input.shape) or (1,)
        dims, cast = dims_of(dim, input.ndim), named.get("dtype") or input.dtype
        if any(shape[d] == 0 for d in dims) and any(isinstance(v, str) for v in fold.identity):
            raise DimError(
                f"{self.name}: {describe(input)} has no element along dim={dim}; accepted: a dim of non-zero size"
            )
        run = fold.plan(named, kept, shape, dims, compute_type(cast), cast)
        return lambda outs, keep, arguments: run(outs, arguments)


def reduction(
    *, aten: str | None = None, named: Any = None, floats: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Reduction[P, R]]:
    """Declare a reduction. Attach the monoid by ``@op.combine(identity=..)``, the gradient by ``@op.gradient_by``."""
    return functools.partial(Reduction, aten=aten, named=named, floats=floats)


class Scanning(Op[P, R]):
    """An operator of running states along ``dim`` of its first parameter."""

    family = "scan"
    passes_scalars = True
    elementwise = True

    def __init__(self, meaning: Callable[P, R], **options: Any) -> None:
        super().__init__(meaning, **options)
        self._scan: Scan | None = None

    def combine(
        self, *, identity: float | str | Sequence[float | str], map: Any = element, finish: Any = None,
        state: Sequence[str] | None = None, commutes: bool = True,
    ) -> Callable[[Any], Any]:  # fmt: skip
        """Attach the associative step, a jit function of two states (see :class:`gemskit.reduce._scan.Scan`)."""
        identities = identity if isinstance(identity, tuple) else (identity,)

        def attach(fn: Any) -> Any:
            self._scan = Scan(
                self.name, map=map, combine=fn, identity=identities, finish=finish,
                state=state or ("accumulate",) * len(identities), commutes=commutes,
            )  # fmt: skip
            return fn

        return attach

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        size = tuple(values[0].shape)
        plain = size and 0 not in size and values[0].stride() == contiguous(size)
        return (size,) * (2 if self.named else 1) if plain else None

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        input: Tensor = named[self.tensors[0]]
        cast = named.get("dtype") or input.dtype
        if self._scan is None or named.get("dtype") == torch.bool:
            return super().plan(named, outs)
        run = self._scan.plan(named, outs, tuple(input.shape), named["dim"], compute_type(cast), cast)
        return lambda outs, keep, arguments: run(outs, arguments)


def scan(*, aten: str | None = None, named: Any = None) -> Callable[[Callable[P, R]], Scanning[P, R]]:
    """Declare a scan. Attach the monoid by ``@op.combine(identity=..)``, the gradient by ``@op.gradient_by``."""
    return functools.partial(Scanning, aten=aten, named=named)
