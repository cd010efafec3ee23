"""Operators with index tensors: what the walks over the registry do not see."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _launch
from gemskit.errors import ArgumentError, DimError, DtypeError, GemskitError
from gemskit.pointwise import _indexing
from gemskit.reduce import _scatter

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 9, shape, generator=generator).to(dtype)


def places(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed))


# -- sums without a fixed order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64]
)
def test_sums_by_float_atomics(dtype: torch.dtype) -> None:
    """The default mode; the conformance tests run the deterministic one."""
    x, src, index = draw(9, 33, dtype=dtype), draw(40, 33, dtype=dtype, seed=2), places(9, 40, 33)
    slots = places(9, 40)
    exact = x.double() if dtype.is_floating_point else x
    more = src.double() if dtype.is_floating_point else src
    with gemskit.interpret(), _launch.record() as calls:
        found = [
            gemskit.scatter_add(x, 0, index, src),
            gemskit.index_add(x, 0, slots, src, alpha=2),
            gemskit.index_put(x, [slots], src, accumulate=True),
            gemskit.index_add_(x.clone(), 0, slots, src),
        ]
    assert all(c.config and "fixed" not in dict(c.config).values() for c in calls if c.kernel == "scatter")
    want = [
        exact.scatter_add(0, index, more),
        exact.index_add(0, slots, more, alpha=2),
        exact.index_put((slots,), more, accumulate=True),
        exact.index_add(0, slots, more),
    ]
    for f, w in zip(found, want):
        assert f.dtype == dtype
        if dtype.is_floating_point:
            # Rounded once from float32.
            torch.testing.assert_close(f, w.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
        else:
            assert torch.equal(f, w)


def test_stores_in_any_order() -> None:
    """What runs where neither the deterministic mode nor the interpreter's search for races asks for a winner."""
    x, src = draw(9, 33), draw(40, 33, seed=2)
    slots = places(9, 40)
    with gemskit.interpret(check=False), _launch.record() as calls:
        found = gemskit.index_copy(x, 0, slots, src)
        filled = gemskit.scatter(x, 1, places(33, 9, 50), value=2.5)
    assert {dict(c.config).get("HOW") for c in calls if c.kernel == "scatter"} == {"store"}
    for row in range(9):
        given = src[slots == row]
        assert (found[row] == given).all(1).any() if len(given) else torch.equal(found[row], x[row])
    assert torch.equal(filled, x.scatter(1, places(33, 9, 50), 2.5))


# -- sums whose order makes no difference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deterministic_sums_do_not_depend_on_the_order(dtype: torch.dtype, deterministic: None) -> None:
    n = 600
    src = (draw(n, dtype=torch.float64) * torch.exp(8 * draw(n, dtype=torch.float64, seed=3))).to(dtype)
    index = places(7, n)
    x = draw(8, dtype=dtype, seed=5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    with gemskit.interpret():
        one = gemskit.scatter_add(x, 0, index, src)
        other = gemskit.scatter_add(x, 0, index[order], src[order])
        rows = gemskit.index_add(x[:, None].expand(8, 3), 0, index[order], src[order, None].expand(n, 3))
    assert torch.equal(one, other)
    assert all(torch.equal(one, r) for r in rows.unbind(1))
    terms = zip(x.tolist(), ([*src[index == k].tolist()] for k in range(8)))
    exact = torch.tensor([math.fsum([first, *rest]) for first, rest in terms], dtype=torch.float64)
    scale = torch.zeros(8, dtype=torch.float64).scatter_reduce(0, index, src.double().abs(), "amax") + exact.abs()
    assert ((one.double() - exact).abs() <= torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_deterministic_sums_of_one_are_exact(dtype: torch.dtype, deterministic: None) -> None:
    """Whatever the size of others; also for 2**24 addends, of which each may go to another element."""
    info = torch.finfo(dtype)
    src = torch.tensor([info.max, -info.max, info.tiny, -info.tiny, 1.0, -1 / 3, 0.0, 3 * info.tiny], dtype=dtype)
    where = torch.arange(8).repeat(1000)
    x = torch.zeros(8, dtype=dtype)
    with gemskit.interpret():
        assert torch.equal(gemskit.scatter_add(x, 0, torch.arange(8), src), src)
        assert torch.equal(gemskit.scatter_add(x, 0, where, torch.cat([src, torch.zeros(7992, dtype=dtype)])), src)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic_sums_of_infinities(dtype: torch.dtype, deterministic: None) -> None:
    src = torch.tensor([INF, 1, INF, -INF, -INF, 2, INF, -INF, NAN, 1, 5], dtype=dtype)
    index = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4])
    x = torch.tensor([1, 1, 1, 1, INF, -INF, NAN], dtype=dtype)
    with gemskit.interpret():
        found = gemskit.scatter_add(x, 0, index, src)
    torch.testing.assert_close(found, x.scatter_add(0, index, src), rtol=0, atol=0, equal_nan=True)


