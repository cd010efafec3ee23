"""Data movement: what a walk over samples cannot see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import _launch, errors
from gemskit._interpret import interpret


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with interpret():
        yield


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def kernels(fn: Callable[[], Any]) -> list[str]:
    with gemskit.record() as calls:
        fn()
    return [c.kernel for c in calls]


def pieces(count: int, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, n % 3, 5).requires_grad_(grad) for n in range(count)]


# -- joining ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 9, 19])
def test_any_number_of_tensors(count: int) -> None:
    parts = pieces(count)
    same(gemskit.cat(parts, 1), torch.cat(parts, 1))
    out = torch.empty(0)
    assert gemskit.cat(parts, -2, out=out) is out
    same(out, torch.cat(parts, 1))
    alike = [torch.randn(2, 3) for _ in range(count)]
    for dim in (0, 1, 2, -1, -3):
        same(gemskit.stack(alike, dim), torch.stack(alike, dim))


def test_each_group_is_copied_once() -> None:
    parts = [torch.ones(4, 4) for _ in range(20)]
    assert kernels(lambda: gemskit.cat(parts[:8])) == ["join"]
    assert kernels(lambda: gemskit.cat(parts)) == ["join"] * 3
    assert kernels(lambda: gemskit.stack(parts, 1)) == ["join"] * 3


@pytest.mark.parametrize("count", [3, 11])
def test_gradients_are_views(count: int) -> None:
    parts = pieces(count, grad=True)
    joined = gemskit.cat(parts, 1)
    weight = torch.randn(joined.shape)
    launched = kernels(lambda: got.extend(torch.autograd.grad(joined, parts, weight))) if (got := []) == [] else []
    assert not launched
    for a, b in zip(got, torch.autograd.grad(torch.cat(parts, 1), parts, weight)):
        same(a, b)


def test_promoted_gradients_have_their_own_dtypes() -> None:
    x, y = torch.randn(3, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, requires_grad=True)
    for fn in (gemskit.cat, torch.cat):
        x.grad = y.grad = None
        fn([x, y]).sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16 and y.grad is not None
        assert y.grad.dtype == torch.float32


def test_mixed_dtypes_in_groups() -> None:
    parts = [torch.arange(3)] * 8 + [torch.ones(2, dtype=torch.bool), torch.randn(2).half()]
    same(gemskit.cat(parts), torch.cat(parts))
    parts[0] = torch.empty(0, dtype=torch.float64)
    same(gemskit.cat(parts), torch.cat(parts))


def test_channels_last_stays() -> None:
    parts = [torch.randn(2, c, 3, 4).contiguous(memory_format=torch.channels_last) for c in (2, 3)]
    got = gemskit.cat(parts, 1)
    same(got, torch.cat(parts, 1))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shapes", [((), (3,)), ((3,), (4,)), ((2, 3), (2, 4)), ((2, 3, 4), (2, 1, 4))])
def test_hstack(shapes: Any) -> None:
    parts = [torch.randn(s) for s in shapes]
    same(gemskit.hstack(parts), torch.hstack(parts))


@pytest.mark.parametrize("shapes", [((), ()), ((3,), (3,)), ((2, 3), (3,)), ((2, 3, 4), (1, 3, 4))])
def test_vstack(shapes: Any) -> None:
    parts = [torch.randn(s) for s in shapes]
    same(gemskit.vstack(parts), torch.vstack(parts))
    out = torch.empty(0)
    same(gemskit.vstack(parts, out=out), torch.vstack(parts))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("count", [2, 9])
def test_what_does_not_fit_together(count: int, grad: bool) -> None:
    ones = [torch.ones(2, 3, requires_grad=grad)] * (count - 1)
    for fn in (gemskit.cat, gemskit.stack):
        with pytest.raises(errors.ShapeError, match=f"{fn.__name__}|cat"):
            fn([*ones, torch.ones(3, 4)])
        with pytest.raises(errors.DimError, match=fn.__name__):
            fn([*ones, ones[0]], 5)


@pytest.mark.parametrize("fn", [gemskit.cat, gemskit.stack, gemskit.hstack, gemskit.vstack])
def test_lists_of_tensors_are_asked_for(fn: Callable[..., Tensor]) -> None:
    for bad in ([], torch.ones(3), 3, [torch.ones(3), 3]):
        with pytest.raises(errors.ArgumentError, match=fn.__name__):
            fn(bad)


# -- refusals -----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Tensor], type[Exception]]] = [
    (lambda: gemskit.triu(torch.ones(7)), RuntimeError),
    (lambda: gemskit.diag(torch.ones(2, 3, 4)), RuntimeError),
    (lambda: gemskit.diag_embed(torch.ones(3, 4), 0, 1, 1), RuntimeError),
    (lambda: gemskit.flip(torch.ones(5, 3), (0, 0)), RuntimeError),
    (lambda: gemskit.flip(torch.ones(5, 3), (2,)), errors.DimError),
    (lambda: gemskit.roll(torch.ones(5, 3), (1, 2), (0,)), RuntimeError),
    (lambda: gemskit.pad(torch.ones(2, 3, 7), (7, 0), "reflect"), RuntimeError),
    (lambda: gemskit.pad(torch.ones(2, 3, 7), (1, 0), "mirror"), errors.ArgumentError),
    (lambda: gemskit.pad(torch.ones(3, dtype=torch.uint8), (1, 0), value=-1), errors.ArgumentError),
    (lambda: gemskit.pad(torch.ones(2, 3, 7), (3, -5), "circular"), errors.ShapeError),
    (lambda: gemskit.pad(torch.ones(3), (1, 0, 2)), RuntimeError),
    (lambda: gemskit.pad(torch.ones(3), (-2, -2)), RuntimeError),
    (lambda: gemskit.repeat(torch.ones(3, 4), (2,)), RuntimeError),
    (lambda: gemskit.repeat_interleave(torch.ones(3, 4), -1, 1), RuntimeError),
    (lambda: gemskit.repeat_interleave(torch.ones(3, 4), torch.tensor([1, 2]), 1), errors.ArgumentError),
    (lambda: gemskit.repeat_interleave(torch.ones(3), torch.ones(3)), errors.ArgumentError),
    (lambda: gemskit.select_scatter(torch.ones(5, 33), torch.ones(5), 1, 40), IndexError),
    (lambda: gemskit.select_scatter(torch.ones(5, 33), torch.ones(4), 1, 0), errors.ShapeError),
    (lambda: gemskit.slice_scatter(torch.ones(5, 33), torch.ones(5, 4), 1, 2, 5), errors.ShapeError),
    (lambda: gemskit.select_backward(torch.ones(4), [4, 5], 1, 5), IndexError),
    (lambda: gemskit.slice_backward(torch.ones(3, 2), [3, 5], 1, 1, 4, 1), errors.ShapeError),
    (lambda: gemskit.diagonal_backward(torch.ones(3), [2, 2], 0, 0, 1), errors.ShapeError),
    (lambda: gemskit.pixel_shuffle(torch.ones(2, 5, 3, 5), 2), RuntimeError),
    (lambda: gemskit.pixel_unshuffle(torch.ones(2, 3, 5, 10), 2), RuntimeError),
    (lambda: gemskit.one_hot(torch.ones(4, dtype=torch.int32), 5), errors.DtypeError),
    (lambda: gemskit.im2col(torch.ones(2, 3, 2, 2), 3, 1, 0, 1), RuntimeError),
    (lambda: gemskit.col2im(torch.ones(2, 48, 5), 8, 4, 1, 0, 4), RuntimeError),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case: int) -> None:
    call, kind = REFUSED[case]
    with pytest.raises(kind) as found:
        call()
    assert isinstance(found.value, errors.GemskitError)


# -- triangles ----------------------------------------------------------------------------------------------------------


def test_a_triangle_in_place_reads_nothing() -> None:
    x = torch.randn(2, 40, 30)
    want = x.triu(3)
    assert gemskit.triu_(x, 3) is x
    same(x, want)
    y = torch.randn(30, 40).T
    want = y.tril(-2)
    same(gemskit.tril_(y, -2), want)


def test_a_triangle_may_be_its_own_out() -> None:
    x = torch.randn(9, 9)
    want = x.triu()
    same(gemskit.triu(x, out=x), want)


# -- padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("sides", [(6, 6), (0, 6), (-3, 2), (2, -4), (1, 1)])
def test_padding_and_its_gradient(mode: str, sides: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    got, want = gemskit.pad(x, sides, mode), F.pad(x, sides, mode)
    same(got, want)
    weight = torch.randn(want.shape, dtype=torch.float64)
    a, b = (torch.autograd.grad(t, x, weight)[0] for t in (got, want))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_the_value_keeps_its_precision(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3).to(dtype)
    for value in (0.1, 7, float("inf") if dtype.is_floating_point else 2**40 + 1 if dtype == torch.int64 else 1):
        same(gemskit.pad(x, (1, 2), value=value), F.pad(x, (1, 2), value=value))


# -- repetitions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(2,), (2, 3), (2, 1, 3), ()])
def test_tile(dims: tuple[int, ...]) -> None:
    x = torch.randn(3, 4)
    same(gemskit.tile(x, dims), torch.tile(x, dims))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_repeats_of_a_tensor(dtype: torch.dtype) -> None:
    counts = torch.tensor([2, 0, 3], dtype=dtype)
    same(gemskit.repeat_interleave(counts), torch.repeat_interleave(counts))
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for dim in (1, -2):
        for size in (None, 5):
            got = gemskit.repeat_interleave(x, counts, dim, output_size=size)
            want = torch.repeat_interleave(x, counts, dim, output_size=size)
            same(got, want)
            weight = torch.randn(want.shape, dtype=torch.float64)
            torch.testing.assert_close(*[torch.autograd.grad(t, x, weight) for t in (got, want)])
    for one in (torch.tensor(2), torch.tensor([3])):
        same(gemskit.repeat_interleave(x, one), torch.repeat_interleave(x, one))
        same(gemskit.repeat_interleave(x.mT, one, 0), torch.repeat_interleave(x.mT, one, 0))
    same(gemskit.repeat_interleave(x[:, :, 0].T[:, 0], counts), torch.repeat_interleave(x[:, :, 0].T[:, 0], counts))
    same(gemskit.repeat_interleave(torch.randn(0, 3), torch.empty(0, dtype=dtype), 0), torch.empty(0, 3))


def test_one_hot_of_an_unknown_number_of_classes() -> None:
    x = torch.tensor([[0, 4], [2, 2]])
    same(gemskit.one_hot(x), F.one_hot(x))
    with pytest.raises(errors.ArgumentError, match="num_classes"):
        gemskit.one_hot(torch.empty(0, dtype=torch.int64))


# -- large offsets ------------------------------------------------------------------------------------------------------


def test_strides_beyond_int32_are_wide() -> None:
    """No memory is touched: the launch is looked at."""
    far = torch.empty_strided((2, 4), (2**31, 1), device="meta")
    near = torch.empty(2, 4, device="meta")
    seen: list[dict[str, Any]] = []
    with _launch.tracing(lambda kernel, grid, args, meta: seen.append(meta)):
        gemskit.cat([far, near], 1)
        gemskit.flip(far, (0,))
        gemskit.triu(far)
        gemskit.pad(far, (1, 1))
        gemskit.repeat(far, (2, 2))
    assert [m["WIDE"] for m in seen] == [True] * 5
