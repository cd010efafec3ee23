"""Samples of gated products."""

from __future__ import annotations

from collections.abc import Iterator

from gemskit.testing import Make, Sample, samples


@samples("gated_linear")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in ((17, 33, 70), (32, 64, 32), (1, 40, 5), (9, 64, 24), (0, 3, 4), (3, 0, 4), (3, 4, 0)):
        yield Sample((make(m, k), make(2 * n, k)), note=f"{m}x{k}x{n}")
    for activation in ("gelu", "gelu_tanh", "relu", "sigmoid", "none"):
        yield Sample((make(17, 20), make(9, 20), make(9, 20)), {"activation": activation}, note=activation)
    yield Sample((make(2, 3, 16), make(17, 16), make(17, 16)), note="3-d")
    yield Sample((make(16), make(8, 16)), note="a vector")
    yield Sample((make(9, 16), make(12, 16), make(16, 12).mT), note="weights laid out differently")
    yield Sample((make(2048, 4096), make(28672, 4096)), note="big", flops=4.0 * 2048 * 4096 * 14336)
