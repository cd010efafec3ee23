"""What the derived checks do not see of the functions of one tensor: every half, and numbers that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, ShapeError

HALVES = (torch.bfloat16, torch.float16)


def every(dtype: torch.dtype) -> Tensor:
    """All numbers of a half type."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[~x.isnan()]


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of the type lie between."""

    def place(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "log10",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "tanh",
        "erf",
        "mish",
        "softplus",
        "sin",
        "cos",
        "sinh",
        "asinh",
        "acosh",
        "atanh",
        "digamma",
    ],
)
def test_fast_functions_round_as_well_as_float32(name: str, dtype: torch.dtype) -> None:
    """Of all halves, all but a few results are the nearest half, and these are its neighbour."""
    op, x = getattr(gemskit, name), every(dtype)
    # In order of magnitude: a block of small ones takes the short way.
    x = x[x.abs().argsort()]
    with interpret():
        got = op(x)
    exact = op.meaning(x.double()).to(dtype)
    assert torch.equal(got.isnan(), exact.isnan())
    apart = steps(got, exact)[~exact.isnan()]
    assert int(apart.max()) <= 1 and int((apart > 0).sum()) <= 16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["atan", "erfc", "special_i0e"])
def test_shorter_functions_are_within_half_a_unit_and_a_little(name: str, dtype: torch.dtype) -> None:
    """A polynomial good to 2**-17 costs one instruction less than one that rounds as well as float32."""
    op, x = getattr(gemskit, name), every(dtype)
    with interpret():
        got = op(x)
    exact = op.meaning(x.double())
    unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor())
    assert ((got.double() - exact).abs() <= 0.515 * unit).all()
    zero = exact == 0
    assert torch.equal(got[zero].signbit(), exact[zero].signbit())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lgamma_is_within_half_a_unit_and_a_little_and_below_zero_near_its_terms(dtype: torch.dtype) -> None:
    x = every(dtype)
    with interpret():
        got = gemskit.lgamma(x)
    exact = torch.lgamma(x.double())
    assert torch.equal(got.isnan(), exact.isnan())
    finite = exact.to(dtype).isfinite()
    assert torch.equal(got[~finite & ~exact.isnan()], exact.to(dtype)[~finite & ~exact.isnan()])
    x, got, exact = x[finite].double(), got[finite].double(), exact[finite]
    unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor())
    term = torch.where(x < 0, torch.lgamma(1 - x).abs().clamp_min(1.0), 0.0)
    assert ((got - exact).abs() <= 0.515 * unit + 2.0**-17 * term).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_edges_of_fast_functions(dtype: torch.dtype) -> None:
    """NaN, infinities, zeros, poles and domains, and the sign of zeros, which the comparison of all numbers does not see."""
    nan, inf = float("nan"), float("inf")
    expected: dict[str, tuple[tuple[float, float], ...]] = {
        "erfc": ((nan, nan), (0.0, 1.0), (-0.0, 1.0), (inf, 0.0), (-inf, 2.0)),
        "atan": ((nan, nan), (0.0, 0.0), (-0.0, -0.0), (inf, 1.5707963267948966), (-inf, -1.5707963267948966)),
        "sinh": ((nan, nan), (0.0, 0.0), (-0.0, -0.0), (inf, inf), (-inf, -inf)),
        "asinh": ((nan, nan), (0.0, 0.0), (-0.0, -0.0), (inf, inf), (-inf, -inf)),
        "acosh": ((nan, nan), (1.0, 0.0), (0.5, nan), (-1.0, nan), (-300.0, nan), (inf, inf), (-inf, nan)),
        "atanh": ((nan, nan), (0.0, 0.0), (-0.0, -0.0), (1.0, inf), (-1.0, -inf), (1.5, nan), (-inf, nan), (inf, nan)),
        "special_i0e": ((nan, nan), (0.0, 1.0), (-0.0, 1.0), (inf, 0.0), (-inf, 0.0)),
        "lgamma": ((nan, nan), (0.0, inf), (-0.0, inf), (1.0, 0.0), (2.0, 0.0), (-3.0, inf), (inf, inf), (-inf, inf)),
        "digamma": ((nan, nan), (0.0, -inf), (-0.0, inf), (-1.0, nan), (-1024.0, nan), (inf, inf), (-inf, nan)),
    }
    for name, pairs in expected.items():
        x, y = (torch.tensor(v, dtype=dtype) for v in zip(*pairs))
        with interpret():
            got = getattr(gemskit, name)(x)
        assert torch.equal(got.isnan(), y.isnan()), name
        assert torch.equal(got.nan_to_num(), y.nan_to_num()) and torch.equal(got.signbit() & ~y.isnan(), y.signbit()), (
            name
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_fast_units_are_no_worse_than_float32(name: str, approximate: str, dtype: torch.dtype) -> None:
    op, x = getattr(gemskit, name), every(dtype)
    kwargs = {"approximate": approximate} if name == "gelu" else {}

    def slope(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(fn(leaf, **kwargs).sum(), leaf)[0]

    with interpret():
        got = op(x, **kwargs), slope(op, x)
    single = op.meaning(x.float(), **kwargs).to(dtype), slope(op.meaning, x.float()).to(dtype)
    exact = op.meaning(x.double(), **kwargs), slope(op.meaning, x.double())
    for mine, theirs, true in zip(got, single, exact):
        live = true.isfinite() & theirs.isfinite()
        # Beyond 1 both types have relative precision; below, 1 is the unit.
        unit = torch.finfo(dtype).eps * true.abs().clamp_min(1)
        error = ((mine.double() - true).abs() / unit)[live].max()
        assert error <= max(0.51, 1.01 * ((theirs.double() - true).abs() / unit)[live].max().item())


def test_precise_follows_what_is_read_and_written() -> None:
    """A float32 result of a half is as precise as that of a float32; a half result of a float32 too."""
    x = torch.linspace(-3, 3, 1001)
    with interpret():
        wide = gemskit.tanh(x, out=torch.empty(1001, dtype=torch.float32))
        narrow = gemskit.gelu(x)
    assert (wide - torch.tanh(x.double())).abs().max() < 2e-7
    assert (narrow - torch.nn.functional.gelu(x.double())).abs().max() < 5e-7


def test_numbers_that_are_refused() -> None:
    x = torch.randn(5)
    with pytest.raises(ArgumentError, match="alpha"):
        gemskit.celu(x, 0.0)
    with pytest.raises(ArgumentError, match="alpha"):
        gemskit.celu_(x, 0.0)
    with pytest.raises(ArgumentError, match="lambd"):
        gemskit.softshrink(x, -1.0)


def test_prelu_takes_one_weight_or_one_for_each_channel() -> None:
    for shape, count in (((4, 3, 5), 3), ((4, 3, 5), 1), ((7,), 1), ((), 1)):
        x, weight = torch.randn(shape), torch.randn(count)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        like = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with interpret():
            got = gemskit.prelu(*leaves)
            grads = torch.autograd.grad(got.sum(), leaves)
        want = torch.nn.functional.prelu(*like)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), like))
    with pytest.raises(ShapeError, match="channels"):
        gemskit.prelu(torch.randn(4, 3), torch.randn(2))
    with pytest.raises(ArgumentError, match="float64"):
        gemskit.prelu(torch.randn(4, 3), torch.randn(1, dtype=torch.float64))


@pytest.mark.parametrize("low", [-40, -4.0])
def test_digamma_far_and_near(low: float) -> None:
    x = torch.linspace(low + 0.013, 60, 997)
    with interpret():
        got = gemskit.digamma(x)
    exact = torch.digamma(x.double())
    # Near a pole the rounding of x itself decides in torch's float32; the distance to it is exact in ours.
    assert ((got - exact).abs() / (1 + exact.abs())).max() < 2e-5


@pytest.mark.parametrize("name", ["special_i0e", "special_i1", "i0"])
def test_bessel_functions_far_out(name: str) -> None:
    op = getattr(gemskit, name)
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-85, 85, 341, dtype=dtype)
        with interpret():
            got = op(x)
        torch.testing.assert_close(got.double(), op.meaning(x.double()), rtol=20 * torch.finfo(dtype).eps, atol=0)
