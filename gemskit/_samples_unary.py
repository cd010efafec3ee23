"""Samples of the elementwise functions of one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gemskit._samples_pointwise import SHAPES
from gemskit.testing import Make, Sample, samples


@samples(
    "abs", "absolute", "angle", "arcsinh", "asinh", "atan", "ceil", "cos", "digamma", "erf", "erfc", "exp2",
    "expm1", "floor", "frac", "hardsigmoid", "hardswish", "i0", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "lgamma",
    "log_sigmoid", "logical_not", "mish", "quick_gelu", "reciprocal", "relu6", "relu_squared", "selu", "sgn", "sign", "signbit",
    "sin", "special_i0e", "special_i1", "square", "tan", "trunc",
)  # fmt: skip
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    # Steps and kinks lie on whole numbers.
    yield Sample((make(41, low=-5, high=5),))
    yield Sample((make(4096, 4096),), note="big")


@samples("bitwise_not")
def _(make: Make) -> Iterator[Sample]:
    """Of int32 for floats, which have no bits here."""
    dtype = torch.int32 if make.dtype.is_floating_point else make.dtype
    for shape in SHAPES:
        yield Sample((make(*shape, dtype=dtype),))
    yield Sample((make(4096, 4096, dtype=dtype),), note="big")


@samples("cosh", "sinh")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    yield Sample((make(4096, 4096),), note="big")


@samples("acos", "asin", "arctanh", "atanh", "erfinv")
def _(make: Make) -> Iterator[Sample]:
    """Between -1 and 1, and some beyond."""
    for shape in SHAPES:
        yield Sample((make(*shape, low=-1, high=1),))
    yield Sample((make(9),))
    yield Sample((make(4096, 4096),), note="big")


@samples("acosh", "log10", "log1p", "log2")
def _(make: Make) -> Iterator[Sample]:
    """Above 1, and some below."""
    for shape in SHAPES:
        yield Sample((make(*shape, low=1, high=9),))
    yield Sample((make(9),))
    yield Sample((make(4096, 4096),), note="big")


@samples("logit")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape, low=0, high=1),))
    yield Sample((make(9),))
    for eps in (0.1, 0.01, -1.0):
        yield Sample((make(33), eps))


def _number(make: Make, x: float) -> float:
    """Ints take numbers without a part behind the point."""
    return x if make.dtype.is_floating_point else int(x)


@samples("round")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape, low=-9, high=9),))
    yield Sample((torch.arange(-9, 10).to(make.device, make.dtype) / 2,), note="halves")
    if make.dtype.is_floating_point:
        for decimals in (2, -1):
            yield Sample((make(5, 33, low=-99, high=99),), {"decimals": decimals})


@samples("nan_to_num")
def _(make: Make) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(*shape),))
    x = make(9)
    if x.dtype.is_floating_point and x.numel():
        x = torch.where(torch.arange(9, device=x.device) % 4 == 0, float("inf"), x)
        x = torch.where(torch.arange(9, device=x.device) % 4 == 1, -float("inf"), x)
    yield Sample((x,))
    yield Sample((x, 0.5))
    yield Sample((x, None, 7.0))
    yield Sample((x,), {"nan": 2.0, "neginf": -9.0})


def _numbers(*several: tuple[Any, ...], **named: Any) -> Any:
    def generate(make: Make) -> Iterator[Sample]:
        for shape in SHAPES:
            yield Sample((make(*shape), *several[0]), named)
        for numbers in several[1:]:
            yield Sample((make(41, low=-5, high=5), *numbers), named)
        yield Sample((make(4096, 4096), *several[0]), named, note="big")

    return generate


samples("elu")(_numbers((), (0.7,)))
samples("_celu")(_numbers((1.0,), (0.25,), (-0.5,)))
samples("softplus")(_numbers((), (2.0,), (0.5, 3.0)))
samples("hardtanh")(_numbers((), (-2, 3), (0.5, 1.5)))
samples("leaky_relu")(_numbers((), (0.3,), (-1.0,)))
samples("_softshrink")(_numbers((0.5,), (0.0,), (1.3,)))
samples("threshold")(_numbers((0.1, 3.0), (1, 2), (1.5, 0.5)))


@samples("glu")
def _(make: Make) -> Iterator[Sample]:
    for shape, dim in (((6,), 0), ((5, 66), -1), ((4, 3, 5), 0), ((2, 6, 257), 1), ((0, 4), -1), ((3, 0), -1)):
        yield Sample((make(*shape), dim))
    yield Sample((make(3, 8),))
    yield Sample((make(4096, 8192),), note="big")


@samples("_prelu")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(1, 1)))
    yield Sample((make(5, 33), make(1, 33)))
    yield Sample((make(2, 3, 65), make(1, 3, 1)))
    yield Sample((make(7), make(1)))
    yield Sample((make(0, 3), make(1, 3)))
    yield Sample((make(64, 64, 4096), make(1, 64, 1)), note="big")


# -- gradients -------------------------------------------------------------------------------------------------------------


#: A tensor without dimensions may be on another device than others: not first.
ROTATED = SHAPES[1:] + SHAPES[:1]


def _pairs(make: Make, *numbers: Any, **named: Any) -> Iterator[Sample]:
    for shape in ROTATED:
        yield Sample((make(*shape), make(*shape), *numbers), named)
    yield Sample((make(4096, 4096), make(4096, 4096), *numbers), named, note="big")


@samples(
    "sigmoid_backward", "tanh_backward", "silu_backward", "mish_backward", "hardsigmoid_backward", "hardswish_backward"
)
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make)


@samples("gelu_backward")
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make)
    yield Sample((make(9), make(9)), {"approximate": "tanh"})


@samples("softplus_backward")
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make, 1.0, 20.0)
    yield Sample((make(9), make(9), 2.0, 0.5))


@samples("log_sigmoid_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape in ROTATED:
        x = make(*shape)
        yield Sample((make(*shape), x, torch.exp(-x.abs()) if x.is_floating_point() else x))
    x = make(4096, 4096)
    yield Sample((make(4096, 4096), x, x), note="big")


@samples("threshold_backward")
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make, _number(make, 0.3))
    yield from _pairs(make, 1)


@samples("hardtanh_backward")
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make, -1.0, 0.5)
    yield Sample((make(9), make(9), 0, 6))


@samples("leaky_relu_backward")
def _(make: Make) -> Iterator[Sample]:
    yield from _pairs(make, 0.1, False)
    yield Sample((make(9), make(9), 0.1, True))


@samples("logit_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape in ROTATED:
        yield Sample((make(*shape), make(*shape, low=0, high=1)))
    for eps in (None, 0.1, -1.0):
        yield Sample((make(9), make(9), eps))


@samples("elu_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape in ROTATED:
        yield Sample((make(*shape), 0.7, 1.5, 0.5, False, make(*shape)))
    yield Sample((make(9), 0.7, 1.5, 0.5, True, make(9)))


@samples("glu_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape, dim in (((6,), 0), ((5, 66), -1), ((4, 3, 5), 0), ((0, 4), -1)):
        half = list(shape)
        half[dim] //= 2
        yield Sample((make(*half), make(*shape), dim))
    yield Sample((make(4096, 4096), make(4096, 8192), -1), note="big")
