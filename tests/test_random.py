"""Random operators: distributions, and values that follow seed and index alone. Kernels are interpreted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import interpret
from gemskit._op import REGISTRY
from gemskit.errors import ArgumentError, DtypeError
from gemskit.pointwise.random import _below

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
N = 20000

#: Operators in place, with their arguments.
DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": lambda x, **k: gemskit.uniform_(x, -1, 3, **k),
    "normal": lambda x, **k: gemskit.normal_(x, 2, 3, **k),
    "exponential": lambda x, **k: gemskit.exponential_(x, 2.0, **k),
    "bernoulli": lambda x, **k: gemskit.bernoulli_(x, 0.3, **k),
    "random": lambda x, **k: gemskit.random_(x, 100, **k),
    "wide": lambda x, **k: gemskit.random_(x, 1 << 23, **k),
}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with interpret():
        yield


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's, times the root of the count: above 2.2 once in 10,000."""
    x = values.double().flatten().sort().values
    n = x.numel()
    want, have = cdf(x), torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum((want - have).abs(), (want - have - 1 / n).abs()).max() * math.sqrt(n))


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_distributions(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.empty(N, dtype=dtype)
    assert distance(gemskit.uniform_(x, -1, 3), lambda v: (v + 1) / 4) < 2.2
    assert distance(gemskit.normal_(x, 2, 3), lambda v: torch.special.ndtr((v - 2) / 3)) < 2.2
    assert distance(gemskit.exponential_(x, 2.0), lambda v: 1 - torch.exp(-2 * v)) < 2.2
    assert abs(float(gemskit.bernoulli_(x, 0.3).mean()) - 0.3) < 4 * math.sqrt(0.21 / N)
    assert set(x.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_are_independent(dtype: torch.dtype) -> None:
    """The words of one counter, and the two normals of a pair."""
    torch.manual_seed(2)
    z = gemskit.randn(N // 4, 4, dtype=dtype).double()
    assert (torch.corrcoef(z.T) - torch.eye(4, dtype=torch.float64)).abs().max() < 4 / math.sqrt(N // 4)
    assert (torch.corrcoef((z * z).T) - torch.eye(4, dtype=torch.float64)).abs().max() < 4 / math.sqrt(N // 4)
    assert (z.mean(0).abs() < 4 / math.sqrt(N // 4)).all() and ((z.std(0) - 1).abs() < 4 / math.sqrt(N // 2)).all()
    assert distance(z, torch.special.ndtr) < 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_values_stay_below_the_bound(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    u = gemskit.rand(N, dtype=dtype)
    assert u.dtype == dtype and 0 <= float(u.min()) and float(u.max()) < 1
    if dtype in (torch.bfloat16, torch.float16):
        # Rounding would reach 1 in one of 512 or 4096 values.
        assert float(u.max()) == _below(1.0, dtype) == float(torch.nextafter(u.new_ones(()), u.new_zeros(())))
    assert abs(float(u.double().mean()) - 0.5) < 4 * math.sqrt(1 / 12 / N)
    assert len(u.double().unique()) > 100
    v = gemskit.uniform_(torch.empty(999, dtype=dtype), 1, 1.01)
    assert float(v.double().max()) < 1.01 and float(v.min()) >= 1
    assert (gemskit.uniform_(torch.empty(9, dtype=dtype), 2, 2) == 2).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("high", [1.0, 0.01, 3.7, -1.0, -0.3, 65000.0, 2.0**-10])
def test_value_below(dtype: torch.dtype, high: float) -> None:
    below = torch.tensor(_below(high, dtype), dtype=torch.float64)
    assert below.to(dtype).double() == below < high
    above = torch.nextafter(below.to(dtype), torch.tensor(math.inf, dtype=dtype))
    assert above.double() >= high


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_values_are_positive_and_finite(dtype: torch.dtype) -> None:
    x = gemskit.exponential_(torch.empty(N, dtype=dtype))
    assert (x > 0).all() and x.isfinite().all()
    assert abs(float(x.double().mean()) - 1) < 4 / math.sqrt(N)


@pytest.mark.parametrize("low, high", [(0, 7), (-3, 4), (0, 1), (5, 5 + (1 << 22)), (-(2**62), 2**62)])
def test_integers(low: int, high: int) -> None:
    torch.manual_seed(4)
    x = gemskit.randint(low, high, (N,))
    assert x.dtype == torch.int64 and int(x.min()) >= low and int(x.max()) < high
    if high - low < 10:
        counts = torch.bincount(x - low, minlength=high - low)
        assert len(counts) == high - low
        assert ((counts - N / len(counts)).abs() <= 4 * math.sqrt(N / len(counts))).all()
    else:
        assert distance((x.double() - low) / (high - low), lambda v: v) < 2.2


def test_integers_of_a_dtype() -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        x = gemskit.random_(torch.empty(N, dtype=dtype)).double()
        most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        assert 0 <= x.min() and x.max() <= most and abs(x.mean() / most - 0.5) < 0.02
    whole = gemskit.random_(torch.empty(N, dtype=torch.int64), -(2**63), None)
    assert abs(float((whole < 0).double().mean()) - 0.5) < 0.02
    assert gemskit.random_(torch.empty(N)).max() <= 2**24
    assert set(gemskit.random_(torch.empty(N, dtype=torch.float16), 5, 8).tolist()) == {5.0, 6.0, 7.0}
    assert set(gemskit.randint(3, (99,), dtype=torch.float32).tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("name", DRAWS)
def test_values_follow_seed_and_index(name: str) -> None:
    draw = DRAWS[name]
    first = draw(torch.empty(37, 41), generator=generator())
    assert torch.equal(first, draw(torch.empty(37, 41), generator=generator()))
    assert not torch.equal(first, draw(torch.empty(37, 41), generator=generator(8)))
    wide = torch.empty(37, 82)
    for other in (torch.empty(41, 37).mT, wide[:, ::2], torch.empty(37 * 41 + 1)[1:].view(37, 41)):
        assert torch.equal(draw(other, generator=generator()), first)
    assert torch.equal(draw(torch.empty(37 * 41), generator=generator()), first.flatten())
    # A longer tensor begins with the same values.
    assert torch.equal(draw(torch.empty(9999), generator=generator())[: 37 * 41], first.flatten())
    torch.manual_seed(5)
    one, two = draw(torch.empty(99)), draw(torch.empty(99))
    torch.manual_seed(5)
    assert torch.equal(draw(torch.empty(99)), one) and not torch.equal(one, two)
    state = torch.get_rng_state()
    draw(torch.empty(99), generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(torch.empty(0, 3)).shape == (0, 3) and draw(torch.empty(())).shape == ()


@pytest.mark.parametrize("name", ["uniform", "normal", "exponential"])
def test_wide_values_follow_seed_and_index(name: str) -> None:
    draw = DRAWS[name]
    first = draw(torch.empty(9, 41, dtype=torch.float64), generator=generator())
    assert torch.equal(draw(torch.empty(41, 9, dtype=torch.float64).mT, generator=generator()), first)


def test_creation_forms() -> None:
    for make, like, kernel in (
        (gemskit.rand, gemskit.rand_like, "uniform"),
        (gemskit.randn, gemskit.randn_like, "normal"),
    ):
        with gemskit.record() as calls:
            x = make(3, 5, generator=generator())
        assert [c.kernel for c in calls] == [f"_{kernel}"]
        assert torch.equal(make((3, 5), generator=generator()), x)
        out = torch.empty(0)
        assert make(3, 5, generator=generator(), out=out) is out and torch.equal(out, x)
        y = like(x.mT.to(torch.bfloat16), generator=generator(), requires_grad=True)
        assert y.dtype == torch.bfloat16 and y.stride() == (1, 5) and y.requires_grad and y.is_leaf
        assert like(x, dtype=torch.float64).dtype == torch.float64


def test_normal_forms() -> None:
    mean, std = torch.arange(3.0), torch.tensor([[0.0], [2.0]])
    z = gemskit.normal(torch.zeros(2, 3), generator=generator())
    assert torch.equal(z, gemskit.normal(0, 1, (2, 3), generator=generator()))
    for m, s in ((mean, std), (mean.expand(2, 3), 2.0), (1.5, std.expand(2, 3))):
        got = gemskit.normal(m, s, generator=generator())
        torch.testing.assert_close(got, m + s * z)
        out = torch.empty(0)
        assert gemskit.normal(m, s, generator=generator(), out=out) is out and torch.equal(out, got)
    leaf = mean.clone().requires_grad_()
    gemskit.normal(leaf, 1.0).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(3))  # type: ignore[arg-type]


def test_bernoulli_forms() -> None:
    p = torch.tensor([0.0, 1.0, 0.5]).repeat(2000, 1)
    got = gemskit.bernoulli(p)
    assert got.dtype == p.dtype
    assert (got[:, 0] == 0).all() and (got[:, 1] == 1).all() and 0.45 < float(got[:, 2].mean()) < 0.55
    for dtype in (torch.bool, torch.int32, torch.bfloat16, torch.float64):
        x = gemskit.bernoulli_(torch.empty(2000, 3, dtype=dtype), p[0].double(), generator=generator())
        assert x.dtype == dtype and (x[:, 1] == 1).all() and not x[:, 0].any()
    out = torch.empty(0)
    assert gemskit.bernoulli(p, out=out) is out and out.shape == p.shape
    assert 0.05 < float(gemskit.bernoulli(p, 0.1).mean()) < 0.15
    assert (gemskit.bernoulli(torch.ones(999), 0.0) == 0).all() and (gemskit.bernoulli(torch.ones(999), 1.0) == 1).all()
    leaf = p.clone().requires_grad_()
    gemskit.bernoulli(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(p))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DRAWS)
def test_gradient_is_zero(name: str) -> None:
    leaf = torch.ones(5, 3, requires_grad=True)
    DRAWS[name](leaf * 2).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(5, 3))  # type: ignore[arg-type]
    with torch.no_grad():
        assert DRAWS[name](leaf) is leaf


def test_refusals() -> None:
    x = torch.empty(3)
    for call in (
        lambda: gemskit.uniform_(x, 2, 1), lambda: gemskit.normal_(x, 0, -1), lambda: gemskit.exponential_(x, 0),
        lambda: gemskit.bernoulli_(x, 1.5), lambda: gemskit.random_(x, 0), lambda: gemskit.randint(5, 5, (3,)),
        lambda: gemskit.random_(x.to(torch.int8), 200), lambda: gemskit.normal(0.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            call()
    for draw in (gemskit.uniform_, gemskit.normal_, gemskit.exponential_, gemskit.bernoulli):
        with pytest.raises(DtypeError):
            draw(torch.arange(3))


def test_cpu_tensors_get_torchs_values() -> None:
    from gemskit._interpret import _scope

    token = _scope.set(None)
    try:
        for mine, torchs in (
            (gemskit.rand, torch.rand), (gemskit.randn, torch.randn),
            (lambda n: gemskit.randint(9, (n,)), lambda n: torch.randint(9, (n,))),
            (lambda n: gemskit.bernoulli(torch.full((n,), 0.5)), lambda n: torch.bernoulli(torch.full((n,), 0.5))),
            (lambda n: gemskit.normal(torch.zeros(n), 2.0), lambda n: torch.normal(torch.zeros(n), 2.0)),
            (lambda n: gemskit.exponential_(torch.empty(n)), lambda n: torch.empty(n).exponential_()),
            (lambda n: gemskit.random_(torch.empty(n)), lambda n: torch.empty(n).random_()),
        ):  # fmt: skip
            torch.manual_seed(3)
            got = mine(50)
            torch.manual_seed(3)
            assert torch.equal(got, torchs(50))
    finally:
        _scope.reset(token)


def test_compiled() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = gemskit.rand(99) + gemskit.randn_like(x)
        return y, gemskit.randint(9, (5,)), gemskit.bernoulli(torch.full((99,), 0.5)), gemskit.exponential_(x.clone())

    run = torch.compile(fn, fullgraph=True, backend="aot_eager")
    first, second = run(torch.ones(99)), run(torch.ones(99))
    assert all(not torch.equal(a, b) for a, b in zip(first, second))
    assert 0 <= int(first[1].min()) and int(first[1].max()) < 9


def test_dropout_gradient_has_the_mask_of_the_forward_pass() -> None:
    op, seed = REGISTRY["_dropout"], torch.tensor(12345)
    for x in (torch.ones(30, 50), torch.ones(50, 30).mT, torch.ones(1, 50).expand(30, 50)):
        leaf = x.clone().requires_grad_()
        out = op(x.detach() * leaf, 0.4, seed)
        out.backward(torch.ones(1, 1).expand(30, 50))
        assert torch.equal(leaf.grad, out.detach()) and torch.equal(out, op(torch.ones(30, 50), 0.4, seed))  # type: ignore[arg-type]
        assert 0.35 < float((out == 0).float().mean()) < 0.45
