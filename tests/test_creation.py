"""New tensors and copies: values, dtypes, shapes and refusals are torch's. Kernels are interpreted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import interpret
from gemskit.errors import ArgumentError, DeviceError, DtypeError, GemskitError, GradientError, ShapeError

Make = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with interpret():
        yield


def same(got: Tensor, want: Tensor, exact: bool = True) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
    assert got.requires_grad == want.requires_grad
    if exact:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want)


def kernels(fn: Callable[[], object]) -> list[str]:
    with gemskit.record() as calls:
        fn()
    return [c.kernel for c in calls]


# -- fill ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zeros", "ones"])
def test_zeros_and_ones(name: str) -> None:
    mine, torchs = getattr(gemskit, name), getattr(torch, name)
    for args, kwargs in (
        ((2, 3), {}), (((2, 3),), {"dtype": torch.int8}), (([4],), {"dtype": torch.bool}), (((),), {}), ((0, 3), {}),
        ((3,), {"requires_grad": True, "device": "cpu"}),
    ):  # fmt: skip
        same(mine(*args, **kwargs), torchs(*args, **kwargs))
    assert kernels(lambda: mine(3)) == ["_fill"]
    x = torch.empty(2, 3, dtype=torch.float16)
    like = getattr(gemskit, f"{name}_like")
    same(like(x.mT), getattr(torch, f"{name}_like")(x.mT))
    same(like(x, dtype=torch.int64, requires_grad=False), getattr(torch, f"{name}_like")(x, dtype=torch.int64))
    four = torch.empty(2, 3, 4, 5)
    same(
        like(four, memory_format=torch.channels_last),
        getattr(torch, f"{name}_like")(four, memory_format=torch.channels_last),
    )
    new = getattr(gemskit, f"new_{name}")
    same(new(x, 4, 5), getattr(x, f"new_{name}")(4, 5))
    same(new(x, (4,), dtype=torch.uint8), getattr(x, f"new_{name}")((4,), dtype=torch.uint8))


def test_default_dtype_and_device() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for name, args in (("zeros", (3,)), ("full", ((3,), 0.1)), ("arange", (0.0, 1.0, 0.1)), ("eye", (3,))):
            same(getattr(gemskit, name)(*args), getattr(torch, name)(*args))
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert gemskit.zeros(3).device.type == gemskit.arange(3).device.type == gemskit.rand(3).device.type == "meta"
    assert gemskit.linspace(0, 1, 5, device="meta").shape == (5,)


@pytest.mark.parametrize("value", [3, -3, 0.1, True, math.inf, -0.0, 2**53 + 1])
def test_full(value: Any) -> None:
    same(gemskit.full((2, 3), value), torch.full((2, 3), value))
    same(gemskit.scalar_tensor(value), torch.scalar_tensor(value))
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        x = torch.empty(2, 3, dtype=dtype)
        try:
            want = torch.full((2, 3), value, dtype=dtype)
        except RuntimeError:
            with pytest.raises(ArgumentError):
                gemskit.full((2, 3), value, dtype=dtype)
            with pytest.raises(ArgumentError):
                gemskit.fill_(x, value)
            continue
        same(gemskit.full((2, 3), value, dtype=dtype), want)
        same(gemskit.full_like(x, value), want)
        same(gemskit.new_full(x, (2, 3), value), want)
        same(gemskit.fill(x.mT, value), want.mT)
        assert gemskit.fill_(x, value) is x and torch.equal(x, want)


def test_numbers_that_do_not_fit() -> None:
    for dtype, value in (
        (torch.int8, 128), (torch.int8, -129), (torch.int8, 127.5), (torch.uint8, 256), (torch.uint8, -256),
        (torch.int32, math.nan), (torch.int32, 2**31), (torch.float16, 1e5), (torch.float32, 1e300),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.full((2,), value, dtype=dtype)
        for _ in range(3):
            with pytest.raises(ArgumentError, match="overflow"):
                gemskit.full((2,), value, dtype=dtype)
    same(gemskit.full((2,), -255, dtype=torch.uint8), torch.full((2,), -255, dtype=torch.uint8))
    for call in (lambda: gemskit.full((2,), 1j), lambda: gemskit.arange(3j), lambda: gemskit.linspace(0, 1j, 3)):  # type: ignore[arg-type]
        with pytest.raises(DtypeError):
            call()


def test_fill_by_a_tensor() -> None:
    x, value = torch.zeros(2, 3), torch.tensor(2.5)
    same(gemskit.fill(x, value), torch.fill(x, value))
    same(gemskit.full((2, 3), value), torch.full((2, 3), 2.5))
    gemskit.fill_(x, torch.tensor(7))
    assert (x == 7).all()
    x = torch.arange(4.0)
    assert torch.equal(gemskit.fill_(x, x[2]), torch.full((4,), 2.0))
    with pytest.raises(GemskitError):
        gemskit.fill_(x, torch.ones(4))
    leaf, target = value.clone().requires_grad_(), torch.ones(2, 3, requires_grad=True)
    (gemskit.fill_(target * 1, leaf) * 2).sum().backward()
    assert leaf.grad == 12 and torch.equal(target.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    assert gemskit.zero_(x) is x and not x.any() and torch.equal(gemskit.zero(target), torch.zeros(2, 3))


def test_out() -> None:
    out, ints = torch.empty(0), torch.empty(4, dtype=torch.int32)
    for call, want in (
        (lambda o: gemskit.zeros(2, 3, out=o), torch.zeros(2, 3)), (lambda o: gemskit.ones((3,), out=o), torch.ones(3)),
        (lambda o: gemskit.full((2,), 0.5, out=o), torch.full((2,), 0.5)), (lambda o: gemskit.eye(3, out=o), torch.eye(3)),
        (lambda o: gemskit.arange(1, 4, 0.5, out=o), torch.arange(1, 4, 0.5)),
        (lambda o: gemskit.linspace(0, 1, 5, out=o), torch.linspace(0, 1, 5)),
        (lambda o: gemskit.logspace(0, 1, 3, out=o), torch.logspace(0, 1, 3)),
        (lambda o: gemskit.zero(torch.ones(4), out=o), torch.zeros(4)), (lambda o: gemskit.empty(0, out=o), torch.empty(0)),
    ):  # fmt: skip
        assert call(out) is out
        torch.testing.assert_close(out, want)
    assert gemskit.arange(4, out=ints) is ints and ints.tolist() == [0, 1, 2, 3]
    turned = torch.empty(3, 2).mT
    assert torch.equal(gemskit.ones(2, 3, out=turned), torch.ones(2, 3)) and turned.stride() == (1, 2)
    with pytest.raises(DtypeError):
        gemskit.zeros(4, out=ints, dtype=torch.float32)
    with pytest.raises(DeviceError):
        gemskit.zeros(4, out=ints, device="meta")
    with pytest.raises(GradientError):
        gemskit.zeros(4, out=torch.ones(4, requires_grad=True))


# -- ranges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        (5,), (0,), (2, 9), (9, 2, -3), (0, 10, 3), (2**53, 2**53 + 5), (-(2**61), 2**61, 2**60), (0.0, 1.0, 0.1),
        (1, 2, 0.3), (5.5,), (0.1, 0.45, 0.05), (3, 3), (-1.0, -3.0, -0.25), (True, 5),
    ],
)  # fmt: skip
def test_arange(args: tuple[Any, ...]) -> None:
    exact = all(isinstance(v, int) for v in args)
    same(gemskit.arange(*args), torch.arange(*args), exact)
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.uint8):
        try:
            want = torch.arange(*args, dtype=dtype)
        except RuntimeError:
            with pytest.raises(GemskitError):
                gemskit.arange(*args, dtype=dtype)
            continue
        same(gemskit.arange(*args, dtype=dtype), want, exact and not dtype.is_floating_point)


def test_arange_refuses() -> None:
    for args in ((1, 0), (0, 5, 0), (0, 5, -1), (0, math.inf), (math.nan,)):
        with pytest.raises(ArgumentError, match="arange"):
            gemskit.arange(*args)
    with pytest.raises(DtypeError):
        gemskit.arange(3, dtype=torch.bool)
    assert kernels(lambda: gemskit.arange(5)) == ["_arange"]


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6, 1001])
def test_linspace(steps: int) -> None:
    for ends in ((0, 1), (3, -7.5), (0.1, 0.1), (-5, 100)):
        for dtype in (None, torch.float64, torch.float16, torch.int32, torch.int64):
            got = gemskit.linspace(*ends, steps, dtype=dtype)
            # torch rounds the step to halves too.
            wide = torch.float32 if dtype == torch.float16 else dtype
            want = torch.linspace(*ends, steps, dtype=wide).to(got.dtype)
            same(got, want, exact=not got.dtype.is_floating_point)
            if steps > 1 and dtype is None:
                assert got[0] == want[0] and got[-1] == want[-1]
                exact = torch.linspace(*ends, steps, dtype=torch.float64)
                assert (got - exact).abs().max() <= max(1e-6, 1.5 * float((want - exact).abs().max()))
    a, b = torch.tensor(1.5), torch.tensor(9)
    same(gemskit.linspace(a, b, steps), torch.linspace(a, b, steps), exact=False)
    same(gemskit.linspace(a, 4, steps, dtype=torch.int32), torch.linspace(a, 4, steps, dtype=torch.int32))


@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_logspace(steps: int) -> None:
    for dtype in (None, torch.float64, torch.bfloat16):
        got, want = gemskit.logspace(-2, 3, steps, dtype=dtype), torch.logspace(-2, 3, steps, dtype=dtype)
        if dtype == torch.bfloat16:
            want = torch.logspace(-2, 3, steps).to(dtype)
        same(got, want, exact=False)
    same(gemskit.logspace(0, 6, steps, base=2), torch.logspace(0, 6, steps, base=2), exact=False)
    assert gemskit.logspace(0, 6, 7, base=2, dtype=torch.int64).tolist() == [1, 2, 4, 8, 16, 32, 64]


def test_spaced_values_refuse() -> None:
    for call in (
        lambda: gemskit.linspace(0, 1, -1), lambda: gemskit.linspace(torch.ones(2), 1, 5),
        lambda: gemskit.linspace(0, 1, 3, dtype=torch.bool), lambda: gemskit.linspace(0, 300, 3, dtype=torch.int8),
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            call()


@pytest.mark.parametrize("size", [(3,), (3, 5), (5, 3), (0,), (0, 4), (1, 1)])
def test_eye(size: tuple[int, ...]) -> None:
    for dtype in (None, torch.int16, torch.bool, torch.bfloat16):
        same(gemskit.eye(*size, dtype=dtype), torch.eye(*size, dtype=dtype))
    with pytest.raises(ShapeError):
        gemskit.eye(-1)


@pytest.mark.parametrize("rows, cols", [(3, 3), (4, 2), (2, 4), (1, 1), (0, 3), (3, 0), (2, 1500)])
def test_triangle_indices(rows: int, cols: int) -> None:
    for offset in range(-6, 7):
        same(gemskit.tril_indices(rows, cols, offset), torch.tril_indices(rows, cols, offset))
        same(gemskit.triu_indices(rows, cols, offset), torch.triu_indices(rows, cols, offset))
    got = gemskit.tril_indices(rows, cols, dtype=torch.int32)
    same(got, torch.tril_indices(rows, cols, dtype=torch.int32))
    with pytest.raises(ShapeError):
        gemskit.triu_indices(-1, 3)


# -- copies ----------------------------------------------------------------------------------------------------------------


def test_clone_and_contiguous() -> None:
    x = torch.randn(2, 3, 4, 5)
    for y in (x, x.mT, x[..., ::2], x[:1].expand(2, 3, 4, 5), x.to(memory_format=torch.channels_last)):
        same(gemskit.clone(y), torch.clone(y))
        for form in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
            same(gemskit.clone(y, memory_format=form), torch.clone(y, memory_format=form))
        for form in (torch.contiguous_format, torch.channels_last):
            got = gemskit.contiguous(y, memory_format=form)
            same(got, y.contiguous(memory_format=form))
            assert (got is y) == y.is_contiguous(memory_format=form)
    leaf = x.clone().requires_grad_()
    grad = torch.randn(2, 3, 4, 5)
    gemskit.clone(leaf).backward(grad)
    assert torch.equal(leaf.grad, grad)  # type: ignore[arg-type]


def test_copy_converts_and_broadcasts() -> None:
    values = torch.tensor([-2.7, -0.0, 0.0, 0.4, 1.0, 99.9, math.nan, math.inf])
    for kind in (torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool):
        for source in (torch.float32, torch.float64, torch.float16, torch.int16, torch.bool):
            src = values.to(source) if source.is_floating_point else values[:6].to(torch.int64).to(source)
            src = src[:6] if not kind.is_floating_point and kind != torch.bool else src
            x = torch.empty(2, len(src), dtype=kind)
            want = torch.empty(2, len(src), dtype=kind).copy_(src)
            assert gemskit.copy_(x, src) is x
            torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(gemskit.copy(x, src), want, rtol=0, atol=0, equal_nan=True)
            got = gemskit.to_copy(src, dtype=kind)
            torch.testing.assert_close(got, src.to(kind), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ShapeError):
        gemskit.copy_(torch.empty(3), torch.empty(4))
    with pytest.raises(ArgumentError):
        gemskit.copy_(torch.empty(1).expand(3), torch.empty(3))
    x = torch.ones(3)
    assert gemskit.copy_(x, x) is x


def test_copy_gradients() -> None:
    target, src = torch.randn(4, 3, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 3)
    for fn in (lambda t, s: t.clone().copy_(s), lambda t, s: gemskit.copy_(t * 1, s), gemskit.copy):
        found = torch.autograd.grad(fn(target, src), (target, src), grad)
        assert found[1].dtype == torch.float64 and torch.equal(found[0], torch.zeros(4, 3))
        torch.testing.assert_close(found[1], grad.double().sum(0), rtol=1e-5, atol=1e-5)
    (given,) = torch.autograd.grad(gemskit.to_copy(src, dtype=torch.bfloat16), src, torch.ones(3, dtype=torch.bfloat16))
    assert given.dtype == torch.float64
    with pytest.raises(GradientError):
        gemskit.copy_(target, src)


def test_copies_between_devices() -> None:
    x = torch.ones(3)
    assert gemskit.to_copy(x, device="meta", dtype=torch.int8).dtype == torch.int8
    assert gemskit.to_copy(x, device="cpu") is not x
    assert gemskit.copy_(torch.empty(3, device="meta"), x).device.type == "meta"


def test_resolved() -> None:
    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex64)
    assert gemskit.resolve_conj(x) is x and gemskit.resolve_neg(x) is x
    negative = z.conj().imag
    assert negative.is_neg()
    got = gemskit.resolve_neg(negative)
    assert not got.is_neg() and torch.equal(got, -z.imag)
    turned = torch.randn(2, 3)
    for copied, want in (
        (gemskit.alias_copy(turned), turned), (gemskit.t_copy(turned), turned.t()), (gemskit.lift_fresh_copy(turned), turned),
    ):  # fmt: skip
        assert torch.equal(copied, want) and copied.data_ptr() != turned.data_ptr()
    out = torch.empty(0)
    assert gemskit.t_copy(turned, out=out) is out and torch.equal(out, turned.t())


# -- views -----------------------------------------------------------------------------------------------------------------


VIEWS: list[tuple[str, tuple[Any, ...]]] = [
    ("alias", ()), ("as_strided", ((2, 2), (1, 3), 1)), ("detach", ()), ("expand", (5, -1, -1, -1)),
    ("expand", ((5, 2, 3, 1),)), ("lift_fresh", ()), ("permute", ((2, 0, 1),)), ("select", (1, 2)),
    ("slice", (1, 0, 3, 2)), ("split", (2, 1)), ("split", ([1, 2], 1)), ("split_with_sizes", ([1, 2], 1)), ("squeeze", ()),
    ("squeeze", (2,)), ("squeeze", ((0, 2),)), ("transpose", (0, -1)), ("unbind", (1,)), ("unsafe_view", ((3, 2),)),
    ("unsqueeze", (-1,)), ("view", (3, -1)), ("view", ((6,),)), ("view", (torch.int32,)),
]  # fmt: skip


@pytest.mark.parametrize("name, args", VIEWS)
def test_views(name: str, args: tuple[Any, ...]) -> None:
    x = torch.randn(2, 3, 1)
    found = getattr(gemskit, name)(x, *args)
    aten = getattr(torch.ops.aten, {"unsafe_view": "_unsafe_view"}.get(name, name))
    want = getattr(x, name)(*args) if hasattr(x, name) else aten(x, *args)
    for got, like in zip(found, want, strict=True) if isinstance(found, tuple) else [(found, want)]:
        same(got, like)
        assert got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_views_in_place_and_values() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert gemskit.t_(x) is x and x.shape == (3, 2)
    assert gemskit.transpose_(x, 0, 1).shape == (2, 3) and gemskit.unsqueeze_(x, 0).shape == (1, 2, 3)
    assert gemskit.squeeze_(x, 0).shape == gemskit.squeeze_(x).shape == (2, 3)
    assert gemskit.as_strided_(x, (3,), (2,)).tolist() == [0, 2, 4]
    assert gemskit.item(x[1]) == 2 and torch.equal(gemskit.t(x), x)
    x = torch.ones(3, requires_grad=True) * 2
    assert gemskit.detach_(x) is x and not x.requires_grad
    gemskit.assert_async(torch.tensor(1))
    with pytest.raises(RuntimeError):
        gemskit.assert_async(torch.tensor(0), "no")
    assert gemskit.new_empty(x, 2, 3).shape == (2, 3) and gemskit.empty_like(x, dtype=torch.int8).dtype == torch.int8
    assert gemskit.new_empty_strided(x, (2, 3), (1, 2)).stride() == (1, 2) and gemskit.empty(2, 3).shape == (2, 3)


# -- elsewhere -------------------------------------------------------------------------------------------------------------


def _many(x: Tensor) -> tuple[Tensor, ...]:
    made = gemskit.zeros_like(x) + gemskit.ones(3, 1) + gemskit.full((3, 4), 0.5) + gemskit.eye(3, 4)
    ranges = gemskit.arange(4) + gemskit.linspace(0, 1, 4) + gemskit.logspace(0, 1, 4)
    copied = gemskit.copy_(gemskit.new_empty(x, 3, 4), gemskit.clone(x)) + gemskit.to_copy(x, dtype=torch.float64)
    return made, ranges, copied, gemskit.contiguous(x.mT), gemskit.tril_indices(3, 3), gemskit.fill_(x.clone(), 2)


def test_compiled() -> None:
    x = torch.randn(3, 4)
    for got, want in zip(torch.compile(_many, fullgraph=True, backend="aot_eager")(x), _many(x), strict=True):
        torch.testing.assert_close(got, want)


def test_without_kernels() -> None:
    from gemskit._interpret import _scope

    x = torch.randn(3, 4)
    want = _many(x)
    token = _scope.set(None)
    try:
        assert "_fill" not in kernels(lambda: gemskit.zeros(3))
        for got, like in zip(_many(x), want, strict=True):
            torch.testing.assert_close(got, like)
    finally:
        _scope.reset(token)
