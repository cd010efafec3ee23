"""Reductions and scans where a walk over the registry does not reach: long rows, splits, dims, ties, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from gemskit import _launch, backends, language, reduce
from gemskit._interpret import interpret
from gemskit.errors import DimError, DtypeError, GemskitError, NoKernel
from gemskit.reduce._scan import Scan

inf, nan = float("inf"), float("nan")
LENGTHS = (1, 3, 17, 33, 4096, 65537)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with interpret():
        yield


def close(got: Tensor, exact: Tensor, units: float = 4) -> None:
    """``got`` within ``units`` of its dtype, relative to the largest element."""
    assert got.shape == exact.shape
    error = (got.double() - exact.double()).abs().max().item()
    assert error <= units * torch.finfo(got.dtype).eps * max(exact.abs().max().item(), 1e-30), error


@pytest.mark.parametrize("n", LENGTHS)
def test_row_lengths(n: int) -> None:
    for x in (torch.randn(2, n), torch.randn(n, 2).T):
        exact = x.double()
        close(reduce.sum(x, 1), exact.sum(1), 30)
        close(reduce.mean(x, 1), exact.mean(1), 30)
        assert torch.equal(reduce.amax(x, 1), x.amax(1))
        assert torch.equal(reduce.argmax(x, 1), x.argmax(1))
        if n > 1:
            close(reduce.var(x, 1), exact.var(1), 8)
        close(reduce.cumsum(x, 1), exact.cumsum(1), 16)


def test_one_row_of_a_million_is_split_and_exact() -> None:
    n = 1_048_577
    x = torch.randint(-9, 10, (1, n)).float()
    x[0, -1] = 100.0
    before = _launch.launches()["cumsum"]
    assert torch.equal(reduce.cumsum(x, 1), x.double().cumsum(1).float())
    assert _launch.launches()["cumsum"] == before + 2, "totals, their scan, and the pieces"
    assert reduce.amax(x).item() == 100 and reduce.argmax(x).item() == n - 1
    assert reduce.sum(x).item() == x.double().sum().item()


def test_many_short_rows() -> None:
    x = torch.randint(-9, 10, (70_001, 3)).float()
    assert torch.equal(reduce.sum(x, 1), x.sum(1))
    assert torch.equal(reduce.argmax(x, 1), x.argmax(1))
    assert torch.equal(reduce.cumsum(x, 1), x.cumsum(1))
    assert torch.equal(reduce.cumsum(x, 0), x.cumsum(0))


@pytest.mark.parametrize("dim", [None, 0, -1, (0, 2), [-1, 1], (), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_dims_of_permuted_inputs(dim: Any, order: tuple[int, ...]) -> None:
    x = torch.randint(-9, 10, (3, 5, 7)).float().permute(order)
    for keepdim in (False, True):
        assert torch.equal(reduce.sum(x, dim, keepdim), torch.sum(x, dim, keepdim))
        if dim is not None:
            assert torch.equal(reduce.amax(x, dim, keepdim), torch.amax(x, dim, keepdim))
        if dim is None or isinstance(dim, int):
            assert torch.equal(reduce.argmax(x, dim, keepdim), torch.argmax(x, dim, keepdim))
    assert reduce.sum(x, dim).is_contiguous()


def test_expanded_dims_are_not_copied() -> None:
    x = torch.randn(1, 6, 1).expand(5, 6, 4000)
    close(reduce.sum(x, (0, 2)), x.double().sum((0, 2)), 16)
    assert torch.equal(reduce.amax(x, 2), x.amax(2))


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_nan_and_infinities_win_anywhere(where: int) -> None:
    x = torch.randn(2, 9001)
    x[0, where], x[1, where] = nan, inf
    for name in ("amax", "amin", "argmax", "argmin", "sum", "mean", "var"):
        got, want = getattr(reduce, name)(x, 1), getattr(torch, name)(x, 1)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)
    values, indices = reduce.max(x, 1)
    torch.testing.assert_close((values, indices), tuple(torch.max(x, 1)), equal_nan=True)
    running = reduce.cumsum(x, 1)
    assert torch.equal(running.isnan(), x.cumsum(1).isnan()) and torch.equal(running.isinf(), x.cumsum(1).isinf())


def test_ties_nans_and_rows_of_infinity_give_the_first_index() -> None:
    x = torch.tensor([[1.0, 3, 3, 2], [nan, 3, nan, 4], [-inf] * 4, [inf] * 4])
    assert reduce.argmax(x, 1).tolist() == [1, 0, 0, 0]
    assert reduce.argmin(x, 1).tolist() == [0, 0, 0, 0]
    assert reduce.max(x, 1).indices.tolist() == torch.max(x, 1).indices.tolist()
    assert reduce.min(x, 1).indices.tolist() == torch.min(x, 1).indices.tolist()
    long = torch.zeros(1, 20_000)
    assert reduce.argmax(long).item() == 0 and reduce.argmin(long, 1).item() == 0


def test_ints_and_bools() -> None:
    x = torch.full((3, 5000), 2**62)
    assert torch.equal(reduce.sum(x, 1), x.sum(1)) and torch.equal(reduce.cumsum(x, 1), x.cumsum(1)), "wraps around"
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        x = torch.randint(0, 120, (4, 300)).to(dtype)
        for name in ("sum", "cumsum", "amax", "argmax", "argmin"):
            got, want = getattr(reduce, name)(x, 1), getattr(torch, name)(x, 1)
            assert torch.equal(got, want) and got.dtype == want.dtype
    for b in (torch.rand(4, 300) > 0.99, torch.zeros(4, 300).bool()):
        for name in ("sum", "cumsum", "amax", "amin"):
            got, want = getattr(reduce, name)(b, 1), getattr(torch, name)(b, 1)
            assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int64, torch.bool], ids=str)
def test_dtype_converts_the_input_first(dtype: torch.dtype) -> None:
    for x in (
        torch.tensor([0.6, 1.7, -2.2, 2049.0]),
        torch.tensor([300, 70000, 5, 2**24 + 1]),
        torch.tensor([0.25, 0.5]),
    ):
        assert torch.equal(reduce.sum(x, dtype=dtype), torch.sum(x, dtype=dtype))
        if dtype.is_floating_point:
            torch.testing.assert_close(reduce.mean(x, dtype=dtype), torch.mean(x, dtype=dtype))
        if dtype != torch.bool:
            assert torch.equal(reduce.cumsum(x, 0, dtype=dtype), torch.cumsum(x, 0, dtype=dtype))


def test_halves_accumulate_in_float32() -> None:
    x = torch.ones(1, 4099, dtype=torch.float16)
    assert reduce.sum(x).item() == 4100 and reduce.sum(x, dtype=torch.float32).item() == 4099
    assert reduce.cumsum(x, 1)[0, -1].item() == 4100
    assert reduce.mean(torch.full((1000,), 1000.0, dtype=torch.float16)).item() == 1000, "the sum overflows a half"


def test_nothing_to_reduce() -> None:
    x = torch.empty(2, 0, 3)
    assert (
        torch.equal(reduce.sum(x, 1), torch.zeros(2, 3)) and reduce.mean(x, 1).isnan().all() and reduce.var(x).isnan()
    )
    assert (
        reduce.sum(x, 0).shape == (0, 3) and reduce.amax(x, 2).shape == (2, 0) and reduce.cumsum(x, 1).shape == x.shape
    )
    assert reduce.max(x, 0).indices.shape == (0, 3)
    nothing: list[Callable[[], Any]] = [
        lambda: reduce.amax(x, 1), lambda: reduce.amin(x), lambda: reduce.argmax(x, 1), lambda: reduce.argmax(x),
        lambda: reduce.max(x, 1), lambda: reduce.max(x), lambda: reduce.min(x),
    ]  # fmt: skip
    for call in nothing:
        with pytest.raises(GemskitError):
            call()


def test_wrong_dims_and_dtypes() -> None:
    x = torch.randn(3, 4)
    for name in ("sum", "mean", "amax", "argmax", "cumsum", "max", "var"):
        with pytest.raises(DimError, match=name):
            getattr(reduce, name)(x, 2)
    for name in ("sum", "mean", "amax", "var"):
        with pytest.raises(DimError, match=name):
            getattr(reduce, name)(x, (1, -1))
    with pytest.raises(DtypeError, match="mean"):
        reduce.mean(torch.ones(3, dtype=torch.int64))
    with pytest.raises(NoKernel, match="var"):
        reduce.var(torch.ones(3, dtype=torch.int64))
    with pytest.raises(NoKernel, match="argmax"):
        reduce.argmax(torch.ones(3, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("correction", [None, 0, 1, 2.5, 40, 41.0, False, True])
def test_var_corrections(correction: float | None) -> None:
    x = torch.randn(3, 40)
    torch.testing.assert_close(reduce.var(x, 1, correction=correction), torch.var(x, 1, correction=correction))
    same = torch.ones(2, 40)
    torch.testing.assert_close(
        reduce.var(same, 1, correction=correction), torch.var(same, 1, correction=correction), equal_nan=True
    )


@pytest.mark.parametrize("n", [33, 4097, 65537])
def test_var_far_from_zero(n: int) -> None:
    x = torch.randn(3, n) + 1e4
    exact = x.double().var(1)
    # What torch does on accelerators: merge float32 means.
    mean, m2 = x[:, 0].clone(), torch.zeros(3)
    for k in range(1, min(n, 4097)):
        delta = x[:, k] - mean
        mean += delta / (k + 1)
        m2 += delta * (x[:, k] - mean)
    sequential = (m2 / (min(n, 4097) - 1)).double()
    torchs = (sequential - x[:, : min(n, 4097)].double().var(1)).abs().max().item()
    assert (reduce.var(x, 1) - exact).abs().max().item() <= max(1.5 * torchs, 4e-7)


@pytest.mark.parametrize("shape", [(3, 1000), (1, 9000), (2, 5, 40)], ids=str)
def test_gradients_as_float64(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[..., 3] = x[..., 5] = 4.0
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("sum", (), {}), ("sum", (1, True), {}), ("mean", ((0, 1),), {}), ("amax", (1,), {}), ("amin", (), {}),
        ("max", (), {}), ("max", (1,), {}), ("min", (-1, True), {}), ("var", (), {}),
        ("var", ((0, 1),), {"correction": 0}),
        ("cumsum", (1,), {}),
    ]  # fmt: skip
    for name, args, kwargs in calls:
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        y, z = getattr(reduce, name)(a, *args, **kwargs), getattr(torch, name)(b, *args, **kwargs)
        y, z = (y[0], z[0]) if isinstance(z, tuple) else (y, z)
        g = torch.randn(y.shape[-1:] if y.ndim else ()).expand(y.shape)
        y.backward(g)
        z.backward(g.double())
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


def test_gradient_of_nan_and_of_dtype() -> None:
    for name, args in (("amax", (1,)), ("max", ()), ("min", ()), ("max", (1,))):
        grads = []
        for module in (reduce, torch):
            x = torch.tensor([[1.0, nan, 3, nan]], requires_grad=True)
            y = getattr(module, name)(x, *args)
            (y[0] if isinstance(y, tuple) else y).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, equal_nan=True)
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    reduce.mean(x, 1, dtype=torch.float64).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.equal(x.grad, torch.full((4, 5), 0.2, dtype=torch.bfloat16))
    x.grad = None
    reduce.cumsum(x, 1, dtype=torch.float32).sum().backward()
    assert x.grad[0].tolist() == [5, 4, 3, 2, 1]


def test_out_and_inplace() -> None:
    x = torch.randint(0, 9, (4, 9)).float()
    out = torch.full((9, 8), nan)[:, ::2].T
    assert reduce.cumsum(x, 1, out=out) is out and torch.equal(out, x.cumsum(1))
    values, indices = torch.empty(0), torch.empty(0, dtype=torch.int64)
    found = reduce.max(x, 1, out=(values, indices))
    assert found.values is values and torch.equal(indices, x.max(1).indices)
    assert torch.equal(reduce.sum(x, 0, out=torch.empty(9, dtype=torch.float64)), x.sum(0).double())
    for y in (x.clone(), x.to(torch.int32), torch.randint(0, 9, (1, 30_000)).float()):
        want = y.clone().cumsum_(1)
        assert reduce.cumsum_(y, 1) is y and torch.equal(y, want)


def test_max_has_three_forms() -> None:
    x, y = torch.randn(3, 4), torch.randn(4)
    assert torch.equal(reduce.max(x), x.max()) and isinstance(reduce.max(x, 1), torch.return_types.max)
    assert torch.equal(reduce.max(x, dim=0, keepdim=True).values, x.max(0, True).values)
    assert torch.equal(reduce.max(x, y), torch.maximum(x, y))
    assert torch.equal(reduce.min(x, other=y), torch.minimum(x, y))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 50), (1, 20_001), (5000, 40)], ids=str)
def test_a_scan_of_pairs(shape: tuple[int, int], reverse: bool) -> None:
    """Any monoid: the running maximum and where it was first seen."""
    scan = Scan(
        "running_max", map=_pair, combine=language.better_max, identity=("lowest", "highest"),
        state=("compute", "index"), reverse=reverse,
    )  # fmt: skip
    x = torch.randperm(shape[0] * shape[1]).view(shape).float()
    for dim in (0, 1):
        outs = [torch.empty(shape), torch.empty(shape, dtype=torch.int64)]
        scan({"input": x}, outs, shape, dim, torch.float32)
        values, indices = torch.cummax(x.flip(dim) if reverse else x, dim)
        if reverse:
            values, indices = values.flip(dim), shape[dim] - 1 - indices.flip(dim)
        assert torch.equal(outs[0], values) and torch.equal(outs[1], indices)


@triton.jit
def _pair(input, col):
    return input, col


@triton.jit
def _alone(input):
    return input


def test_every_launch_fits_the_grid_and_int64_is_used_where_needed() -> None:
    seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    with _launch.capturing(lambda kernel, grid, args, meta: seen.append((grid, meta))), backends.use_arch("sm_90"):
        for shape in ((2, 2**32), (2**16, 2**20)):
            x = torch.ones(()).expand(shape)
            reduce.sum(x, 1)
            reduce.argmax(x, 1)
            running = Scan("wide", map=_alone, combine=language.add, identity=(0,))
            running({"input": x}, [x], shape, 1, torch.float32)
    assert seen and all(len(grid) == 1 and grid[0] < 2**31 and meta["WIDE"] for grid, meta in seen)
