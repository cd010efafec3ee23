"""Epilogues of products and gated products: functions written by users, every kernel, gradients, replays, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from replaying import Fake, fake, native, warm  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import Epilogue, _launch, epilogues
from gemskit._interpret import interpret
from gemskit.blas import addmm_, linear, mm
from gemskit.blas._epilogue import DERIVED
from gemskit.errors import ArgumentError, DtypeError, GradientError, ShapeError


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found.dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@triton.jit
def leaky(acc, bias, slope):
    acc += bias
    return tl.where(acc > 0, acc, acc * slope)


@triton.jit
def doubled(acc):
    return acc * 2


def leaky_meaning(acc: Tensor, bias: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(acc + bias, slope)


#: Rows: one and a few run in the kernel of few rows, the others in tiles.
ROWS = (1, 9, 40)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", ROWS)
def test_any_jit_function_with_operands(m: int, dtype: torch.dtype, kernels: bool) -> None:
    a, w, bias = rand(m, 24, dtype=dtype), rand(20, 24, dtype=dtype), rand(20, dtype=torch.float32)
    for meaning in (None, leaky_meaning):
        with interpret() if kernels else nullcontext(), _launch.record() as calls:
            found = linear(a, w, epilogue=Epilogue(leaky, meaning, bias=bias, slope=0.25))
        assert found.dtype == dtype
        close(found, leaky_meaning(a.double() @ w.double().mT, bias.double(), 0.25))
        if kernels:
            (call,) = calls
            assert call.kernel.startswith("linear_leaky") and call.kernel.endswith("few") == (
                m == 1 or (m < 17 and dtype == torch.bfloat16)
            )


def products() -> Iterator[tuple[Any, tuple[Tensor, ...], dict[str, Any], Tensor]]:
    a, b, c = rand(18, 20), rand(20, 33), rand(18, 33)
    x, y = rand(2, 18, 20), rand(2, 20, 33)
    yield gemskit.mm, (a, b), {}, a @ b
    yield gemskit.addmm, (c, a, b), {"beta": 0.5, "alpha": 2}, torch.addmm(c, a, b, beta=0.5, alpha=2)
    yield gemskit.bmm, (x, y), {}, x @ y
    yield gemskit.baddbmm, (c, x, y), {"beta": 2}, torch.baddbmm(c, x, y, beta=2)
    yield gemskit.linear, (x, b.mT.contiguous(), c[0]), {}, F.linear(x, b.mT, c[0])
    yield gemskit.linear, (a[0], b.mT.contiguous()), {}, F.linear(a[0], b.mT)


@pytest.mark.parametrize("case", list(products()), ids=lambda c: c[0].name)
def test_every_product_takes_one(case: Any) -> None:
    op, args, kwargs, wanted = case
    for ep, after in (
        (doubled, 2 * wanted),
        (gemskit.silu, F.silu(wanted)),
        (epilogues.gelu_tanh, F.gelu(wanted, approximate="tanh")),
        (epilogues.residual(wanted[..., :1], 0.5).then(epilogues.relu), F.relu(wanted + 0.5 * wanted[..., :1])),
    ):
        close(op(*args, **kwargs, epilogue=ep), after)
        out = torch.empty_like(wanted)
        with interpret():
            close(op(*args, **kwargs, epilogue=ep), after)
            assert op(*args, **kwargs, epilogue=ep, out=out) is out
        close(out, after)
        close(op.meaning(*args, **kwargs, epilogue=ep), after)


def test_in_place() -> None:
    x, a, b = rand(6, 8), rand(6, 5), rand(5, 8)
    wanted = F.silu(torch.addmm(x, a, b))
    with interpret():
        assert addmm_(x, a, b, epilogue=gemskit.silu) is x
    close(x, wanted)


def ready() -> Iterator[tuple[str, Any, Any, tuple[Tensor, ...]]]:
    row, column, whole = rand(33), rand(18), rand(18, 33)
    yield "bias", epilogues.bias, lambda x, t: x + t, (row,)
    yield "residual", epilogues.residual, lambda x, t: x + t, (whole,)
    yield "scale_rows", epilogues.scale_rows, lambda x, t: x * t[:, None], (column,)
    yield "scale_columns", epilogues.scale_columns, lambda x, t: x * t, (row,)
    yield "gelu", lambda: epilogues.gelu, F.gelu, ()
    yield "gelu_tanh", lambda: epilogues.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), ()
    yield "silu", lambda: epilogues.silu, F.silu, ()
    yield "relu", lambda: epilogues.relu, F.relu, ()
    yield "relu2", lambda: epilogues.relu2, lambda x: F.relu(x).square(), ()
    yield "bias, silu", lambda t: epilogues.bias(t).then(epilogues.silu), lambda x, t: F.silu(x + t), (row,)
    yield (
        "bias, gelu, scale, residual",
        lambda b, s, r: (
            epilogues.bias(b).then(epilogues.gelu).then(epilogues.scale_rows(s)).then(epilogues.residual(r))
        ),
        lambda x, b, s, r: F.gelu(x + b) * s[:, None] + r,
        (row, column, whole),
    )


@pytest.mark.parametrize("case", list(ready()), ids=lambda c: c[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ready_ones_and_their_gradients(case: Any, dtype: torch.dtype) -> None:
    _, make, meaning, operands = case
    given = [rand(18, 20, dtype=dtype), rand(33, 20, dtype=dtype), *(t.to(dtype) for t in operands)]
    ours, theirs = [t.clone().requires_grad_() for t in given], [t.double().requires_grad_() for t in given]
    seed = rand(18, 33, dtype=dtype, seed=5)
    wanted = meaning(theirs[0] @ theirs[1].mT, *theirs[2:])
    wanted.backward(seed.double())
    for kernels in (True, False):
        with interpret() if kernels else nullcontext():
            found = mm(ours[0], ours[1].mT, epilogue=make(*ours[2:]))
            close(found, wanted)
            for mine, its, g in zip(ours, theirs, torch.autograd.grad(found, ours, seed)):
                assert its.grad is not None and g.dtype == mine.dtype
                tolerance = 1e-3 if dtype == torch.float32 else 0.05
                torch.testing.assert_close(g.double(), its.grad, rtol=tolerance, atol=tolerance * float(its.grad.std()))


def test_a_product_is_computed_again_only_where_a_gradient_reads_it() -> None:
    a, b, bias = (t.requires_grad_() for t in (rand(18, 20), rand(20, 33), rand(33)))
    with interpret():
        for ep, again in ((epilogues.bias(bias), 0), (epilogues.silu, 1)):
            found = mm(a, b, epilogue=ep)
            with _launch.record() as calls:
                found.sum().backward()
            assert len([c for c in calls if c.kernel.startswith("mm")]) == 2 + again


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised(dtype: torch.dtype) -> None:
    a, b, scale = rand(40, 24, dtype=torch.bfloat16), rand(24, 20, dtype=torch.bfloat16), torch.tensor([0.01])
    most = torch.finfo(dtype).max
    wanted = ((a.float() @ b.float()) / scale).clamp(-most, most)
    for s in (scale, 0.01):
        with interpret():
            found = mm(a, b, epilogue=epilogues.quantise(s, dtype))
        assert found.dtype == dtype and mm(a, b, epilogue=epilogues.quantise(s, dtype)).dtype == dtype
        torch.testing.assert_close(
            found.float(), wanted, rtol=0.07 if dtype == torch.float8_e4m3fn else 0.13, atol=0.02
        )


def test_numbers_make_no_new_operator_and_few_are_kept() -> None:
    a, b = rand(18, 20), rand(20, 33)
    mm._derived.clear()
    for k in range(5):
        close(
            mm(a, b, epilogue=Epilogue(leaky, leaky_meaning, bias=rand(33), slope=k / 4)),
            leaky_meaning(a @ b, rand(33), k / 4),
        )
    assert len(mm._derived) == 1
    for _ in range(DERIVED + 3):
        mm(a, b, epilogue=Epilogue(doubled, lambda acc: 2 * acc))
    assert len(mm._derived) <= DERIVED


def test_no_gradient() -> None:
    a, b = rand(18, 20).requires_grad_(), rand(20, 33)
    for scope in (interpret(), nullcontext()):
        with scope, pytest.raises(GradientError, match=r"doubled.*@pointwise.*torch.no_grad"):
            mm(a, b, epilogue=doubled)
        with torch.no_grad():
            mm(a, b, epilogue=doubled)
    mm(a, b, epilogue=Epilogue(doubled, lambda acc: 2 * acc)).sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize("kernels", [True, False])
def test_refusals(kernels: bool) -> None:
    a, b = rand(18, 20), rand(20, 33)
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ArgumentError, "@triton.jit function", (a, b), 3),
        (ArgumentError, r"leaky.*\['bias', 'slope'\]", (a, b), leaky),
        (ArgumentError, r"no operands \['scale'\]", (a, b), Epilogue(doubled, scale=1)),
        (RuntimeError, "names the accumulator acc", (a, b), Epilogue(lacking)),
        (ShapeError, "bias.*does not broadcast", (a, b), Epilogue(leaky, leaky_meaning, bias=rand(3), slope=1)),
        (DtypeError, "epilogue|floating", (a.int(), b.int()), doubled),
        (ArgumentError, "elementwise operator", (a, b), gemskit.sum),
    ]
    for kind, match, args, ep in cases:
        with interpret() if kernels else nullcontext(), pytest.raises(kind, match=match):
            mm(*args, epilogue=ep)


@triton.jit
def lacking(x):
    return x


@pytest.mark.parametrize("fake", ["python", "native"], indirect=True)
def test_calls_are_replayed(fake: Fake) -> None:
    a, b, bias = rand(18, 20), rand(20, 33), rand(33)
    slopes = iter((0.5, 0.25, 0.125))
    warm(lambda: mm(a, b, epilogue=Epilogue(leaky, leaky_meaning, bias=bias, slope=next(slopes))), fake)
    x = a.clone().requires_grad_()
    warm(lambda: mm(x, b, epilogue=epilogues.bias(bias).then(epilogues.silu)), fake)
    warm(lambda: mm(x, b, epilogue=epilogues.bias(bias).then(epilogues.silu)).backward(torch.ones(18, 33)), fake)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        ((rand(37, 20), rand(3, 20, 18), ends(5, 5, 30)), (37, 18)),
        ((rand(3, 18, 20), rand(20, 37), ends(5, 30, 37)), (18, 37)),
        ((rand(18, 37), rand(37, 20), ends(5, 5, 37)), (3, 18, 20)),
        ((rand(3, 7, 20), rand(3, 20, 18)), (3, 7, 18)),
    ],
    ids=["rows", "columns", "steps", "batches"],
)
def test_grouped_products_take_one(case: Any, kernels: bool) -> None:
    args, shape = case
    wanted = gemskit.grouped_mm.meaning(*args)
    bias, residual = rand(shape[-1]), rand(*shape)
    with interpret() if kernels else nullcontext():
        close(
            gemskit.grouped_mm(*args, epilogue=Epilogue(leaky, leaky_meaning, bias=bias, slope=0.5)),
            leaky_meaning(wanted, bias, 0.5),
        )
        ep = epilogues.residual(residual).then(epilogues.silu)
        close(gemskit.grouped_mm(*args, epilogue=ep), F.silu(wanted + residual))
        a, b, r = (t.clone().requires_grad_() for t in (*args[:2], residual))
        ep = epilogues.residual(r).then(epilogues.silu)
        gemskit.grouped_mm(a, b, *args[2:], epilogue=ep).sum().backward()
    x, y, z = (t.clone().requires_grad_() for t in (*args[:2], residual))
    F.silu(gemskit.grouped_mm.meaning(x, y, *args[2:]) + z).sum().backward()
    for mine, its in ((a, x), (b, y), (r, z)):
        assert mine.grad is not None and its.grad is not None
        close(mine.grad, its.grad)
