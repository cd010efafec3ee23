"""Samples of the elementwise functions of two and three tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gemskit._samples_pointwise import SHAPES, pairs
from gemskit.testing import Make, Sample, samples


@samples("bitwise_and", "bitwise_or", "bitwise_xor")
def _(make: Make) -> Iterator[Sample]:
    """Of the dtype under test, and for floats, which have no bits here, of int32."""
    for dtype in (torch.int32, torch.uint8) if make.dtype.is_floating_point else (make.dtype, torch.bool, torch.int64):
        yield Sample((make(5, 33, dtype=dtype), make(5, 33, dtype=dtype)))
        yield Sample((make(4, 1, 65, dtype=dtype), make(3, 1, dtype=dtype)))
        yield Sample((make(0, 3, dtype=dtype), make(3, dtype=dtype)))
        yield Sample((make(7, dtype=dtype), make(dtype=torch.int16)))
        yield Sample((make(7, dtype=dtype), 6))
        yield Sample((5, make(7, dtype=dtype)))
        yield Sample((make(7, dtype=dtype), True))
    yield Sample((make(4096, 4096, dtype=torch.int32), make(4096, 4096, dtype=torch.int32)), note="big")


@samples("bitwise_left_shift", "bitwise_right_shift")
def _(make: Make) -> Iterator[Sample]:
    for dtype in (torch.int32, torch.uint8, torch.int8) if make.dtype.is_floating_point else (make.dtype,):
        yield Sample((make(5, 33, dtype=dtype), make(5, 33, dtype=dtype)))
        yield Sample((make(4, 1, 65, dtype=dtype), make(3, 1, dtype=dtype)))
        yield Sample((make(0, 3, dtype=dtype), make(3, dtype=dtype)))
        yield Sample((make(9, dtype=dtype), make(9, dtype=torch.int64, low=-2, high=70)))
        for number in (1, dtype.itemsize * 8, -1):
            yield Sample((make(9, dtype=dtype), number))
        yield Sample((5, make(9, dtype=dtype)))
    yield Sample((make(4096, 4096, dtype=torch.int32), make(4096, 4096, dtype=torch.int32)), note="big")


@samples("logical_and", "logical_or", "logical_xor")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    yield Sample((make(5, 33, dtype=torch.bool), make(33, dtype=torch.bool)))
    yield Sample((make(33, dtype=torch.int8, low=0, high=2), make(33)))


@samples("floor_divide", "remainder")
def _(make: Make) -> Iterator[Sample]:
    yield from quotients(make)
    if make.dtype != torch.bool:  # half of them zeros
        yield Sample((7, make(5, 33, low=1, high=9)))


@samples("fmod")
def quotients(make: Make) -> Iterator[Sample]:
    """A tensor divided by what is not zero."""
    yield Sample((make(5, 33), make(5, 33, low=1, high=9)))
    yield Sample((make(4, 1, 65), make(3, 1, low=-9, high=-1)))
    yield Sample((make(0, 3), make(3)))
    yield Sample((make(5, 6), make(6, dtype=torch.float64, low=1, high=3)))
    if make.dtype != torch.bool:
        yield Sample((make(5, 6, dtype=torch.int16), make(6, low=1, high=7)))
    for number in (3, -3, 0.1, -2.5):
        yield Sample((make(5, 33), number))
    yield Sample((make(4096, 4096), make(4096, 4096, low=1, high=9)), note="big")


@samples("atan2", "hypot")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33)))
    yield Sample((make(4, 1, 9), make(3, 1)))
    yield Sample((make(7), make()))
    yield Sample((make(0, 3), make(3)))
    yield Sample((make(5, 6), make(5, 6, dtype=torch.float64)))
    yield Sample((make(5, 6, dtype=torch.int16), make(6)))
    yield Sample((make(4096, 4096), make(4096, 4096)), note="big")


@samples("fmax", "fmin", "logaddexp")
def _(make: Make) -> Iterator[Sample]:
    same = make(9)
    yield Sample((same, same.clone()), note="ties")
    yield from pairs(make)


@samples("copysign")
def _(make: Make) -> Iterator[Sample]:
    yield from pairs(make)
    for number in (1, -2.5, 0.0, -0.0):
        yield Sample((make(9), number))


@samples("xlogy")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33, low=0.1, high=9)))
    yield from pairs(make)
    yield Sample((make(9), 2.5))
    yield Sample((0, make(9)))
    yield Sample((0.3, make(9, low=1, high=9)))


@samples("_isclose")
def _(make: Make) -> Iterator[Sample]:
    x = make(5, 33)
    yield Sample((x, x.clone(), 1e-5, 1e-8, False))
    yield Sample((x, x.clone(), 1e-5, 1e-8, True))
    yield Sample((x, make(33), 0.3, 0.5, False))
    yield Sample((make(4, 1, 65), make(3, 1), 0.0, 0.0, False))
    yield Sample((make(0, 3), make(3), 1e-5, 1e-8, False))
    yield Sample((make(), make(7), 0.5, 1e-8, True))
    yield Sample((make(4096, 4096), make(4096, 4096), 1e-5, 1e-8, False), note="big")


@samples("addcmul", "addcdiv")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33), make(5, 33, low=1, high=9)))
    yield Sample((make(4, 1, 65), make(3, 1), make(low=1, high=9)), {"value": 2})
    yield Sample((make(9), make(9), make(9, low=1, high=9)), {"value": -0.3})
    yield Sample((make(0, 3), make(3), make(3)))
    yield Sample((make(5, 6), make(6, dtype=torch.float64), make(5, 1, low=1, high=9)))
    yield Sample((make(4096, 4096), make(4096, 4096), make(4096, 4096)), note="big")


@samples("lerp")
def _(make: Make) -> Iterator[Sample]:
    for weight in (0, 0.3, 0.5, 1, 2.5):
        yield Sample((make(5, 33), make(5, 33), weight))
    yield Sample((make(4, 1, 65), make(3, 1), 0.7))
    yield Sample((make(5, 33), make(33), make(5, 1, low=0, high=1)))
    yield Sample((make(9), make(9), make()))
    yield Sample((make(0, 3), make(3), make(3)))
    yield Sample((make(4096, 4096), make(4096, 4096), make(4096, 4096)), note="big")


@samples("clamp_min", "clamp_max")
def _(make: Make) -> Iterator[Sample]:
    for bound in (0, -0.3, 2):
        yield Sample((make(5, 33), bound))
    yield Sample((make(5, 33), make(33)))
    yield Sample((make(4, 1, 65), make(3, 1)))
    yield Sample((make(0, 3), make()))
    yield Sample((make(9, dtype=torch.int32), make()))
    yield Sample((make(4096, 4096), 0), note="big")


@samples("_masked_fill")
def _(make: Make) -> Iterator[Sample]:
    infinite = make.dtype.is_floating_point
    yield Sample((make(5, 33), make(5, 33, dtype=torch.bool), -math.inf if infinite else 1))
    yield Sample((make(4, 1, 65), make(3, 1, dtype=torch.bool), 0))
    yield Sample((make(5, 33), make(33, dtype=torch.bool), make()))
    wide = torch.float64 if make.dtype != torch.bool else None
    yield Sample((make(9), make(9, dtype=torch.bool), make(dtype=wide, low=0, high=3)))
    yield Sample((make(0, 3), make(3, dtype=torch.bool), 2))
    yield Sample((make(), make(7, dtype=torch.bool), 2))
    yield Sample((make(4096, 4096), make(4096, 4096, dtype=torch.bool), 0), note="big")


@samples("polar")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33)))
    yield Sample((make(4, 1, 65), make(3, 1)))
    yield Sample((make(0, 3), make(3)))
    yield Sample((make(), make(7, low=-50, high=50)))
    yield Sample((make(4096, 4096), make(4096, 4096)), note="big")


@samples("conj_physical")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    yield Sample((make(4096, 4096),), note="big")
