"""Truths, products, norms, moments and scans where a walk over the registry does not reach: forms, order, splits, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from gemskit import _launch, nn, reduce
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit.errors import ArgumentError, DimError, DtypeError, GemskitError, NoKernel
from gemskit.reduce._scan import Scan

inf, nan = float("inf"), float("nan")
#: Longer than a tile, and cut into pieces where there are few rows.
LONG = 20_001


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with interpret():
        yield


def as_torch(ours: Any, torchs: Any, *args: Any, **kwargs: Any) -> None:
    got, want = ours(*args, **kwargs), torchs(*args, **kwargs)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-5, atol=1e-6)


# -- the order of a scan --------------------------------------------------------------------------------------------------


@triton.jit
def _affine(input):
    return 3 * input + 1, input


@triton.jit
def _composed(a, b, c, d):
    # First x -> a * x + b, then x -> c * x + d.
    return c * a, c * b + d


@triton.jit
def _second(state1, input):
    return state1 - input


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 50), (1, LONG), (2, 9000)], ids=str)
def test_a_scan_keeps_the_order(shape: tuple[int, int], reverse: bool) -> None:
    scan = Scan(
        "affine", map=_affine, combine=_composed, identity=(1, 0), finish=_second,
        state=("accumulate", "accumulate"), reverse=reverse, commutes=False,
    )  # fmt: skip
    x = torch.randint(-9, 10, shape)
    # Wraps around, as int64 does.
    want = torch.empty_like(x)
    for r in range(shape[0]):
        value, row = 0, x[r].tolist()
        for c in reversed(range(shape[1])) if reverse else range(shape[1]):
            value = ((3 * row[c] + 1) * value + row[c] + 2**63) % 2**64 - 2**63
            want[r, c] = (value - row[c] + 2**63) % 2**64 - 2**63
    for y, dim in ((x, 1), (x.T.contiguous(), 0)):
        out = torch.empty_like(y)
        scan({"input": y}, [out], tuple(y.shape), dim, torch.int64)
        assert torch.equal(out, want if dim else want.T)


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_running_extrema_of_long_rows(name: str) -> None:
    ours, torchs = getattr(reduce, name), getattr(torch, name)
    for x in (torch.randint(-99, 99, (1, LONG)).float(), torch.randint(0, 3, (LONG, 2)), torch.rand(2, 9000) > 0.5):
        dim = 1 if x.shape[0] < 3 else 0
        got, want = ours(x, dim), torchs(x, dim)
        assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)
    x = torch.randn(1, LONG)
    x[0, 9000], x[0, 15000] = nan, nan
    got, want = ours(x, 1), torchs(x, 1)
    torch.testing.assert_close(tuple(got), tuple(want), equal_nan=True)
    x = torch.full((1, 9000), -0.0)
    assert ours(x, 1).values.signbit().all() and ours(x, 1).indices[0].tolist() == list(range(9000))


@pytest.mark.parametrize("name", ["cummax", "cummin", "cumprod", "logcumsumexp", "normed_cumsum"])
@pytest.mark.parametrize("shape", [(1, 9000), (9000, 1), (2, 70)], ids=str)
def test_gradients_of_long_scans(name: str, shape: tuple[int, int]) -> None:
    x = torch.randint(1, 40, shape).double() / 20
    if name == "cumprod":
        x = 1 + (x - 1) / 50
        x.view(-1)[41] = 0
    dim = 1 if shape[0] < 3 else 0
    grads = []
    ours = getattr(reduce, name)
    for fn in (ours, getattr(torch, name, getattr(ours, "meaning", None))):
        y = x.clone().requires_grad_()
        out = fn(y, dim)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view(shape))
        grads.append(y.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_long_scans() -> None:
    x = torch.rand(1, LONG, dtype=torch.float64)
    for name in ("logcumsumexp", "cumsum"):
        as_torch(getattr(reduce, name), getattr(torch, name), x, 1)
    as_torch(reduce.cumprod, torch.cumprod, 1 + (x - 0.5) / 100, 1)
    y = torch.randint(-9, 9, (1, LONG))
    assert torch.equal(reduce.cumprod(y, 1), torch.cumprod(y, 1)), "wraps around"
    got = reduce.normed_cumsum(x.float(), 1)
    assert got[0, -1] == 1 and (got.diff() >= 0).all()
    z = x.clone()
    assert reduce.cumprod_(z, 1) is z and torch.equal(z, reduce.cumprod(x, 1))
    out = torch.empty(0), torch.empty(0, dtype=torch.int64)
    found = reduce.cummax(x.float(), 1, out=out)
    assert found[0] is out[0] and torch.equal(out[1], x.float().cummax(1).indices)


def test_rows_are_read_once_unless_few() -> None:
    before = _launch.launches()
    reduce.cumsum(torch.ones(300, 4100), 1)
    assert (_launch.launches() - before) == {"cumsum": 1}
    before = _launch.launches()
    reduce.cumsum(torch.ones(LONG), 0)
    assert (_launch.launches() - before) == {"cumsum": 2, "cumsum_join": 1}


# -- truths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64], ids=str)
def test_all_and_any(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 2], [3, 1, 1]]).to(dtype)
    for name in ("all", "any"):
        ours, torchs = getattr(reduce, name), getattr(torch, name)
        for args in ((), (None,), (1,), (-2, True), ((0, 1),), ((),), ([1],), (None, True)):
            got, want = ours(x, *args), torchs(x, *args)
            assert torch.equal(got, want) and got.dtype == want.dtype, (name, args)
        assert torch.equal(ours(torch.tensor([nan, 0.0]), 0), torchs(torch.tensor([nan, 0.0]), 0))
    out = torch.empty(2, dtype=torch.uint8 if dtype == torch.uint8 else torch.bool)
    assert reduce.all(x, 1, out=out) is out and out.tolist() == [False, True]


def test_counts_are_exact_beyond_float() -> None:
    x = torch.ones(1, dtype=torch.float16).expand(5, 70_000)
    assert reduce.count_nonzero(x).item() == 350_000 and reduce.count_nonzero(x, 1).dtype == torch.int64
    assert reduce.vector_norm(x.float(), 0).item() == 350_000


def test_equal_and_allclose() -> None:
    x = torch.randn(3, 5000)
    y = x.clone()
    y[2, 4000] += 1
    for a, b in ((x, x), (x, y), (x, x.double()), (x, x[:, :1]), (torch.full((3,), nan),) * 2, (x[:0], x[:0])):
        assert reduce.equal(a, b) is torch.equal(a, b)
    before = _launch.launches().total()
    assert reduce.allclose(x[:, :50], x[:, :50]) is True and _launch.launches().total() == before + 1
    close = torch.tensor([1.0, inf, -inf, 3.0])
    for other, options in (
        (close * (1 + 1e-6), {}), (close * (1 + 1e-3), {}), (close + 1, {"atol": 1.0}), (-close, {}),
        (close[:1].expand(4), {"rtol": 5.0}), (torch.tensor(1.0), {}),
    ):  # fmt: skip
        assert reduce.allclose(close, other, **options) is torch.allclose(close, other, **options), options
    hole = torch.tensor([nan, 1.0])
    assert not reduce.allclose(hole, hole) and reduce.allclose(hole, hole, equal_nan=True)
    ints = torch.arange(5)
    assert reduce.allclose(ints, ints + 1, atol=1.0) and not reduce.allclose(ints, ints + 1)
    assert not reduce.equal(torch.tensor([2**53]), torch.tensor([2**53 + 1]))
    for dtype in (torch.float16, torch.bfloat16):
        a = torch.randn(24).to(dtype)
        for rtol in (1e-3, 4e-3):
            for b in (a, (a * 1.004).to(dtype), (a * 1.001).to(dtype)):
                single = [reduce.allclose(p, q, rtol, 0.0) for p, q in zip(a.split(1), b.split(1))]
                assert single == [torch.allclose(p, q, rtol, 0.0) for p, q in zip(a.split(1), b.split(1))]
    with pytest.raises(ArgumentError, match="allclose"):
        reduce.allclose(x, x.double())
    with pytest.raises(ArgumentError, match="rtol"):
        reduce.allclose(x, x, rtol=-1.0)


# -- moments, norms, products ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
def test_moments_have_all_forms_of_torch(name: str) -> None:
    ours, torchs = getattr(reduce, name), getattr(torch, name)
    x = torch.randn(3, 7)
    forms: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}), ((False,), {}), ((True,), {}), ((1,), {}), ((1, False), {}), ((1, True, True), {}),
        (((0, 1), False), {}), ((), {"unbiased": False}), ((), {"dim": 0, "unbiased": False, "keepdim": True}),
        ((1,), {"correction": 0, "keepdim": True}), ((), {"correction": 2.5}), ((None,), {"keepdim": True}),
        ((None,), {"correction": None}), ((1,), {"correction": 7}), ((1,), {"correction": 9}),
    ]  # fmt: skip
    for args, kwargs in forms:
        as_torch(ours, torchs, x, *args, **kwargs)
    with pytest.raises(ArgumentError, match=name):
        ours(x, 1, unbiased=True, correction=1)
    with pytest.raises(ArgumentError, match=name):
        ours(x, True, False)
    with pytest.raises(DimError, match=name):
        ours(x, 2)
    with pytest.raises(GemskitError, match=name):
        ours(x.int())
    if "mean" not in name:
        out = torch.empty(3)
        assert ours(x, 1, out=out) is out
        torch.testing.assert_close(out, torchs(x, 1))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
def test_gradients_of_moments_at_the_edge(name: str) -> None:
    for x, args, kwargs in (
        (torch.ones(2, 5), (1,), {}), (torch.randn(3, 1), (1,), {}), (torch.randn(1), (), {}),
        (torch.randn(2, 3), (1,), {"correction": 4}), (torch.ones(2, 2), (), {"correction": 5}),
    ):  # fmt: skip
        grads = []
        for module in (reduce, torch):
            y = x.clone().requires_grad_()
            found = getattr(module, name)(y, *args, **kwargs)
            total = sum(f.sum() for f in found) if isinstance(found, tuple) else found.sum()
            total.backward()
            grads.append(y.grad)
        torch.testing.assert_close(grads[0], grads[1], equal_nan=True)


@pytest.mark.parametrize("ord", [2, 1, 0, inf, -inf, 3, 0.5, 1.5, -1, 2.0, 2.5], ids=str)
def test_vector_norms(ord: float) -> None:
    x = torch.tensor([[1.0, 0, -2, 2], [0, 0, 0, 0], [-0.5, 3, 3, 1]])
    for dim in (None, 1, (0, 1), [-1]):
        for keepdim in (False, True):
            as_torch(reduce.vector_norm, torch.linalg.vector_norm, x, ord, dim, keepdim)
    as_torch(reduce.vector_norm, torch.linalg.vector_norm, torch.randn(2, 9000), ord, 1)
    as_torch(reduce.vector_norm, torch.linalg.vector_norm, x.half(), ord, dtype=torch.float64)
    special = torch.tensor([[nan, 1, 2], [inf, 1, 2], [-inf, 0, inf]])
    as_torch(reduce.vector_norm, torch.linalg.vector_norm, special, ord, 1)
    if ord == 0:
        return
    grads = []
    for fn in (reduce.vector_norm, torch.linalg.vector_norm):
        y = x.clone().requires_grad_()
        fn(y, ord, 1).backward(torch.tensor([1.0, 2, -3]))
        grads.append(y.grad)
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True)


def test_norm_and_dist() -> None:
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(5)
    for args in ((), ("fro",), (None,), (1,), (2, 1), (inf, 0, True), ("fro", (0, 1))):
        as_torch(reduce.norm, torch.norm, x, *args)
    as_torch(reduce.norm, torch.norm, x, 1, 0, True, dtype=torch.float64)
    for p in (2, 1, 0, inf, 3.0):
        as_torch(reduce.dist, torch.dist, x, y, p)
    reduce.dist(x, y).backward()
    z = x.detach().clone().requires_grad_()
    torch.dist(z, y).backward()
    torch.testing.assert_close(x.grad, z.grad)
    with pytest.raises(ArgumentError, match="nuc"):
        reduce.norm(x, "nuc")
    with pytest.raises(GemskitError, match="vector_norm"):
        reduce.vector_norm(torch.ones(3, dtype=torch.int32))
    with pytest.raises(GemskitError, match="vector_norm"):
        reduce.vector_norm(torch.ones(3, 0), inf, 1)


def test_prod_of_dtypes_and_zeros() -> None:
    x = torch.randint(-9, 10, (3, 50))
    for args in ((), (1,), (0, True)):
        assert torch.equal(reduce.prod(x, *args), torch.prod(x, *args)), "wraps around"
    assert reduce.prod(x.float(), dtype=torch.int32).dtype == torch.int32
    assert reduce.prod(x > -9, 1).dtype == torch.int64
    y = torch.rand(4, 3000, dtype=torch.float64) / 50 + 0.99
    y[1, 7] = y[2, 5] = y[2, 2999] = 0
    for args in ((), (1,), (0, True)):
        grads = []
        for module in (reduce, torch):
            z = y.clone().requires_grad_()
            module.prod(z, *args).sum().backward()
            grads.append(z.grad)
        torch.testing.assert_close(*grads)


def test_sums_aside_of_nan_and_of_exponentials() -> None:
    x = torch.randn(3, 9000)
    x[0, 5], x[1] = nan, nan
    for name in ("nansum", "nanmean"):
        for args in ((), (1,), ((0, 1), True)):
            as_torch(getattr(reduce, name), getattr(torch, name), x, *args)
    assert reduce.nansum(torch.ones(3, dtype=torch.int32)).item() == 3
    y = torch.tensor([[-inf, -inf], [inf, 1], [nan, 1], [1000, 1000], [-inf, 2]])
    as_torch(reduce.logsumexp, torch.logsumexp, y, 1)
    as_torch(reduce.logcumsumexp, torch.logcumsumexp, y, 1)
    as_torch(reduce.logsumexp, torch.logsumexp, torch.arange(6).view(2, 3), 1)
    as_torch(reduce.logsumexp, torch.logsumexp, torch.ones(2, 0), 1)
    as_torch(reduce.logsumexp, torch.logsumexp, torch.randn(1, LONG) * 30, 1)
    as_torch(reduce.aminmax, torch.aminmax, torch.randn(1, LONG))
    out = torch.empty(3), torch.empty(3)
    assert reduce.aminmax(x, dim=1, out=out)[0] is out[0] and out[0].isnan()[:2].all()
    for call in (lambda: reduce.logcumsumexp(torch.arange(3), 0), lambda: reduce.trace(torch.ones(2, 2).bool())):
        with pytest.raises(DtypeError):
            call()


# -- softmax --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [70, LONG])
def test_kinds_of_softmax(n: int) -> None:
    x = torch.randn(4, n)
    x[1] = -inf
    x[2, ::2] = -inf
    as_torch(nn.safe_softmax, torch._safe_softmax, x, 1)
    assert nn.safe_softmax(x, 1)[1].eq(0).all()
    y, g = torch.randn(2, n), torch.randn(2, n)
    as_torch(nn.scaled_softmax_forward, lambda t, s: torch.softmax(t * s, -1), y, 3.0)
    p = torch.softmax(y * 3, -1)
    want = 3 * p * (g - (g * p).sum(-1, keepdim=True))
    torch.testing.assert_close(nn.scaled_softmax_backward(g, p, 3.0), want, rtol=1e-4, atol=1e-6)
    as_torch(nn.softmax_backward, torch._softmax_backward_data, g, p, 1, torch.float32)
    as_torch(nn.log_softmax_backward, torch._log_softmax_backward_data, g, p.log(), 1, torch.float32)
    half = nn.softmax_backward(g, p, 1, torch.float16)
    assert half.dtype == torch.float16
    with pytest.raises(DtypeError, match="scaled_softmax_forward"):
        nn.scaled_softmax_forward(torch.ones(2, dtype=torch.int64), 1.0)


@pytest.mark.parametrize(
    "name", ["sum", "prod", "amax", "argmax", "cumsum", "cummax", "all", "vector_norm", "logsumexp"]
)
def test_complex_is_refused_by_name(name: str) -> None:
    z = torch.ones(2, 3, dtype=torch.complex64)
    with pytest.raises(GemskitError, match=name):
        getattr(reduce, name)(z, **({"dim": 1} if name.startswith(("cum", "log")) else {}))


def test_bools_are_not_ranked() -> None:
    for name in ("argmax", "argmin"):
        with pytest.raises(NoKernel, match=name):
            getattr(reduce, name)(torch.ones(3, dtype=torch.bool))
    x = torch.randn(3, 4)
    out = torch.empty(3, dtype=torch.int64)
    assert reduce.argmax(x, 1, out=out) is out and torch.equal(out, x.argmax(1))
    assert math.isnan(reduce.nanmean(torch.full((3,), nan)).item())


@pytest.mark.parametrize("name", [n for n, op in REGISTRY.items() if op.named is not None and op.has_out])
def test_results_are_named_with_out_too(name: str) -> None:
    op, x = REGISTRY[name], torch.randn(4, 6)
    more = (2,) if name in ("topk", "kthvalue") else ()
    fresh = op(x, *more, dim=1)
    outs = tuple(torch.empty_like(t) for t in fresh)
    found = op(x, *more, dim=1, out=outs)
    assert type(fresh) is type(found) is op.named and all(f is o for f, o in zip(found, outs))
    assert all(torch.equal(f, g) for f, g in zip(fresh, found))
