"""Rows of the benchmark: elementwise operators, copies, indexing, drawn values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gemskit._bench_cases import BIG, ELEMENTS, BenchCase, Build, call
from gemskit.testing import Make, Sample

UNARY = (
    "neg", "abs", "square", "sign", "sgn", "reciprocal", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2",
    "log10", "log1p", "logit", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "erf", "erfc", "erfinv", "digamma", "lgamma", "i0", "special_i0e", "special_i1", "floor", "ceil", "trunc", "round", "frac",
    "isnan", "isinf", "isposinf", "isneginf", "isfinite", "signbit", "logical_not", "nan_to_num", "sigmoid", "relu",
    "relu_squared", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "hardswish", "elu", "selu", "gelu", "quick_gelu", "silu",
    "mish", "softplus", "log_sigmoid",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum", "fmax", "fmin", "atan2",
    "hypot", "copysign", "logaddexp", "xlogy", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor",
)  # fmt: skip
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")
SHIFTS = ("bitwise_left_shift", "bitwise_right_shift")


def _integers(*shape: int, high: int) -> Callable[[Make], Tensor]:
    return lambda make: make(*shape, dtype=torch.int64, low=0, high=high)


def _where(n: int) -> Build:
    return lambda make: Sample((make(n, dtype=torch.bool), make(n), make(n)))


def _drawn(*more: float) -> Build:
    """Draws do not read the tensor that they fill."""
    return lambda make: Sample((make(ELEMENTS), *more, _seed(make)), read=8)


def _seed(make: Make) -> Tensor:
    return make(dtype=torch.int64, low=0, high=1 << 40)


def _size(sample: Sample, outs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.tensor(out.shape) for out in outs]


def _percent_nonzero(sample: Sample, outs: Sequence[Tensor]) -> list[Tensor]:
    """Whole percents: 64M draws differ from their probability by thousandths of one."""
    return [(out != 0).double().mean().mul(100).round().long() for out in outs]


def _percentiles(sample: Sample, outs: Sequence[Tensor]) -> list[Tensor]:
    """How many percent are below a few bounds, none of which is near half a percent."""
    bounds = (-1.0, 0.0, 0.25, 0.7, 1.0)
    return [torch.stack([(out < b).double().mean().mul(100).round().long() for b in bounds]) for out in outs]


def cases() -> Iterator[BenchCase]:
    """The rows, operator by operator."""
    f32, i32 = torch.float32, torch.int32
    for op in UNARY:
        yield BenchCase(op, "64M", call((ELEMENTS,)))
    # torch has none of halves.
    yield BenchCase("angle", "64M f32", call((ELEMENTS,)), f32)
    for op in BINARY:
        yield BenchCase(op, "64M", call((ELEMENTS,), (ELEMENTS,)))
    yield BenchCase("_isclose", "64M", lambda make: Sample((make(ELEMENTS), make(ELEMENTS), 1e-5, 1e-8, False)))
    for op in BITWISE:
        yield BenchCase(op, "64M", call((ELEMENTS,), (ELEMENTS,)), i32)
    yield BenchCase("bitwise_not", "64M", call((ELEMENTS,)), i32)
    for op in SHIFTS:
        yield BenchCase(op, "64M", lambda make: Sample((make(ELEMENTS), make(ELEMENTS, low=0, high=31))), i32)
    yield BenchCase("where", "64M", _where(ELEMENTS))
    yield BenchCase("clamp", "64M", call((ELEMENTS,), min=-1.0, max=1.0))
    yield BenchCase("addcmul", "64M", call((ELEMENTS,), (ELEMENTS,), (ELEMENTS,), value=0.5))
    yield BenchCase("lerp", "64M", call((ELEMENTS,), (ELEMENTS,), (ELEMENTS,)))
    yield BenchCase("_masked_fill", "64M", lambda make: Sample((make(ELEMENTS), make(ELEMENTS, dtype=torch.bool), 0.0)))
    yield BenchCase("add", "64M f32", call((ELEMENTS,), (ELEMENTS,)), f32)
    yield BenchCase("exp", "64M f32", call((ELEMENTS,)), f32)
    yield BenchCase("add", "64M + number", call((ELEMENTS,), other=2.5))
    for op in ("exp", "gelu", "silu", "tanh"):
        yield BenchCase(op, "1M", call((1 << 20,)))
    for op in ("add", "mul", "div", "lt"):
        yield BenchCase(op, "1M", call((1 << 20,), (1 << 20,)))
    yield BenchCase("where", "1M", _where(1 << 20))
    yield BenchCase("add", "1M f32", call((1 << 20,), (1 << 20,)), f32)
    for op in ("add", "mul"):
        yield BenchCase(op, "8192² and 8192x1", call((BIG, BIG), (BIG, 1)))
        yield BenchCase(op, "8192² and 1x8192", call((BIG, BIG), (1, BIG)))
        yield BenchCase(op, "64x256x4096 and 256x1", call((64, 256, 4096), (256, 1)))
        yield BenchCase(op, "8192x1 and 1x8192", call((BIG, 1), (1, BIG)))
        yield BenchCase(op, "a and b.T 8192²", _and_transpose)
    yield BenchCase("add", "a and b.T 8192² f32", _and_transpose, f32)
    yield BenchCase("add", "a.T and b.T 8192²", lambda make: Sample((make(BIG, BIG).t(), make(BIG, BIG).t())))
    yield BenchCase("exp", "a.T 8192²", lambda make: Sample((make(BIG, BIG).t(),)))
    yield BenchCase(
        "where",
        "mask.T 8192²",
        lambda make: Sample((make(BIG, BIG, dtype=torch.bool).t(), make(BIG, BIG), make(BIG, BIG))),
    )
    for op in ("silu", "gelu"):
        yield BenchCase(op, "64M backward", call((ELEMENTS,)), backward=True)
    yield from _copies()
    yield from _indexed()
    yield BenchCase("_fill", "64M", lambda make: Sample((make(ELEMENTS), 1.0), read=8), peer=torch.full_like)
    yield BenchCase("_arange", "64M f32", lambda make: Sample((make(ELEMENTS), 0, 1), read=8), f32, peer=_torch_arange)
    top = 1 - 2.0**-24
    yield BenchCase("_uniform", "64M f32", _drawn(0.0, 1.0, top), f32, compare=_percentiles)
    yield BenchCase("_normal", "64M f32", _drawn(0.0, 1.0), f32, peer=_torch_normal, compare=_percentiles)
    yield BenchCase("_bernoulli", "64M", _drawn(0.25), compare=_percent_nonzero)
    yield BenchCase(
        "_dropout", "64M", lambda make: Sample((make(ELEMENTS), 0.25, _seed(make))), compare=_percent_nonzero
    )
    yield BenchCase(
        "_multinomial", "1 of 64x128256 f32",
        lambda make: Sample((make(64, 128256, low=0.0, high=1.0), 1, True, _seed(make))), f32, compare=_size,
    )  # fmt: skip


def _and_transpose(make: Make) -> Sample:
    return Sample((make(BIG, BIG), make(BIG, BIG).t()))


def _torch_arange(x: Tensor, start: int, step: int) -> Tensor:
    return torch.arange(start, x.numel() * step + start, step, dtype=x.dtype, device=x.device)


def _torch_normal(x: Tensor, mean: float, std: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x).normal_(mean, std)


def _copies() -> Iterator[BenchCase]:
    half = ELEMENTS // 2
    yield BenchCase("_clone", "64M", lambda make: Sample((make(ELEMENTS), "preserve")))
    yield BenchCase("_clone", "8192² transposed", lambda make: Sample((make(BIG, BIG).t(), "contiguous")))
    yield BenchCase("_cat", "2 of 8192x4096 dim=1", lambda make: Sample((make(BIG, 4096), make(BIG, 4096)), {"dim": 1}))
    yield BenchCase("_stack", "2 of 32M", lambda make: Sample((make(half), make(half)), {"axis": 0}))
    yield BenchCase("repeat", "4096x2048 by 2x4", lambda make: Sample((make(4096, 2048), (2, 4))))
    yield BenchCase("flip", "8192² dim=1", lambda make: Sample((make(BIG, BIG), (1,))))
    yield BenchCase("pad", "8192² by 1", lambda make: Sample((make(BIG, BIG), (1, 1, 1, 1))))
    # Half of it is read.
    yield BenchCase("triu", "8192²", lambda make: Sample((make(BIG, BIG),), read=BIG * BIG * make.dtype.itemsize // 2))


def _indexed() -> Iterator[BenchCase]:
    rows, cols = 4096, 16384
    places = _integers(rows, cols, high=cols)

    def selected(make: Make) -> Sample:
        read = 16384 * (8 + 4096 * make.dtype.itemsize)
        return Sample((make(128256, 4096), 0, _integers(16384, high=128256)(make)), read=read)

    def added(make: Make) -> Sample:
        return Sample((make(8192, 4096), 0, _integers(16384, high=8192)(make), make(16384, 4096)))

    yield BenchCase("index_select", "16384 of 128256x4096", selected)
    yield BenchCase("gather", "4096x16384 dim=1", lambda make: Sample((make(rows, cols), 1, places(make))))
    yield BenchCase(
        "scatter_add", "4096x16384 dim=1 f32",
        lambda make: Sample((make(rows, cols), 1, places(make), make(rows, cols))), torch.float32,
    )  # fmt: skip
    yield BenchCase("index_add", "16384 rows into 8192x4096 f32", added, torch.float32)
