"""Samples of sorting and selection. Long rows take the radix sort, and pieces."""

from __future__ import annotations

from collections.abc import Iterator

from gemskit.testing import Make, Sample, samples


@samples("sort", "argsort")
def _(make: Make) -> Iterator[Sample]:
    for dim, descending in ((0, False), (1, True), (-1, False)):
        yield Sample((make(3, 33, 5), dim, descending))
    yield Sample((make(3, 70, low=0, high=3),), {"descending": True, "stable": True}, "ties")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(1),))
    yield Sample((make(0, 3), 1), note="nothing")
    yield Sample((make(3, 0), 1), note="nothing along dim")
    yield Sample((make(8200, 1, low=0, high=40), 0, True), note="long, ties")
    yield Sample((make(8192, 4096),), note="big")
    yield Sample((make(64, 128256),), note="big")
    yield Sample((make(1 << 24),), note="big")


@samples("topk")
def _(make: Make) -> Iterator[Sample]:
    for dim, k, largest in ((0, 2, True), (1, 7, False), (-1, 5, True)):
        yield Sample((make(3, 33, 5), k, dim, largest))
    yield Sample((make(3, 300, low=0, high=3), 4), note="ties")
    yield Sample((make(2, 300), 1), {"largest": False, "sorted": False})
    yield Sample((make(), 1), note="0-dim")
    yield Sample((make(3, 5), 0), note="none")
    yield Sample((make(0, 3), 2), note="nothing")
    yield Sample((make(2, 9001), 50), note="long")
    yield Sample((make(9001, 2, low=0, high=3), 3, 0, False), note="long, ties")
    yield Sample((make(8192, 4096), 50), note="big")
    yield Sample((make(64, 128256), 50), note="big")
    yield Sample((make(64, 128256), 1024), note="big")
    yield Sample((make(64, 128256), 1), note="big")
