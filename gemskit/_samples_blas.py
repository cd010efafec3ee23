"""Samples of the matrix products."""

from __future__ import annotations

from collections.abc import Iterator

from gemskit.testing import Make, Sample, samples

#: (M, K, N): even, ragged, a single row, column and step, and empty in each direction.
SIZES = ((32, 64, 32), (17, 33, 70), (1, 40, 5), (65, 3, 1), (3, 1, 4), (0, 3, 4), (3, 0, 4), (3, 4, 0))


@samples("mm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in SIZES:
        yield Sample((make(m, k), make(k, n)), note=f"{m}x{k}x{n}")
    yield Sample((make(20, 9).mT, make(20, 12)), note="first transposed")
    yield Sample((make(72, 40), make(40, 200)), note="sides that no tile divides")


@samples("addmm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in SIZES:
        yield Sample((make(m, n), make(m, k), make(k, n)), note=f"{m}x{k}x{n}")
    yield Sample((make(12), make(9, 20), make(20, 12)), {"beta": 0.5, "alpha": -2}, note="row")
    yield Sample((make(9, 1), make(9, 20), make(20, 12)), {"beta": 2}, note="column")
    yield Sample((make(9, 12), make(9, 20), make(20, 12)), {"beta": 0, "alpha": 0.25}, note="beta 0")


@samples("baddbmm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in SIZES[1:]:
        yield Sample((make(3, m, n), make(3, m, k), make(3, k, n)), note=f"3x{m}x{k}x{n}")
    yield Sample((make(12), make(3, 9, 20), make(3, 20, 12)), {"beta": 0.5, "alpha": -2}, note="row")
    yield Sample((make(3, 9, 12), make(3, 9, 20), make(3, 20, 12)), {"beta": 0, "alpha": 0.25}, note="beta 0")


@samples("bmm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in SIZES:
        yield Sample((make(3, m, k), make(3, k, n)), note=f"3x{m}x{k}x{n}")
    yield Sample((make(0, 3, 4), make(0, 4, 5)), note="no batch")
    yield Sample((make(5, 3, 4), make(4, 6).expand(5, 4, 6)), note="shared second factor")


@samples("linear")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in SIZES:
        yield Sample((make(m, k), make(n, k), make(n)), note=f"{m}x{k}x{n}")
    yield Sample((make(33), make(17, 33)), note="a vector")
    yield Sample((make(2, 3, 16), make(17, 16)), note="3-d")
    yield Sample((make(2, 3, 16), make(16)), note="3-d and a vector of weights")
    yield Sample((make(16), make(16)), note="two vectors")
    yield Sample((make(3, 2, 16).transpose(0, 1), make(17, 16), make(17)), note="rows apart")
