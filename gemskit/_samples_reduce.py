"""Samples of the reductions and scans. Long rows and errors are in the tests: they need no walk over layouts."""

from __future__ import annotations

from collections.abc import Iterator

from gemskit.testing import Make, Sample, samples


@samples("sum", "mean")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, (0, -1)):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 3, 5), [1]), {"keepdim": True}, "keepdim")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(70, 3), 0))
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")
    yield Sample((make(1 << 24), 0), note="big")


@samples("amax", "amin")
def _(make: Make) -> Iterator[Sample]:
    for dim in ((), 1, (0, -1)):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 70, low=0, high=3), [1], True), note="ties, keepdim")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(70, 3), 0))
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("max_all", "min_all")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((), (1,), (3, 33, 5)):
        yield Sample((make(*shape),))
    yield Sample((make(5, 70, low=0, high=3),), note="ties")
    yield Sample((make(1 << 24),), note="big")


@samples("argmax", "argmin", "max_dim", "min_dim")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(3, 70, low=0, high=3), 1, True), note="ties, keepdim")
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(70, 3), 0))
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("cumsum")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")
    # Positive: torch sums in float64 on the CPU, so near a zero crossing no float32 sum is as exact.
    yield Sample((make(70, 3, low=0, high=2), 0))
    yield Sample((make(4096, 4096), -1), note="big")
    yield Sample((make(1 << 24), 0), note="big")
