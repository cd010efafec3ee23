"""Samples of products with vectors and of contractions."""

from __future__ import annotations

from collections.abc import Iterator

from gemskit.testing import Make, Sample, samples


@samples("mv")
def _(make: Make) -> Iterator[Sample]:
    for m, k in ((33, 70), (1, 5), (4, 1), (0, 3), (3, 0)):
        yield Sample((make(m, k), make(k)), note=f"{m}x{k}")
    yield Sample((make(20, 9).mT, make(20)), note="columns")
    yield Sample((make(4096, 4096), make(4096)), note="big")


@samples("addmv")
def _(make: Make) -> Iterator[Sample]:
    for m, k in ((33, 70), (1, 5), (0, 3), (3, 0)):
        yield Sample((make(m), make(m, k), make(k)), note=f"{m}x{k}")
    yield Sample((make(1), make(9, 20), make(20)), {"beta": 2, "alpha": -2}, note="one")
    yield Sample((make(9), make(9, 20), make(20)), {"beta": 0, "alpha": 0.25}, note="beta 0")
    yield Sample((make(9), make(20, 9).mT, make(20)), {"beta": 0.5}, note="columns")


@samples("dot")
def _(make: Make) -> Iterator[Sample]:
    for n in (33, 1, 0):
        yield Sample((make(n), make(n)), note=f"{n}")
    yield Sample((make(70001), make(70001)), note="long")


@samples("linalg_vecdot")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33)), note="rows")
    yield Sample((make(7, 6, 5), make(7, 1, 5)), {"dim": 0}, note="broadcast, first dimension")
    yield Sample((make(4, 1, 9), make(3, 9)), note="broadcast")
    yield Sample((make(3, 0), make(3, 0)), note="nothing")
    yield Sample((make(0, 3), make(3)), note="no rows")


@samples("addr")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(9, 17), make(9), make(17)), note="matrix")
    yield Sample((make(17), make(9), make(17)), {"beta": 2, "alpha": -3}, note="row")
    yield Sample((make(9, 17), make(9), make(17)), {"beta": 0, "alpha": 2}, note="beta 0")
    yield Sample((make(9, 1), make(9), make(17)), {"beta": 0.5, "alpha": 0.25}, note="column")
    yield Sample((make(0, 3), make(0), make(3)), note="no rows")


@samples("kron")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4), make(5, 6)), note="matrices")
    yield Sample((make(3), make(4, 5)), note="vector and matrix")
    yield Sample((make(2, 3, 4), make(2)), note="3-d and vector")
    yield Sample((make(), make(3)), note="number")
    yield Sample((make(0, 3), make(2, 2)), note="nothing")


@samples("matmul")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(17, 33), make(33, 20)), note="matrices")
    yield Sample((make(33), make(33)), note="vectors")
    yield Sample((make(17, 33), make(33)), note="matrix and vector")
    yield Sample((make(33), make(33, 20)), note="vector and matrix")
    yield Sample((make(2, 17, 33), make(33)), note="batch and vector")
    yield Sample((make(33), make(2, 33, 5)), note="vector and batch")
    yield Sample((make(2, 3, 4, 9), make(9, 7)), note="batch and matrix")
    yield Sample((make(4, 9), make(2, 3, 9, 7)), note="matrix and batch")
    yield Sample((make(2, 1, 4, 9), make(3, 9, 7)), note="broadcast")
    yield Sample((make(0, 3, 4), make(4, 5)), note="no batch")
    yield Sample((make(2, 3, 0), make(2, 0, 5)), note="nothing to sum")


@samples("_contraction")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 7, 2, 9), make(3, 5, 2, 9), "bqhd", "bkhd", "bhqk"), note="attention scores")
    yield Sample((make(5, 4, 3), make(4, 6, 3), "abc", "bdc", "ad"), note="two summed")
    yield Sample((make(5, 3, 4), make(4, 6, 3), "acb", "bdc", "da"), note="two summed that are not adjacent")
    yield Sample((make(2, 3, 4), make(5, 4, 2), "abi", "cid", "cabd"), note="results that are no matrix")
    yield Sample((make(5, 7), make(5, 7), "ab", "ab", "b"), note="no rows")
    yield Sample((make(5), make(7), "a", "b", "ba"), note="nothing summed")
    yield Sample((make(5, 0), make(0, 3), "ab", "bc", "ac"), note="nothing to sum")
