"""Samples of the operators behind creation functions, of copies and of random operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit._samples_pointwise import SHAPES
from gemskit.testing import Make, Sample, samples


@samples("_fill")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 3))
    yield Sample((make(5, 33), 0.1))
    yield Sample((make(5, 33), True))
    yield Sample((make(5, 33), make()))
    yield Sample((make(5, 33), make(dtype=torch.float64, low=0, high=9)))
    yield Sample((make(5, 33), make(dtype=torch.int16)))
    yield Sample((make(4096, 4096), 0.5), note="big")


@samples("_arange")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7), 0, 1))
    yield Sample((make(33), 90, -2))
    yield Sample((make(0), 0, 1))
    yield Sample((make(2049), 5, 3))
    yield Sample((make(1 << 24), 0, 1), note="big")


@samples("_linspace")
def _(make: Make) -> Iterator[Sample]:
    for steps in (0, 1, 2, 7, 33, 1000):
        yield Sample((make(steps), 3, 100, steps))
    yield Sample((make(65), 90, 2, 65))
    yield Sample((make(9), make(low=1, high=5), make(low=6, high=9), 9))
    yield Sample((make(9), make(low=1, high=5), make(dtype=torch.float64, low=6, high=9), 9))
    yield Sample((make(9), make(dtype=torch.int32, low=1, high=5), 50, 9))
    yield Sample((make(1 << 20), 0, 1, 1 << 20), note="big")


@samples("_logspace")
def _(make: Make) -> Iterator[Sample]:
    for steps in (0, 1, 2, 6, 33):
        yield Sample((make(steps), 0, 6, steps, 2.0))
    yield Sample((make(5), make(low=0, high=2), 2, 5, 3.0))
    yield Sample((make(1 << 20), 0, 1, 1 << 20, 10.0), note="big")


@samples("_tri_indices")
def _(make: Make) -> Iterator[Sample]:
    for row, col, *offsets in ((3, 3, 0), (5, 2, 1, -4, 9), (2, 5, -1, 3, -9), (0, 4, 0), (3, 1030, 1)):
        for offset in offsets:
            for upper in (False, True):
                n = (torch.triu_indices if upper else torch.tril_indices)(row, col, offset).shape[1]
                yield Sample((make(2, n, dtype=torch.int64), row, col, offset, upper))
    yield Sample((make(2, 3, dtype=torch.int32), 2, 2, 0, True))
    yield Sample((make(2, 2048 * 2049 // 2, dtype=torch.int64), 2048, 2048, 0, False), note="big")


@samples("_clone")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), "preserve"))
    for format in ("contiguous", "channels_last"):
        yield Sample((make(2, 3, 4, 5), format))
    yield Sample((make(1, 1, 1, 1), "channels_last"))
    yield Sample((make(4096, 4096), "preserve"), note="big")


@samples("_to_copy")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), torch.float32, "preserve"))
    for dtype in (torch.bool, torch.float64, torch.bfloat16, torch.float16, None):
        yield Sample((make(5, 33), dtype, "preserve"))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        yield Sample((make(5, 33, low=-120, high=120), dtype, "preserve"), note="truncates")
    yield Sample((make(5, 33, low=-9, high=250), torch.uint8, "preserve"), note="wraps")
    yield Sample((make(2, 3, 4, 5), torch.float16, "channels_last"))
    yield Sample((make(4096, 4096), torch.float32, "preserve"), note="big")


@samples("_copy")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(33)))
    for shape in SHAPES:
        yield Sample((make(*shape), make(*shape)))
    yield Sample((make(4, 3, 65), make(3, 1)))
    yield Sample((make(5, 33), make()))
    yield Sample((make(5, 6), make(5, 6, dtype=torch.float64, low=0, high=99)))
    yield Sample((make(5, 6), make(5, 6, dtype=torch.int16)))
    yield Sample((make(5, 6), make(5, 6, dtype=torch.bool)))
    yield Sample((make(5, 6, dtype=torch.bool), make(5, 6)))
    yield Sample((make(5, 6, dtype=torch.int32), make(5, 6, low=-9, high=9)), note="truncates")
    yield Sample((make(4096, 4096), make(4096, 4096)), note="big")


@samples("native_dropout_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape in reversed(SHAPES):
        yield Sample((make(*shape), make(*shape, dtype=torch.bool), 1.25))
    yield Sample((make(4096, 4096), make(4096, 4096, dtype=torch.bool), 1.25), note="big")


# -- random ----------------------------------------------------------------------------------------------------------------


def _seed(make: Make) -> torch.Tensor:
    return make(dtype=torch.int64, low=0, high=2**31)


@samples("_dropout")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 0.3, _seed(make)))
    yield Sample((make(4096, 4096), 0.1, _seed(make)), note="big")


@samples("_uniform")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), -1.0, 1.0, 0.75, _seed(make)))
    yield Sample((make(4096, 4096), 0.0, 1.0, 0.99609375, _seed(make)), note="big")


@samples("_normal")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 0.0, 1.0, _seed(make)))
    yield Sample((make(5, 33), make(33), make(5, 33, low=1, high=2), _seed(make)))
    yield Sample((make(4096, 4096), 0.0, 1.0, _seed(make)), note="big")


@samples("_exponential")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 1.5, _seed(make)))
    yield Sample((make(4096, 4096), 1.0, _seed(make)), note="big")


@samples("_bernoulli")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 0.3, _seed(make)))
    yield Sample((make(5, 33), make(5, 33, low=0, high=1), _seed(make)))
    yield Sample((make(4096, 4096), 0.5, _seed(make)), note="big")


@samples("_random")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape), 0, 99, False, _seed(make)))
    yield Sample((make(5, 33), 0, 2**40, True, _seed(make)))
    yield Sample((make(4096, 4096), 0, 99, False, _seed(make)), note="big")