def test_deterministic_stores_keep_the_last(deterministic: None) -> None:
    x, src, index = draw(9, 33), draw(50, 33, seed=2), places(9, 50, 33)
    slots = places(9, 50)
    with gemskit.interpret():
        assert torch.equal(gemskit.scatter(x, 0, index, src), x.scatter(0, index, src))
        assert torch.equal(gemskit.index_copy(x, 0, slots, src), x.index_copy(0, slots, src))
        put = gemskit.index_put(x.T, [None, slots], src.T)
    assert torch.equal(put, x.T.index_put((torch.arange(33)[:, None], slots), src.T))


# -- indices out of range --------------------------------------------------------------------------------------------------


def test_out_of_range() -> None:
    x, bad = draw(4, 5), torch.tensor([3, 4, -1])
    wraps = torch.tensor([3, 4, -1, -5])
    with gemskit.interpret():
        rows = gemskit.index_select(x, 0, bad)
        assert torch.equal(rows[0], x[3]) and rows[1:].isnan().all()
        assert torch.equal(gemskit.index_select(x.int(), 0, bad)[1:], torch.zeros(2, 5, dtype=torch.int32))
        assert gemskit.gather(x, 0, bad[:, None]).isnan().flatten().tolist() == [False, True, True]
        taken = gemskit.index(x, [wraps])
        assert torch.equal(taken[2], x[3]) and taken[1].isnan().all() and taken[3].isnan().all()
        added = gemskit.index_add(x, 0, bad, torch.ones(3, 5))
        assert torch.equal(added[:3], x[:3]) and torch.equal(added[3], x[3] + 1)
        written = gemskit.index_put(x, [wraps], torch.zeros(()))
        assert torch.equal(written[:3], x[:3]) and not written[3].any()
        assert torch.equal(gemskit.scatter(x, 1, torch.full((4, 1), 5), value=9.0), x)
    for call in (
        lambda: gemskit.index_select(x, 0, bad),
        lambda: gemskit.gather(x, 0, bad[:, None]),
        lambda: gemskit.index(x, [wraps]),
        lambda: gemskit.scatter(x, 1, torch.full((4, 1), 5), value=9.0),
    ):
        with pytest.raises(GemskitError):
            call()


# -- masks and lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpreted", [False, True])
def test_masks(interpreted: bool) -> None:
    x = draw(4, 5, 6)
    whole, rows, inner = draw(4, 5, 6) > 0, draw(4, seed=3) > 0, draw(5, 6, seed=4) > 0
    two = int(rows.sum())
    cases: list[list[Tensor | None]] = [
        [whole], [rows], [None, inner], [rows, None, places(6, two)], [rows.to(torch.uint8)], [torch.zeros(4, dtype=torch.bool)],
    ]  # fmt: skip
    with gemskit.interpret() if interpreted else _launch.NOTHING:
        for indices in cases:
            want = torch.ops.aten.index.Tensor(x, indices)
            assert torch.equal(gemskit.index(x, indices), want)
            values = draw(*want.shape, seed=9)
            put = torch.ops.aten.index_put(x, indices, values)
            assert torch.equal(gemskit.index_put(x, indices, values), put)
            y = x.clone()
            assert gemskit.index_put_(y, indices, values) is y and torch.equal(y, put)


def test_gradients_through_masks_and_lists() -> None:
    x, mask = draw(4, 5), draw(4, 5, seed=3) > 0
    values = draw(int(mask.sum()), seed=5)
    with gemskit.interpret():
        a, v = x.clone().requires_grad_(), values.clone().requires_grad_()
        (gemskit.index(a, [mask]) * gemskit.index(gemskit.index_put(a, [mask], v), [mask])).sum().backward()
    b, w = x.clone().requires_grad_(), values.clone().requires_grad_()
    (b[mask] * b.index_put((mask,), w)[mask]).sum().backward()
    assert torch.equal(a.grad, b.grad) and torch.equal(v.grad, w.grad)


