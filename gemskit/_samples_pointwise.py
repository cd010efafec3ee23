"""Samples of the elementwise operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples

#: One element, fewer than a tile, nothing, a remainder along both tiled dimensions, more than one tile.
SHAPES = ((), (7,), (0, 3), (5, 33), (2, 3, 257))


@samples("neg", "exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "relu", "silu")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    yield Sample((make(4096, 4096),), note="big")


@samples("gelu")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    yield Sample((make(5, 33),), {"approximate": "tanh"})
    yield Sample((make(4096, 4096),), note="big")


def pairs(make: Make) -> Iterator[Sample]:
    """Two tensors: of one shape, broadcast either way, of rank 0, of other dtypes."""
    yield Sample((make(5, 33), make(5, 33)))
    yield Sample((make(4, 1, 65), make(3, 1)))
    yield Sample((make(33), make(5, 33)))
    yield Sample((make(5, 33), make()))
    yield Sample((make(), make(7)))
    yield Sample((make(0, 3), make(3)))
    yield Sample((make(5, 6), make(5, 6, dtype=torch.float64)))
    yield Sample((make(5, 6, dtype=torch.int16), make(6)))
    yield Sample((make(4096, 4096), make(4096, 4096)), note="big")


@samples("maximum", "minimum")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    same = make(9)
    yield Sample((same, same.clone()), note="ties")


@samples("eq", "ne", "lt", "le", "gt", "ge")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    same = make(9)
    yield Sample((same, same.clone()), note="ties")
    for number in (0, 0.1, True):
        yield Sample((make(9), number))


@samples("mul")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    yield Sample((make(5, 33), 0.3))
    yield Sample((2, make(5, 33)))


@samples("add", "sub")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    yield Sample((make(5, 33), 3))
    yield Sample((0.1, make(5, 33)))
    yield Sample((make(5, 33), make(33)), {"alpha": 2})
    yield Sample((make(5), make(5)), {"alpha": 0.3})


@samples("div")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    yield Sample((make(5, 33), 0.3))
    yield Sample((2, make(5, 33, low=1, high=9)))
    for mode in ("trunc", "floor"):
        yield Sample((make(5, 33), make(5, 33, low=1, high=9)), {"rounding_mode": mode})
        yield Sample((make(5, 33), -3), {"rounding_mode": mode})
        yield Sample((make(5, 33), 0.1), {"rounding_mode": mode})


@samples("pow")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    for exponent in (0, 1, 2, 3, 0.5, 2.7):
        yield Sample((make(5, 7), exponent))
    yield Sample((make(9), -2))
    yield Sample((make(9, low=1, high=9), -0.5))
    for base in (2, 0.3, 1, 0):
        yield Sample((base, make(9)))


@samples("where")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33, dtype=torch.bool), make(5, 33), make(5, 33)))
    yield Sample((make(4, 1, 65, dtype=torch.bool), make(3, 1), make()))
    yield Sample((make(9, dtype=torch.bool), make(9), 0))
    yield Sample((make(9, dtype=torch.bool), 0.5, make(9)))
    yield Sample((make(9, dtype=torch.bool), 1, 2.5))
    yield Sample((make(3, 0, dtype=torch.bool), make(1, 0), make(3, 1)))
    yield Sample((make(4096, 4096, dtype=torch.bool), make(4096, 4096), make(4096, 4096)), note="big")


@samples("clamp")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), 0, 1))
    yield Sample((make(5, 33), -0.3))
    yield Sample((make(5, 33),), {"max": 2})
    yield Sample((make(5, 33), 1, -1))
    yield Sample((make(5, 33), make(33), make(5, 1)))
    yield Sample((make(), make(), None))
    yield Sample((make(0, 3), None, make()))
    yield Sample((make(4096, 4096), -1, 1), note="big")
