"""What a walk over the registry does not see: promotion over all dtypes, numbers, drawn values, operators of users."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from gemskit import _launch, _layout, pointwise
from gemskit._dtypes import Number
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit.errors import ArgumentError, GemskitError, GradientError, NoKernel, ShapeError

F = torch.nn.functional
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with interpret():
        yield


def values(dtype: torch.dtype) -> Tensor:
    return torch.tensor([3, 1, 0, 2, 5, 1, 4, 1]).to(dtype)


def same(got: Any, want: Tensor) -> None:
    assert isinstance(got, Tensor)
    rtol = 1e-2 if want.dtype in (torch.float16, torch.bfloat16) else 2e-6
    torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True)
    assert got.stride() == want.stride()


def against_torch(ours: Any, torchs: Any, *args: Any, **kwargs: Any) -> None:
    """The same result or, where torch refuses, a refusal."""
    try:
        want = torchs(*args, **kwargs)
    except (RuntimeError, TypeError):
        with pytest.raises(GemskitError):
            ours(*args, **kwargs)
    else:
        same(ours(*args, **kwargs), want)


@pytest.mark.parametrize("name", ["add", "div", "eq"])
def test_promotion_of_every_pair(name: str) -> None:
    for a, b in itertools.product(DTYPES, DTYPES):
        x, y = values(a), values(b).flip(0)
        against_torch(getattr(pointwise, name), getattr(torch, name), x, y)
        if name == "add":
            against_torch(pointwise.add, torch.add, x, y[0])


@pytest.mark.parametrize("name", ["mul", "pow", "lt"])
def test_numbers_with_every_dtype(name: str) -> None:
    for dtype, number in itertools.product(DTYPES, (True, 2, 0.1, 300)):
        against_torch(getattr(pointwise, name), getattr(torch, name), values(dtype), number)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow"])
def test_number_first(name: str) -> None:
    for dtype in (torch.float32, torch.int64, torch.uint8):
        same(getattr(pointwise, name)(2, values(dtype)), getattr(torch, name)(2, values(dtype)))


def test_numbers_keep_their_precision() -> None:
    assert pointwise.add(torch.zeros(1, dtype=torch.float64), 1e-17 + 0.1).item() == 0.1 + 1e-17
    assert pointwise.add(torch.ones(1, dtype=torch.int64), 2**40 + 1).item() == 2**40 + 2
    assert pointwise.mul(torch.full((1,), 3.0, dtype=torch.float64), 0.1).item() == 3.0 * 0.1
    # Operands are promoted before they are computed with, and before they are compared.
    assert pointwise.mul(torch.tensor([70000]), torch.tensor([0.1], dtype=torch.float16)).item() == math.inf
    assert pointwise.eq(torch.tensor([2049]), torch.tensor([2048.0], dtype=torch.float16)).item()
    assert pointwise.eq(torch.tensor([0.1], dtype=torch.bfloat16), 0.1).item()


def test_a_new_value_of_a_number_compiles_nothing() -> None:
    x = torch.ones(3)
    pointwise.mul(x, 2.5)
    kernels = len(pointwise.mul._formula._bound)  # type: ignore[union-attr]
    for v in (3, 4.5, True, 7):
        pointwise.mul(x, v)
    assert len(pointwise.mul._formula._bound) == kernels  # type: ignore[union-attr]


def test_complex_is_refused_where_there_is_no_formula() -> None:
    z = torch.ones(2, dtype=torch.complex64)
    for call in (lambda: pointwise.silu(z), lambda: pointwise.pow(z, 2), lambda: pointwise.pow(torch.ones(2), 1j)):
        with pytest.raises(NoKernel, match=r"(silu|pow): no kernel .*complex"):
            call()


def test_integer_powers_are_exact_and_wrap() -> None:
    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8):
        base = torch.arange(0 if dtype == torch.uint8 else -12, 13).to(dtype)
        for exponent in (0, 1, 2, 5, 17, 63):
            same(pointwise.pow(base, exponent), torch.pow(base, exponent))
    base, exponent = torch.meshgrid(torch.arange(-3, 4), torch.arange(-4, 5), indexing="ij")
    base = torch.where((base == 0) & (exponent < 0), 2, base)
    assert torch.equal(pointwise.pow(base, exponent), torch.pow(base, exponent))
    with pytest.raises(GemskitError, match="negative"):
        pointwise.pow(torch.arange(3), -1)


def test_special_values_of_powers() -> None:
    base = torch.tensor([0.0, -0.0, 1.0, -1.0, -2.5, math.inf, -math.inf, math.nan, 3.0])
    for exponent in (0, 0.5, -0.5, 1, -1, 2, 3, math.nan, math.inf):
        got, want = pointwise.pow(base, exponent), torch.pow(base, exponent)
        same(got, want)
        assert torch.equal(got.signbit() & (got == got), want.signbit() & (want == want))


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_division_in_rounding_modes(mode: Any) -> None:
    marks = torch.tensor([0.0, -0.0, 1.0, -1.0, 7.0, -7.0, 0.3, math.inf, -math.inf, math.nan, 1e-40])
    x, y = torch.meshgrid(marks, marks, indexing="ij")
    same(pointwise.div(x, y, rounding_mode=mode), torch.div(x, y, rounding_mode=mode))
    x, y = torch.meshgrid(torch.arange(-8, 9), torch.tensor([-3, -2, -1, 1, 2, 3]), indexing="ij")
    for dtype in (torch.int8, torch.int64):
        a, b = x.to(dtype), y.to(dtype)
        same(pointwise.div(a, b, rounding_mode=mode), torch.div(a, b, rounding_mode=mode))
    leaf = torch.ones(3, requires_grad=True)
    pointwise.div(leaf, 2, rounding_mode=mode).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(leaf.grad, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(GemskitError):
        pointwise.div(torch.arange(3), 0, rounding_mode=mode)


EDGES = torch.tensor([0.0, 1.0, 2.0, -1.5, 0.5, math.nan, math.inf, -math.inf])
GRADIENTS = {
    "relu": (pointwise.relu, torch.relu),
    "maximum": (pointwise.maximum, torch.maximum),
    "minimum": (pointwise.minimum, torch.minimum),
    "pow": (pointwise.pow, torch.pow),
    "clamp": (lambda x, y: pointwise.clamp(x, y, y + 1), lambda x, y: torch.clamp(x, y, y + 1)),
    "clamp_min": (lambda x, y: pointwise.clamp(x, min=y), lambda x, y: torch.clamp(x, min=y)),
    "clamp_numbers": (lambda x: pointwise.clamp(x, 0, 1), lambda x: torch.clamp(x, 0, 1)),
    "where": (lambda x, y: pointwise.where(x.detach() > 0, x, y), lambda x, y: torch.where(x.detach() > 0, x, y)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_at_ties_bounds_and_special_values(name: str) -> None:
    ours, torchs = GRADIENTS[name]
    x, y = torch.meshgrid(EDGES, EDGES, indexing="ij")
    count = 1 if name in ("relu", "clamp_numbers") else 2
    found = []
    for fn in (ours, torchs):
        leaves = [t.clone().requires_grad_() for t in (x, y)[:count]]
        found.append(torch.autograd.grad(fn(*leaves), leaves, torch.full(x.shape, 3.0)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


# -- in place, out, errors -------------------------------------------------------------------------------------------


def test_in_place_of_a_result_with_another_dtype() -> None:
    x = torch.tensor([1.0, 2.0])
    assert pointwise.eq_(x, 2) is x and x.tolist() == [0.0, 1.0]
    with pytest.raises(ArgumentError):
        pointwise.div_(torch.arange(3), 2)
    y = (torch.ones(2, requires_grad=True) * 2,)
    with pytest.raises(GradientError):
        pointwise.eq_(*y, 2)


def test_out_may_be_an_input_and_nothing_that_overlaps_one() -> None:
    x = torch.randn(4, 4)
    want = x * 2
    assert pointwise.mul(x, 2, out=x) is x
    torch.testing.assert_close(x, want)
    for write in (lambda: pointwise.add(x, 1, out=x.t()), lambda: pointwise.add_(x, x.t())):
        with pytest.raises(ArgumentError, match="overlaps"):
            write()


def test_refusals() -> None:
    with pytest.raises(ShapeError):
        pointwise.add(torch.ones(5), torch.ones(4))
    for call in (
        lambda: pointwise.gelu(torch.ones(3), approximate="sigmoid"),  # type: ignore[arg-type]
        lambda: pointwise.gelu(torch.arange(3)),
        lambda: pointwise.where(torch.ones(3, dtype=torch.int32), torch.ones(3), 0),
        lambda: pointwise.clamp(torch.ones(3)),
        lambda: pointwise.div(torch.ones(3), 2, rounding_mode="ceil"),  # type: ignore[arg-type]
        lambda: pointwise.neg(torch.ones(3, dtype=torch.bool)),
        lambda: pointwise.add(2, 3),
    ):
        with pytest.raises(GemskitError):
            call()


# -- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed_and_not_the_layout() -> None:
    x = torch.randn(40, 60)
    torch.manual_seed(7)
    first, second = pointwise.dropout(x), pointwise.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(pointwise.dropout(x.t().contiguous().t()), first)
    apart = torch.zeros(40, 120)[:, ::2].copy_(x)
    torch.manual_seed(7)
    assert torch.equal(pointwise.dropout(apart), first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_right_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(1)
    y = pointwise.dropout(torch.ones(200, 500), p)
    kept = y != 0
    # Five standard deviations of a binomial of 100,000.
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 1e5)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    # Neighbours are independent.
    both = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_gradient_has_the_mask_of_the_result(dtype: torch.dtype) -> None:
    x = torch.ones(33, 70, dtype=dtype).t().requires_grad_()
    y = pointwise.dropout(x, 0.3)
    y.backward(torch.ones((), dtype=dtype).expand(y.shape))  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.equal(x.grad, y)


def test_dropout_mask_is_the_same_for_both_index_types(monkeypatch: pytest.MonkeyPatch) -> None:
    op, x, seed = pointwise.random._dropout, torch.ones(30, 50), torch.tensor(12345)
    narrow = op(x, 0.5, seed)
    op._plans.clear()
    monkeypatch.setattr(_layout, "is_wide", lambda *_: True)
    wide = op(x, 0.5, seed)
    op._plans.clear()
    assert torch.equal(wide, narrow)


def test_dropout_edges() -> None:
    x = torch.randn(9)
    assert pointwise.dropout(x, 0.5, training=False) is x and pointwise.dropout(x, 0.0) is x
    assert torch.equal(pointwise.dropout(x, 1.0), torch.zeros(9))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="dropout"):
            pointwise.dropout(x, p)
    y = x.clone()
    assert pointwise.dropout(y, 0.5, inplace=True) is y and not torch.equal(x, y)
    assert pointwise.dropout(torch.randn(()), 0.5).shape == ()
    with pytest.raises(GemskitError):
        pointwise.dropout(torch.arange(9))


def test_dropout_of_cpu_tensors_is_torchs() -> None:
    from gemskit._interpret import _scope

    token = _scope.set(None)
    try:
        torch.manual_seed(3)
        mine = pointwise.dropout(torch.ones(50))
        torch.manual_seed(3)
        assert torch.equal(mine, F.dropout(torch.ones(50)))
    finally:
        _scope.reset(token)


# -- operators of users ----------------------------------------------------------------------------------------------


@pointwise.pointwise()
def silu(a: Tensor, b: Tensor | Number, weight: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """Linear interpolation, under a name that gemskit has too."""
    return torch.add(a * (1 - weight), b, alpha=weight)


@silu.formula
@triton.jit
def _(a, b, weight):
    return a * (1 - weight) + b * weight


@silu.gradient
@triton.jit
def _(grad, weight):
    return grad * (1 - weight), grad * weight


def test_a_users_operator_is_not_one_of_ours() -> None:
    assert REGISTRY["silu"] is pointwise.silu and REGISTRY["silu"] is not silu


PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.int64), (torch.float16, torch.float64)]


@pytest.mark.parametrize("a_dtype, b_dtype", PAIRS)
def test_a_users_operator_has_it_all(a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 1, 9).to(a_dtype), (torch.randn(9, 5) * 4).to(b_dtype).t()
    before = _launch.launches().total()
    same_as = silu.meaning(a.double(), b.double(), 0.3)
    y = silu(a, b, 0.3)
    assert _launch.launches().total() == before + 1
    assert y.dtype == silu.meaning(a, b).dtype and y.shape == (7, 5, 9)
    torch.testing.assert_close(y.double(), same_as, rtol=1e-2, atol=3e-2)
    out = torch.empty(5, 7, 9, dtype=y.dtype).transpose(0, 1)
    assert silu(a, b, 0.3, out=out) is out and torch.equal(out, y)
    target = a.expand(7, 5, 9).clone()
    if torch.can_cast(y.dtype, target.dtype):
        assert silu.inplace(target, b, 0.3) is target
        torch.testing.assert_close(target, y.to(target.dtype))


def test_a_users_operator_has_gradients() -> None:
    a, b = torch.randn(7, 1, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    grad = torch.randn(9, 5, 7).permute(2, 1, 0)
    found = torch.autograd.grad(silu(a, b, 0.3), (a, b), grad)
    with torch.no_grad():
        expected = (0.7 * grad).sum(1, keepdim=True), (0.3 * grad).sum(0)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad(silu(a, 2, 0.25).sum(), a)[0].eq(0.75).all()


# -- the example of the documentation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    text = (Path(__file__).parents[1] / "docs" / "declaring.md").read_text()
    path = tmp_path_factory.mktemp("docs") / "declaring_example.py"
    path.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    spec = importlib.util.spec_from_file_location("declaring_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_the_docs(example: ModuleType) -> None:
    x = torch.randn(6, 9, dtype=torch.float64).t()
    want = x / (1 + x.abs() / 2)
    torch.testing.assert_close(example.softsign(x, 2.0), want)
    leaf = x.clone().requires_grad_()
    example.softsign(leaf, 2.0).sum().backward()
    torch.testing.assert_close(leaf.grad, 1 / (1 + x.abs() / 2) ** 2)
    out = torch.empty(9, 6, dtype=torch.float64)
    torch.testing.assert_close(example.softsign(x, 2.0, out=out), want)
    y = x.clone()
    assert example.softsign_(y, 2.0) is y
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(example.softsign(x.bfloat16()), F.softsign(x.bfloat16()))


def test_the_other_examples_of_the_docs(example: ModuleType) -> None:
    x, y = torch.randn(2, 6, 9).unbind()
    for name in ("polar", "wide_mul", "log_cosh"):
        op, found = getattr(example, name), []
        for fn, dtype in ((op, torch.float32), (op.meaning, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, y[0])]
            result = fn(*leaves)
            outs = result if isinstance(result, tuple) else (result,)
            weights = [torch.full_like(o, 0.5 + i) for i, o in enumerate(outs)]
            found.append([*outs, *torch.autograd.grad(outs, leaves, weights)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    a, b = x.bfloat16(), y.bfloat16()
    assert torch.equal(example.wide_mul(a, b), a.float() * b.float())
    assert torch.equal(example.within(x, y, 1), (x >= y) & (x < 1))
