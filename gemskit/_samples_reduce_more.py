"""Samples of the reductions of truths, products, norms and moments, of scans but the sum, and of the kinds of softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples


@samples("all", "any")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, (0, -1), ()):
        yield Sample((make(3, 5, 4, low=0, high=3), dim))
    yield Sample((make(4, 70, low=0, high=2), [1], True), note="keepdim")
    yield Sample((make(4, 33, low=1, high=3), 1), note="all true")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(3, 0, 2), 1), note="of nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("count_nonzero")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, (0, -1), ()):
        yield Sample((make(3, 33, 5, low=0, high=3), dim))
    yield Sample((make(),), note="0-dim")
    yield Sample((make(3, 0, 2), 1), note="of nothing")
    yield Sample((make(4096, 4096),), note="big")


@samples("is_all_true")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5, dtype=torch.bool),))
    yield Sample((torch.ones(40, dtype=torch.bool, device=make.device),), note="all true")
    yield Sample((make(0, 5, dtype=torch.bool),), note="of nothing")
    yield Sample((make(dtype=torch.bool),), note="0-dim")


@samples("_equal")
def _(make: Make) -> Iterator[Sample]:
    x = make(3, 33)
    yield Sample((x, x))
    yield Sample((x, make(3, 33)), note="different")
    yield Sample((make(3, 5, low=1, high=2), make(3, 5, dtype=torch.float64, low=1, high=2)), note="dtypes")
    yield Sample((make(), make()), note="0-dim")
    yield Sample((make(0, 3), make(0, 3)), note="of nothing")


@samples("_allclose")
def _(make: Make) -> Iterator[Sample]:
    x = make(3, 33)
    yield Sample((x, x))
    yield Sample((x, make(3, 33), 0.5, 100.0), note="far")
    yield Sample((x, make(33)), note="broadcast")
    yield Sample((x, x, 0.0, 0.0, True), note="NaN is close to NaN")
    yield Sample((make(), make()), note="0-dim")
    yield Sample((make(0, 3), make(0, 3)), note="of nothing")


@samples("prod")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, -1):
        yield Sample((make(3, 7, 5), dim))
    yield Sample((make(4, 9), 1, True), note="keepdim")
    zeros = make(4, 6)
    if zeros.is_floating_point() and not make.empty and make.layout == "contiguous":
        zeros[1, 2] = zeros[2, 0] = zeros[2, 3] = 0
    yield Sample((zeros, 1), note="zeros")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(3, 0, 2), 1), note="of nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("_vector_norm")
def _(make: Make) -> Iterator[Sample]:
    for ord in (2.0, 1.0, 0.0, math.inf, -math.inf):
        for dim in (None, 1):
            yield Sample((make(3, 33, 5), f"{ord:g}", ord, dim), note=f"{ord}")
    for ord in (3.0, 0.5, 1.5, -1.0):
        yield Sample((make(3, 9, low=0.5, high=2), "p", ord, -1), note=f"{ord}")
    yield Sample((make(4, 3, 5), "2", 2.0, (0, -1), True), note="keepdim")
    yield Sample((make(), "2", 2.0), note="0-dim")
    yield Sample((make(3, 0, 2), "2", 2.0, 1), note="of nothing")
    yield Sample((make(4096, 4096), "2", 2.0, -1), note="big")


@samples("_var", "_std", "_var_mean", "_std_mean")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, (0, -1)):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 3, 5), [1], True), {"correction": 0}, "keepdim")
    yield Sample((make(70, 3), 0), {"correction": 2.5})
    yield Sample((make(3, 0, 2), 0), note="nothing left")
    yield Sample((make(4096, 4096), -1), note="big")
    yield Sample((make(1 << 24), 0), note="big")


@samples("trace")
def _(make: Make) -> Iterator[Sample]:
    # Not tall: the gradient of torch 2.11 goes on below the diagonal there.
    for shape in ((5, 5), (7, 33), (1, 1), (0, 3)):
        yield Sample((make(*shape),))


@samples("nansum", "nanmean")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, (0, -1)):
        x = make(3, 33, 5)
        if x.is_floating_point() and not make.empty and make.layout == "contiguous":
            x[0, 3, :3] = math.nan
        yield Sample((x, dim))
    yield Sample((make(4, 9), [1], True), note="keepdim")
    yield Sample((make(),), note="0-dim")
    yield Sample((make(3, 0, 2), 1), note="of nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("logsumexp")
def _(make: Make) -> Iterator[Sample]:
    for dim in (1, (0, -1)):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 9), 1, True), note="keepdim")
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(3, 0, 2), 1), note="of nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("aminmax")
def _(make: Make) -> Iterator[Sample]:
    for dim in (None, 1, -1):
        yield Sample((make(3, 33, 5),), {"dim": dim})
    yield Sample((make(4, 70, low=0, high=3),), {"dim": 1, "keepdim": True}, note="ties, keepdim")
    yield Sample((make(),), note="0-dim")


@samples("cummax", "cummin")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(4, 70, low=0, high=3), 1), note="ties")
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("cumprod")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 17, 5, low=0.5, high=1.5), dim))
    zeros = make(4, 6)
    if zeros.is_floating_point() and not make.empty and make.layout == "contiguous":
        zeros[1, 2] = zeros[2, 0] = zeros[2, 3] = 0
    yield Sample((zeros, 1), note="zeros")
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("logcumsumexp")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("normed_cumsum")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5, low=0.1, high=2), dim))
    yield Sample((make(4, 70, low=0.1, high=1),), note="last dimension")
    yield Sample((make(low=1, high=2), 0), note="0-dim")
    yield Sample((make(0, 3), 1), note="nothing")


@samples("safe_softmax")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    x = make(4, 70)
    if x.is_floating_point() and not make.empty and make.layout == "contiguous":
        x[1] = -math.inf
        x[2, 5:] = -math.inf
    yield Sample((x, 1), note="a row of -inf")
    yield Sample((make(4, 9), 1, torch.float32), note="dtype")
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("softmax_backward", "log_softmax_backward")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), make(3, 33, 5, low=0, high=1), dim, make.dtype))
    yield Sample((make(), make(), 0, make.dtype), note="0-dim")
    yield Sample((make(0, 3), make(0, 3), 1, make.dtype), note="nothing")
    yield Sample((make(4096, 4096), make(4096, 4096), -1, make.dtype), note="big")


@samples("scaled_softmax_forward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 5, 33), 0.25))
    yield Sample((make(4, 70), 2.0))
    yield Sample((make(3), 1.0), note="one row")
    yield Sample((make(8, 8, 512, 512), 0.125), note="big")


@samples("scaled_softmax_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 5, 33), make(2, 3, 5, 33, low=0, high=1), 0.25))
    yield Sample((make(4, 70), make(4, 70, low=0, high=1), 2.0))
    yield Sample((make(8, 8, 512, 512), make(8, 8, 512, 512), 0.125), note="big")