def test_lists_are_refused_by_name() -> None:
    x = draw(4, 5)
    with pytest.raises(DimError, match="index: a mask of shape"):
        gemskit.index(x, [torch.ones(5, dtype=torch.bool)])
    with pytest.raises(DimError, match="index: 3 indices"):
        gemskit.index(x, [places(1, 2)] * 3)
    with pytest.raises(DtypeError, match="index_put: indices"):
        gemskit.index_put(x, [torch.zeros(2)], x)
    with pytest.raises(DtypeError, match="index_put: values"):
        gemskit.index_put(x, [places(4, 2)], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="at least one tensor"):
        gemskit.index(x, [None])


# -- thin functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpreted", [False, True])
def test_thin_functions(interpreted: bool) -> None:
    x, index = draw(4, 5), places(5, 4, 3)
    with gemskit.interpret() if interpreted else _launch.NOTHING:
        for dim, places_ in (1, index), (-2, places(4, 1, 5)), (None, places(20, 7)):
            assert torch.equal(gemskit.take_along_dim(x, places_, dim), torch.take_along_dim(x, places_, dim))
        row = torch.take_along_dim(x, index[:1], 1)
        assert torch.equal(gemskit.take_along_dim(x, index[:1], 1), row)
        grad = draw(4, 3, seed=7)
        want = torch.zeros(4, 5).scatter_add(1, index, grad)
        torch.testing.assert_close(gemskit.gather_backward(grad, x, 1, index, False), want)
        y = x.clone()
        assert gemskit.scatter_(y, 1, index, value=3) is y and torch.equal(y, x.scatter(1, index, 3.0))
        assert torch.equal(gemskit.scatter(x, 1, index, 3), y)
        mask = draw(4, 5, seed=8) > 0
        got = gemskit.masked_scatter_backward(x, mask, (4, 5))
        assert torch.equal(got, torch.ops.aten.masked_scatter_backward(x, mask, [4, 5]))
        far = torch.tensor([0, 99, 2])
        assert torch.equal(
            gemskit.unsafe_masked_index(x, far[:, None] < 9, [far.clamp_max(3)], 1),
            torch.where(far[:, None] < 9, x[far.clamp_max(3)], torch.ones(())),
        )
    with pytest.raises(ArgumentError, match="sparse_grad"):
        gemskit.gather(x, 1, index, sparse_grad=True)
    with pytest.raises(ArgumentError, match="either src or value"):
        gemskit.scatter(x, 1, index)
    with pytest.raises(ArgumentError, match="reduce"):
        gemskit.scatter(x, 1, index, 3, reduce="mean")


def test_masked_scatter_leaves_what_has_no_source() -> None:
    x = draw(6)
    with gemskit.interpret():
        found = gemskit.masked_scatter(x, torch.ones(6, dtype=torch.bool), torch.arange(4.0))
    assert torch.equal(found, torch.cat([torch.arange(4.0), x[4:]]))


# -- layouts ---------------------------------------------------------------------------------------------------------------


def test_offsets_beyond_int32() -> None:
    """Strides over 2**31 on a small tensor: the space is small, what it reaches is not."""
    t = torch.empty_strided((2, 3), (1 << 31, 1), device="meta")
    index = torch.zeros(5, dtype=torch.int64, device="meta")
    assert _indexing.rows(t, 0, index).wide and not _indexing.rows(t.new_empty(2, 3), 0, index).wide


def test_rows_are_copied_in_whole_lines() -> None:
    """The index of a row is read once, and a tile lies along the row."""
    table = torch.empty(32000, 4096, dtype=torch.bfloat16, device="meta")
    index = torch.empty(65536, dtype=torch.int64, device="meta")
    t = _indexing.tiling(_indexing.rows(table, 0, index), ((4096, 1), None), 2)
    *_, along = t.along
    assert along == 2 and t.meta["B0"] == 4096


def test_where_the_interpreter_looks_for_races_the_last_wins() -> None:
    assert not _scatter.ordered()
    with gemskit.interpret():
        assert _scatter.ordered()
    with gemskit.interpret(check=False):
        assert not _scatter.ordered()


def test_zero_dimensions() -> None:
    """Not among the samples: torch 2.11 refuses them on CUDA."""
    index, source, target = torch.zeros(1, dtype=torch.int64)[0], torch.tensor(2.5), torch.tensor(1.0)
    with gemskit.interpret():
        assert gemskit.scatter(target, 0, index, source) == 2.5
        assert gemskit.scatter_add(target, 0, index, source) == 3.5
        assert gemskit.scatter_reduce(target, 0, index, source, "mean") == 1.75
