"""Elementwise functions of two and three tensors, where the derived checks do not look: wrappers, numbers, special values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError

INTS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpret():
        yield


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if got.dtype.is_floating_point:
        assert torch.equal(torch.signbit(got[~got.isnan()]), torch.signbit(want[~want.isnan()]))


SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, 2.5, 6e4, -6e4, 1e-6, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["pow", "atan2", "hypot", "logaddexp", "copysign", "fmax", "fmin", "fmod", "remainder"]
)
def test_special_values_meet(name: str, dtype: torch.dtype) -> None:
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype)
    x, y = pairs[:, 0], pairs[:, 1]
    got, want = getattr(gemskit, name)(x, y), getattr(torch, name)(x, y)
    exact = getattr(torch, name)(x.double(), y.double()).to(dtype)
    # Vectorised CPU code and float64 may differ where a value overflows or is NaN: either will do.
    fits = (got == want) | (got == exact) | (got.isnan() & (want.isnan() | exact.isnan()))
    near = ((got.double() - exact.double()).abs() <= 2 * torch.finfo(dtype).eps * exact.double().abs()).logical_or(fits)
    assert near.all(), [(p.tolist(), g.item(), w.item()) for p, g, w, n in zip(pairs, got, want, near) if not n]
    if name not in ("fmax", "fmin", "logaddexp"):
        zeros = (got == 0) & (exact == 0)
        assert torch.equal(torch.signbit(got[zeros]), torch.signbit(exact[zeros]))


def test_masked_fill() -> None:
    mask = torch.tensor([True, False, True])
    for dtype in (*INTS, torch.bool, torch.float16, torch.float32, torch.float64):
        x = torch.tensor([1, 2, 3]).to(dtype)
        for value in (0, 1, 2.7, True, torch.tensor(2.5), torch.tensor(3)):
            same(gemskit.masked_fill(x, mask, value), torch.masked_fill(x, mask, value))
            y = x.clone()
            assert gemskit.masked_fill_(y, mask, value) is y
            same(y, torch.masked_fill(x, mask, value))
    same(gemskit.masked_fill(torch.ones(3).half(), mask, -math.inf), torch.tensor([-math.inf, 1, -math.inf]).half())
    same(gemskit.masked_fill(torch.ones(3, dtype=torch.uint8), mask, -1), torch.tensor([255, 1, 255]).byte())
    for dtype, value in ((torch.float16, -1e9), (torch.int8, 300), (torch.int32, 2**40), (torch.int64, math.inf)):
        with pytest.raises(ArgumentError, match=r"masked_fill: value .* does not fit"):
            gemskit.masked_fill(torch.ones(3).to(dtype), mask, value)
    with pytest.raises(ArgumentError, match="masked_fill"):
        gemskit.masked_fill(torch.ones(3), mask, torch.ones(1))
    with pytest.raises(DtypeError, match="masked_fill"):
        gemskit.masked_fill(torch.ones(3), mask.byte(), 1)


def test_masked_fill_gives_a_tensor_its_gradient() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    found = []
    for fill in (gemskit.masked_fill, torch.masked_fill):
        x, v = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        (fill(x, mask, v) * torch.arange(6.0).view(2, 3)).sum().backward()
        found.append((x.grad, v.grad))
    for got, want in zip(*found):
        assert got is not None and want is not None
        same(got, want)


def test_isclose() -> None:
    x = torch.tensor([1.0, 1.00001, 1.1, math.inf, -math.inf, math.nan, 0.0])
    y = torch.tensor([1.0, 1.0, 1.0, math.inf, math.inf, math.nan, 1e-9])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for arguments in ((), (0.1,), (0.0, 0.0), (1e-5, 1e-8, True), (0.5, math.inf)):
            same(
                gemskit.isclose(x.to(dtype), y.to(dtype), *arguments),
                torch.isclose(x.to(dtype), y.to(dtype), *arguments),
            )
    for dtype in (*INTS, torch.bool):
        a, b = torch.tensor([1, 100, 0, 127]).to(dtype), torch.tensor([1, 99, 1, 128]).to(dtype)
        for arguments in ((), (0.02,), (0, 1)):
            same(gemskit.isclose(a, b, *arguments), torch.isclose(a, b, *arguments))
    same(gemskit.isclose(torch.tensor([2**24 + 1]), torch.tensor([2**24]), 0, 0), torch.tensor([False]))
    with pytest.raises(ArgumentError, match="isclose: rtol must not be negative"):
        gemskit.isclose(x, y, rtol=-1)


@pytest.mark.parametrize("dtype", INTS)
def test_shifts_beyond_the_width(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([0, 1, 5, info.max, info.min, info.min + 1]).to(dtype)
    counts = torch.tensor([0, 1, info.bits - 1, info.bits, info.bits + 1, 63, 64, 100, info.min]).to(dtype)
    for name in ("bitwise_left_shift", "bitwise_right_shift"):
        same(getattr(gemskit, name)(x[:, None], counts), getattr(torch, name)(x[:, None], counts))


def test_numbers_on_either_side() -> None:
    x = torch.tensor([1, 2, 3, 5])
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "remainder", "floor_divide"):
        for dtype in (torch.int8, torch.int64):
            same(getattr(gemskit, name)(6, x.to(dtype)), getattr(torch, name)(6, x.to(dtype)))
    same(gemskit.xlogy(2.5, x), torch.xlogy(2.5, x))
    same(gemskit.rsub(x, 3, alpha=2), torch.rsub(x, 3, alpha=2))
    same(gemskit.trunc_divide(-x, 2), torch.div(-x, 2, rounding_mode="trunc"))
    same(gemskit.addcmul(x, x, x, value=2.5), torch.addcmul(x, x, x, value=2.5))
    # A bool number is a number: its dtype takes part in promotion.
    same(gemskit.add(x.bool(), True), torch.add(x.bool(), True))
    same(gemskit.bitwise_and(x, True), torch.bitwise_and(x, True))


def test_bools_and_mixed_dtypes() -> None:
    b, c = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    same(gemskit.add(b, c), torch.add(b, c))
    same(gemskit.mul(b, c), torch.mul(b, c))
    same(gemskit.maximum(b, c), torch.maximum(b, c))
    for one, two in itertools.product((*INTS, torch.bool, torch.float16, torch.float32), repeat=2):
        x, y = torch.tensor([1, 0, 3]).to(one), torch.tensor([2, 0, 1]).to(two)
        for name in ("maximum", "minimum", "clamp_min", "clamp"):
            same(getattr(gemskit, name)(x, y), getattr(torch, name)(x, y))
        same(gemskit.where(b, x, y), torch.where(b, x, y))
    for one, two in itertools.product((1, 2.5, True), repeat=2):
        same(gemskit.where(b, one, two), torch.where(b, one, two))


def test_aliases() -> None:
    for name, other in {
        "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne", "multiply": "mul",
        "subtract": "sub", "divide": "div", "true_divide": "div", "__or__": "bitwise_or",
    }.items():  # fmt: skip
        assert getattr(gemskit, name) is getattr(gemskit, other)
    assert gemskit.__ior__ is gemskit.bitwise_or_ and gemskit.greater_ is gemskit.gt_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["floor_divide", "remainder", "fmod"])
def test_whole_quotients_are_exact(name: str, dtype: torch.dtype) -> None:
    """Blocks of small quotients take the short way: multiples of halves of the divisor, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1 << 14, generator=generator).to(dtype)
    x = (y.double() * torch.randint(-300, 300, y.shape, generator=generator) / 2).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    x = (x.view(bits) + torch.randint(-1, 2, y.shape, generator=generator).to(bits)).view(dtype)
    x, y = x[x.isfinite()], y[x.isfinite()]
    x[:8] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-3, -1e-3, 1e-3, -1e-3])
    y[:8] = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    op = getattr(gemskit, name)
    got = op(x, y)
    exact = op.meaning(x.float(), y.float()).to(dtype)
    assert torch.equal(got, exact) and torch.equal(got.signbit(), exact.signbit())
