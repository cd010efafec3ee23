"""Every public device function, called from kernels such as a user writes, against torch in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import _launch, interpret, language

NAN, INF = float("nan"), float("inf")


@triton.jit
def unary(x, o, n, FN: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, FN(tl.load(x + i, i < n)), i < n)


@triton.jit
def binary(x, y, o, n, FN: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, FN(tl.load(x + i, i < n), tl.load(y + i, i < n)), i < n)


@triton.jit
def turned(x, y, c, s, o, p, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    a, b = language.rotate(tl.load(x + i, m), tl.load(y + i, m), tl.load(c + i, m), tl.load(s + i, m))
    tl.store(o + i, a, m)
    tl.store(p + i, b, m)


@triton.jit
def largest(x, value, index, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v, j = tl.reduce((tl.load(x + i, i < n, other=-float("inf")), i), 0, language.better_max)
    tl.store(value, v)
    tl.store(index, j)


@triton.jit
def smallest(x, value, index, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v, j = tl.reduce((tl.load(x + i, i < n, other=float("inf")), i), 0, language.better_min)
    tl.store(value, v)
    tl.store(index, j)


@triton.jit
def moments(x, mean, m2, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, i < n, other=0.0)
    a, b, _ = tl.reduce((v, v * 0, tl.where(i < n, 1.0, 0.0).to(v.dtype)), 0, language.welford)
    tl.store(mean, a)
    tl.store(m2, b)


@triton.jit
def normaliser(x, peak, total, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, i < n, other=-float("inf"))
    one = tl.where(v == float("inf"), float("nan"), tl.where(i < n, 1.0, 0.0)).to(v.dtype)
    p, t = tl.reduce((v, one), 0, language.online_softmax)
    tl.store(peak, p)
    tl.store(total, t)


@triton.jit
def running(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.associative_scan(tl.load(x + i, i < n, other=0.0), 0, language.add), i < n)


@triton.jit
def drawn(seed, words, o, first, n, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b, c, d = language.philox(tl.load(seed), first + i)
    tl.store(words + 4 * i, a.to(tl.int64), i < n)
    tl.store(words + 4 * i + 1, b.to(tl.int64), i < n)
    tl.store(words + 4 * i + 2, c.to(tl.int64), i < n)
    tl.store(words + 4 * i + 3, d.to(tl.int64), i < n)
    tl.store(o + i, language.uniform(tl.load(seed), first + i), i < n)


@triton.jit
def tiles(m, n, tiles_m, tiles_n, GROUP: tl.constexpr):
    i = tl.program_id(0)
    a, b = language.swizzle(i, tiles_m, tiles_n, GROUP)
    tl.store(m + i, a)
    tl.store(n + i, b)


def derivative(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def d(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(fn(x).sum(), x)
        return g

    return d


#: Function, its meaning in torch, and how many units in the last place of float32 it may be off.
UNARY: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "exp": (torch.exp, 2),
    "log": (torch.log, 2),
    "tanh": (torch.tanh, 2),
    "erf": (torch.erf, 2),
    "sqrt": (torch.sqrt, 1),
    "sigmoid": (torch.sigmoid, 3),
    "d_sigmoid": (derivative(torch.sigmoid), 6),
    "d_tanh": (derivative(torch.tanh), 12),
    "relu": (torch.relu, 0),
    "d_relu": (derivative(torch.relu), 0),
    "silu": (F.silu, 4),
    "d_silu": (derivative(F.silu), 12),
    "gelu": (F.gelu, 12),
    "d_gelu": (derivative(F.gelu), 12),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 12),
    "d_gelu_tanh": (derivative(lambda x: F.gelu(x, approximate="tanh")), 12),
    "softplus": (F.softplus, 4),
    "is_nan": (torch.isnan, 0),
}
BINARY: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "pow": (torch.pow, 4),
    "div": (torch.div, 0),
    "maximum": (torch.maximum, 0),
    "minimum": (torch.minimum, 0),
    "add": (torch.add, 0),
}
#: Tested below, each with kernels of its own.
OTHERS = {"better_max", "better_min", "welford", "online_softmax", "philox", "uniform", "rotate", "swizzle"}


def numbers(n: int = 300) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g, dtype=torch.float64) * 3
    return torch.cat([x, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, 20.0, -20.0, 90.0, -90.0], dtype=torch.float64)])


def close(got: Tensor, want: Tensor, units: int) -> None:
    """Off by ``units`` in the last place of the larger of value and 1/8: sums that cancel have no relative error."""
    want = torch.where(want.abs() > torch.finfo(got.dtype).max, want.sign() * INF, want)  # too large for the dtype
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.double().nan_to_num(0, 1e30, -1e30), want.double().nan_to_num(0, 1e30, -1e30)
    allowed = units * 2.0**-23 * want.abs().clamp_min(0.125)
    worst = ((got - want).abs() - allowed).max()
    assert worst <= 0, f"off by {worst} more than {units} units"


def public() -> set[str]:
    return {n for n, v in vars(language).items() if isinstance(v, triton.JITFunction) and not n.startswith("_")}


def test_every_function_is_tested_and_documented() -> None:
    assert public() == {*UNARY, *BINARY, *OTHERS}
    text = (Path(__file__).parents[1] / "docs" / "language.md").read_text()
    missing = [n for n in public() if f"`{n}`" not in text]
    assert not missing, f"not in docs/language.md: {missing}"


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_one(name: str, dtype: torch.dtype) -> None:
    meaning, units = UNARY[name]
    x = numbers().to(dtype)
    o = torch.empty_like(x)
    interpret(unary)[(3,)](x, o, len(x), getattr(language, name), B=128)
    close(o, meaning(x.double()).double(), units)


@pytest.mark.parametrize("name", UNARY)
def test_special_values_are_torchs(name: str) -> None:
    meaning, _ = UNARY[name]
    x = torch.tensor([NAN, INF, -INF])
    o = torch.empty_like(x)
    interpret(unary)[(1,)](x, o, len(x), getattr(language, name), B=4)
    if name in ("d_silu", "d_gelu", "d_gelu_tanh"):
        assert o.isnan().all(), "the docstring says so; torch's differ among themselves"
    elif name == "d_relu":
        assert o.tolist() == [1, 1, 0]
    else:
        close(o, meaning(x.double()).float(), 0)  # torch's vectorised float32 gelu gives NaN at inf, its scalar one inf


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_two(name: str, dtype: torch.dtype) -> None:
    meaning, units = BINARY[name]
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(200, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    x[:4], y[:4] = torch.tensor([NAN, 1.0, INF, 0.0]), torch.tensor([1.0, NAN, 2.0, 0.0])
    o = torch.empty_like(x)
    interpret(binary)[(2,)](x, y, o, len(x), getattr(language, name), B=128)
    # In the dtype itself where the function rounds correctly.
    close(o, meaning(x, y) if not units else meaning(x.double(), y.double()), units)


def test_rotate() -> None:
    x, y, angle = torch.randn(3, 50).unbind()
    o, p = torch.empty(50), torch.empty(50)
    interpret(turned)[(1,)](x, y, angle.cos(), angle.sin(), o, p, 50, B=64)
    want = torch.complex(x, y) * torch.polar(torch.ones(50), angle)
    torch.testing.assert_close((o, p), (want.real, want.imag))


@pytest.mark.parametrize("values", [[1.0, 5, 3, 5], [-INF, -INF], [1, NAN, 2, NAN], [3.0]])
def test_pairs_with_an_index(values: list[float]) -> None:
    x = torch.tensor(values)
    for kernel, meaning in ((largest, torch.max), (smallest, torch.min)):
        value, index = torch.empty(()), torch.empty((), dtype=torch.int64)
        interpret(kernel)[(1,)](x, value, index, len(x), B=8)
        torch.testing.assert_close((value, index), tuple(meaning(x, 0)), equal_nan=True)


def test_welford_far_from_zero() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(2)) + 1e4
    mean, m2 = torch.empty(()), torch.empty(())
    interpret(moments)[(1,)](x, mean, m2, 100, B=128)
    torch.testing.assert_close(mean.double(), x.double().mean(), rtol=1e-6, atol=0)
    # Means are rounded to 1/1024 here, a thousandth of the deviation; sums of squares would be off by 100%.
    torch.testing.assert_close((m2 / 99).double(), x.double().var(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [[0.5, 2, -1], [-INF, 1.0], [-INF, -INF], [NAN, 1.0], [INF, 1.0], [1000.0, -1000.0]])
def test_online_softmax(values: list[float]) -> None:
    x = torch.tensor(values)
    peak, total = torch.empty(()), torch.empty(())
    interpret(normaliser)[(1,)](x, peak, total, len(x), B=8)
    want = torch.logsumexp(x, 0)
    if any(v == INF for v in values):
        assert total.isnan(), "softmax of such a row is NaN"
    else:
        torch.testing.assert_close(peak + total.log(), want, equal_nan=True)


def test_add_scans() -> None:
    x = torch.randn(60)
    o = torch.empty(60)
    interpret(running)[(1,)](x, o, 60, B=64)
    torch.testing.assert_close(o, x.cumsum(0))


def test_philox_and_uniform() -> None:
    n = 4096
    found = []
    for seed, first in ((7, 0), (7, 0), (8, 0), (7, 2**33)):
        words, o = torch.empty(4 * n, dtype=torch.int64), torch.empty(n)
        interpret(drawn)[(1,)](torch.tensor(seed), words, o, first, n, B=n)
        found.append((words, o))
    (words, o), again, other, far = found
    assert torch.equal(words, again[0]) and torch.equal(o, again[1])
    assert not torch.equal(words, other[0]) and not torch.equal(words, far[0])
    assert 0 < o.min() and o.max() < 1 and abs(o.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert len(words.unique()) > 4 * n - 10 and int(words.min()) >= 0 and int(words.max()) < 2**32
    # Known answer: counter and key of zeros.
    words, o = torch.empty(4, dtype=torch.int64), torch.empty(1)
    interpret(drawn)[(1,)](torch.tensor(0), words, o, 0, 1, B=1)
    assert [hex(w) for w in words.tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group"), [(7, 5, 4), (8, 3, 8), (1, 9, 4)])
def test_swizzle_visits_every_tile_once(tiles_m: int, tiles_n: int, group: int) -> None:
    m, n = torch.empty(2, tiles_m * tiles_n, dtype=torch.int32).unbind()
    interpret(tiles)[(tiles_m * tiles_n,)](m, n, tiles_m, tiles_n, GROUP=group)
    visited = list(zip(m.tolist(), n.tolist()))
    assert sorted(visited) == [(a, b) for a in range(tiles_m) for b in range(tiles_n)]
    height = min(group, tiles_m)
    assert visited[:height] == [(k, 0) for k in range(height)], "a group goes down its columns"


def test_they_have_docstrings_and_no_globals_of_ours() -> None:
    for name in public():
        fn: Any = getattr(language, name).fn
        assert inspect.getdoc(fn), name
    assert not _launch._recording
