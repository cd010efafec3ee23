"""Samples of the reductions and scans."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples

#: Shapes with every way to name dimensions; the last two have rows and columns of awkward lengths.
_DIMS = (None, 0, -1, (0, 2), [-1, 0], (), (0, 1, 2))


@samples("sum", "mean", "var")
def _(make: Make) -> Iterator[Sample]:
    floats = make.dtype.is_floating_point
    for dim in _DIMS:
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 3, 5), (1,)), {"keepdim": True}, "keepdim")
    yield Sample((make(4, 3, 5),), {"keepdim": True}, "keepdim")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(), -1), note="0-dim")
    for n in (1, 3, 17, 4097):
        yield Sample((make(3, n), 1))
        yield Sample((make(n, 3), 0))
    yield Sample((make(2, 65537), 1), note="long")
    yield Sample((make(70001),), note="long")
    if not floats:
        return
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")
    yield Sample((make(1 << 24),), note="big")


@samples("amax", "amin")
def _(make: Make) -> Iterator[Sample]:
    for dim in _DIMS[1:]:
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 3, 5), (1,), True), note="keepdim")
    yield Sample((make(3, 70, low=0, high=3), 1), note="ties")
    yield Sample((make(),), note="0-dim")
    for n in (1, 17, 4097):
        yield Sample((make(3, n), 1))
        yield Sample((make(n, 3), 0))
    yield Sample((make(2, 65537), 1), note="long")
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("max_all", "min_all")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((), (1,), (3, 33, 5), (40001,)):
        yield Sample((make(*shape),))
    yield Sample((make(5, 70, low=0, high=3),), note="ties")
    yield Sample((make(1 << 24),), note="big")


@samples("argmax", "argmin", "max_dim", "min_dim")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
        yield Sample((make(3, 33, 5, low=0, high=3), dim, True), note="ties, keepdim")
    yield Sample((make(), 0), note="0-dim")
    for n in (1, 17, 4097):
        yield Sample((make(3, n), 1))
        yield Sample((make(n, 3), 0))
    yield Sample((make(2, 65537), 1), note="long")
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("cumsum")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")
    for n in (1, 17, 2049):
        yield Sample((make(3, n), 1))
        yield Sample((make(n, 3), 0))
    yield Sample((make(2, 40001), 1), note="long")
    yield Sample((make(3, 7), 1), {"dtype": torch.float64}, "dtype")
    yield Sample((make(4096, 4096), -1), note="big")
    yield Sample((make(1 << 24), 0), note="big")
