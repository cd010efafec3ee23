"""Selection, search and counting where a walk over the registry does not reach: errors, draws, pieces, ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import gemskit
from gemskit import backends
from gemskit._interpret import interpret
from gemskit._launch import record
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError
from gemskit.reduce import _radix, _sort, selection

inf, nan = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with interpret():
        yield


@pytest.mark.parametrize("small", [0, selection.SMALL])
def test_positions_come_in_order_over_many_pieces(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SMALL", small)
    mask = torch.rand(100_003) < 0.3
    assert torch.equal(gemskit.nonzero(mask), torch.nonzero(mask))
    wide = mask[:99_999].view(9, 11111).t()
    for got, want in zip(gemskit.nonzero(wide, as_tuple=True), torch.nonzero(wide, as_tuple=True)):
        assert torch.equal(got, want)
    assert torch.equal(gemskit.masked_select(wide, wide), wide[wide])
    # The last flag of a word is its sign.
    for n in (31, 32, 33, 64):
        every = torch.ones(n, dtype=torch.bool)
        assert torch.equal(gemskit.nonzero(every)[:, 0], torch.arange(n))
        assert gemskit.nonzero(~every).shape == (0, 1)
    values = torch.randn(4, 33, requires_grad=True)
    chosen = torch.rand(4, 33) < 0.5
    gemskit.masked_select(values, chosen).sum().backward()
    assert torch.equal(values.grad, chosen.float())


def test_masks_are_bool_and_broadcast() -> None:
    with pytest.raises(DtypeError, match="masked_select: mask"):
        gemskit.masked_select(torch.ones(3), torch.ones(3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="masked_select"):
        gemskit.masked_select(torch.ones(3), torch.ones(4, dtype=torch.bool))


def test_slices_are_not_compared() -> None:
    for op in (gemskit.unique, gemskit.unique_consecutive):
        with pytest.raises(NoKernel, match="dim=0"):
            op(torch.ones(3, 2), dim=0)


def test_nan_is_found_at_the_end() -> None:
    rows, x = torch.tensor([-inf, 1.0, 1.0, nan]), torch.tensor([nan, 1.0, -inf, inf])
    for right in (False, True):
        assert torch.equal(gemskit.searchsorted(rows, x, right=right), torch.searchsorted(rows, x, right=right))
    assert not gemskit.isin(x, torch.full((100,), nan)).any()
    assert gemskit.isin(x, torch.cat([rows, torch.full((100,), nan)])).tolist() == [False, True, True, False]


@pytest.fixture(params=[(4, 32, 512), (8, 64, 2048)])
def pivots(request: pytest.FixtureRequest) -> Iterator[None]:
    """A device on which three programs search from pivots in shared memory, several tiles each."""
    row = backends.find_arch("sm_90")
    per, threads, size = request.param
    numbers = {"programs": 3, "fewest": 1, "per": per, "threads": threads, "bytes": size}
    numbers = {**row.config("search"), **numbers}
    with backends.use_arch(dataclasses.replace(row, launch={**row.launch, "search": numbers})):
        yield


@pytest.mark.parametrize("n", [1, 31, 64, 100, 128, 129, 1024, 5000])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.uint8], ids=str
)
def test_searches_from_pivots_in_shared_memory(dtype: torch.dtype, n: int, pivots: None) -> None:
    """Rows shorter and longer than the pivots; the largest values, which those have that are behind a row; NaNs, which torch
    sees or does not, by where it halves."""
    seq, x = torch.randn(n) * 40, torch.randn(30, 31) * 50
    if dtype.is_floating_point:
        x[0, :6] = torch.tensor([nan, inf, -inf, 0.0, -0.0, nan])
        seq, x = seq.to(dtype), x.to(dtype)
    else:
        info = torch.iinfo(dtype)
        seq, x = (v.clamp(max(info.min, -100), min(info.max, 100)).to(dtype) for v in (seq, x))
        x[0, 0], x[0, 1], seq[: n % 2] = info.min, info.max, info.max
    x[1, :20] = seq[: x[1, :20].numel()].repeat(20)[:20]
    compared = min(64, 112 // max(dtype.itemsize, 4 if dtype.is_floating_point else 1))
    for nans in (0, 1, n // 3, n) if dtype.is_floating_point else (0,):
        row = seq.clone()
        row[:nans] = nan if nans else 0
        row = row.sort().values
        for right, values in ((False, x), (True, x.t())):
            with record() as calls:
                got = gemskit.searchsorted(row, values, right=right, out_int32=right)
            assert [call.kernel for call in calls] == ["search_shared"]
            assert torch.equal(got, torch.searchsorted(row, values.contiguous(), right=right, out_int32=right))
            found = (values[..., None] == row).any(-1)
            with record() as calls:
                got = gemskit.isin(values, row[torch.randperm(n)], invert=right)
            assert (calls[-1].kernel == "search_shared") == (n > compared) and torch.equal(got, found ^ right)
    wide = torch.arange(-5, 5)
    assert torch.equal(gemskit.bucketize(wide, row[::2]), torch.bucketize(wide, row[::2].contiguous()))


def test_histc_of_ranges() -> None:
    x = torch.tensor([1.0, 5.0, nan])
    assert gemskit.histc(x, 3).isnan().all()
    assert torch.equal(gemskit.histc(x, 4, 1, 5), torch.histc(x, 4, 1, 5))
    ids = torch.randint(0, 8, (1000,))
    assert torch.equal(gemskit.histc(ids, 8, 0, 7), torch.bincount(ids, minlength=8))
    with pytest.raises(ArgumentError):
        gemskit.histc(x, 3, 5, 1)
    with pytest.raises(ArgumentError):
        gemskit.histc(x, 3, 0, inf)


@pytest.fixture
def shared() -> Iterator[None]:
    """A device on which three programs count in shared memory, several tiles each."""
    row = backends.find_arch("sm_90")
    numbers = {**row.config("histogram"), "shared": 3}
    with backends.use_arch(dataclasses.replace(row, launch={**row.launch, "histogram": numbers})):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("values", ["random", "equal", "two"])
def test_histograms_in_shared_memory(values: str, dtype: torch.dtype, shared: None) -> None:
    """The last tile is ragged, with elements outside and NaN; vectors, columns and every other element."""
    x = torch.rand(30_001) * 120 - 10
    x = (
        (x if values == "random" else (x > 50) * 7.0 if values == "two" else torch.full_like(x, 7))
        .clamp(min=0)
        .to(dtype)
    )
    if dtype.is_floating_point:
        x[::100], x[5], x[-1] = -3, nan, inf
    for t in (x, x[:24_576], x[:30_000].view(3, 10_000).t(), x[::2]):
        with gemskit.record() as calls:
            for bins in (100, 300, 2000):
                expected = torch.histc(t.double(), bins, 0, 100).to(dtype)
                if dtype.is_floating_point and dtype != torch.float64:
                    expected = torch.histc(t.float(), bins, 0, 100).to(dtype)
                assert torch.equal(gemskit.histc(t, bins, 0, 100), expected)
            if dtype == torch.int64 and t.ndim == 1:
                assert torch.equal(gemskit.bincount(t, minlength=500), torch.bincount(t, minlength=500))
        assert {call.kernel for call in calls} >= {"histogram_shared"}
        assert "histogram" not in {call.kernel for call in calls}


def test_more_bins_than_shared_memory_has(shared: None) -> None:
    x = torch.randint(0, 2050, (5000,))
    with gemskit.record() as calls:
        assert torch.equal(gemskit.bincount(x, minlength=2049), torch.bincount(x, minlength=2049))
        assert torch.equal(gemskit.bincount(x.clamp(max=2047)), torch.bincount(x.clamp(max=2047)))
    assert {"histogram", "histogram_shared"} <= {call.kernel for call in calls}


def test_bincount_refuses() -> None:
    with pytest.raises(ArgumentError, match="negative"):
        gemskit.bincount(torch.tensor([1, -1]))
    with pytest.raises(DtypeError):
        gemskit.bincount(torch.ones(3))
    with pytest.raises(ShapeError):
        gemskit.bincount(torch.tensor([1, 2]), torch.ones(3))


def test_draws_follow_the_weights_and_the_seed() -> None:
    weights = torch.tensor([0.0, 1, 2, 0, 5])
    torch.manual_seed(1)
    one = gemskit.multinomial(weights.expand(2000, 5), 1).view(-1)
    many = gemskit.multinomial(weights, 4000, True)
    for drawn in (one, many):
        share = torch.bincount(drawn, minlength=5) / len(drawn)
        assert (share - weights / 8).abs().max() < 0.04 and not share[[0, 3]].any()
    torch.manual_seed(1)
    assert torch.equal(one, gemskit.multinomial(weights.expand(2000, 5), 1).view(-1))
    three = gemskit.multinomial(weights.expand(50, 5), 3)
    assert torch.equal(three.sort(-1).values, torch.tensor([1, 2, 4]).expand(50, 3))
    with pytest.raises(ArgumentError, match="num_samples"):
        gemskit.multinomial(weights, 6)
    with pytest.raises(ShapeError):
        gemskit.multinomial(torch.ones(2, 2, 2), 1)


def test_permutations() -> None:
    generator = torch.Generator().manual_seed(3)
    a = gemskit.randperm(1000, generator=generator)
    b = gemskit.randperm(1000, generator=generator)
    assert torch.equal(a.sort().values, torch.arange(1000)) and not torch.equal(a, b)
    assert torch.equal(a, gemskit.randperm(1000, generator=generator.manual_seed(3)))
    assert gemskit.randperm(9, dtype=torch.int32).dtype == torch.int32 and gemskit.randperm(0).numel() == 0
    with pytest.raises(ArgumentError):
        gemskit.randperm(-1)


def test_medians() -> None:
    x = torch.tensor([[3.0, nan, 1.0, nan], [4.0, 2.0, 1.0, 3.0]])
    values, indices = gemskit.median(x, 1)
    assert torch.equal(indices, torch.tensor([1, 1])) and values[0].isnan() and values[1] == 2
    values, indices = gemskit.nanmedian(x, 1)
    assert torch.equal(values, torch.tensor([1.0, 2.0])) and torch.equal(indices, torch.tensor([2, 1]))
    assert gemskit.median(x).isnan() and gemskit.nanmedian(x) == torch.nanmedian(x)
    with pytest.raises(ArgumentError):
        gemskit.kthvalue(x, 5, 1)
    with pytest.raises(ArgumentError):
        gemskit.quantile(x, 1.5)


@pytest.mark.parametrize(("low", "high"), [(0, 300), (-300, -1), (-5, 70000), (2**40, 2**40 + 7), (9, 10)])
def test_unique_sorts_by_the_bits_that_differ(low: int, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_MANY", 1)
    monkeypatch.setattr(_sort, "SHORT", {16: 0, 32: 0, 64: 0})
    monkeypatch.setattr(_radix, "TILE", 128)
    x = torch.randint(low, high, (400,), generator=torch.Generator().manual_seed(4))
    for more in ({}, {"return_inverse": True, "return_counts": True}):
        found = gemskit.unique(x, **more)
        expected = torch.unique(x, **more)
        for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (found, expected))):
            assert torch.equal(a, b)
