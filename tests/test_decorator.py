"""Elementwise operators as a researcher declares them: in a module of their own, with all that the decorator promises.

Each is called eagerly and under ``torch.compile``, by its meaning and by its kernel (under the interpreter), and compared with
plain torch in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from replaying import Fake, fake, faking, native, warm  # noqa: F401
from torch import Tensor

import gemskit
from gemskit import _launch, language
from gemskit._dtypes import Number
from gemskit.errors import ArgumentError, GemskitError, GradientError, ShapeError
from gemskit.pointwise import pointwise

# -- the researcher's module ----------------------------------------------------------------------------------------------------


@pointwise()
def gated(gate: Tensor, up: Tensor, beta: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """Several inputs and a number: ``gate * sigmoid(beta * gate) * up``, the gradient by formula."""
    return gate * torch.sigmoid(beta * gate) * up


@gated.formula
@triton.jit
def _(gate, up, beta):
    return gate * language.sigmoid(beta * gate) * up


@gated.gradient
@triton.jit
def _(grad, gate, up, beta):
    s = language.sigmoid(beta * gate)
    return grad * up * s * (1 + beta * gate * (1 - s)), grad * gate * s


@pointwise(results=2)
def polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Several outputs: the radius, and the share of ``x`` in it."""
    r = torch.sqrt(x * x + y * y + 1)
    return r, x / r


@polar.formula
@triton.jit
def _(x, y):
    r = language.sqrt(x * x + y * y + 1)
    return r, language.div(x, r)


@polar.gradient
@triton.jit
def _(grad, grad1, out, out1, y):
    return language.div(grad * out * out1 + grad1 * (1 - out1 * out1), out), language.div(
        y * (grad * out - grad1 * out1), out * out
    )


@pointwise(rounds=True)
def within(x: Tensor, low: Tensor | Number, high: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """A bool result, tensors or numbers: ``low <= x < high``."""
    return torch.ge(x, low) & torch.lt(x, high)


@within.formula
@triton.jit
def _(x, low, high):
    return (x >= low) & (x < high)


@pointwise(floats=("x",))
def level(x: Tensor, step: float, *, out: Tensor | None = None) -> Tensor:
    """An integer result of floats: which step ``x`` is on."""
    return torch.floor(x / step).to(torch.int32)


@level.formula
@triton.jit
def _(x, step):
    return tl.floor(language.div(x, tl.full((), 0, x.dtype) + step))


@pointwise()
def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A promotion of its own: halves are multiplied exactly, into float32."""
    wide = torch.promote_types(torch.result_type(a, b), torch.float32)
    return a.to(wide) * b.to(wide)


@product.formula
@triton.jit
def _(a, b):
    return a * b


@product.gradient
@triton.jit
def _(grad, a, b):
    return grad * b, grad * a


@pointwise(results=2)
def quantized(x: Tensor, scale: Tensor | Number) -> tuple[Tensor, Tensor]:
    """Outputs of two dtypes: int8 levels, and what rounding lost in float16, whatever the input is."""
    q = torch.clamp(torch.round(x.float() / scale), -127, 127)
    return q.to(torch.int8), (x.float() - q * scale).to(torch.float16)


@quantized.formula
@triton.jit
def _(x, scale):
    t = language.div(x, x * 0 + scale)
    q = tl.floor(t + 0.5)
    q = tl.where((q - t == 0.5) & (q % 2 != 0), q - 1, q)
    q = language.minimum(language.maximum(q, q * 0 - 127), q * 0 + 127)
    return q, x - q * scale


@quantized.gradient
@triton.jit
def _(grad1, x):
    return grad1, grad1 * 0


@pointwise()
def log_cosh(input: Tensor, target: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A loss whose gradient is composed of gemskit's operators."""
    d = input - target
    return d.abs() + torch.nn.functional.softplus(-2 * d.abs()) - 0.6931471805599453


@log_cosh.formula
@triton.jit
def _(input, target):
    d = tl.abs(input - target)
    return d + language.softplus(-2 * d) - 0.6931471805599453


@log_cosh.gradient_by
def _(grad: Tensor, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    slope = gemskit.mul(grad, gemskit.tanh(gemskit.sub(input, target)))
    return {"input": slope, "target": gemskit.neg(slope)}


gated_, within_, product_, log_cosh_ = gated.inplace, within.inplace, product.inplace, log_cosh.inplace
for op in (gated, polar, within, level, product, quantized, log_cosh):
    op.register()

# -- what it is called with -----------------------------------------------------------------------------------------------------

OPS: dict[str, tuple[Any, int, tuple[Any, ...]]] = {
    "gated": (gated, 2, (1.5,)),
    "polar": (polar, 2, ()),
    "within": (within, 1, (-0.5, 1)),
    "level": (level, 1, (0.25,)),
    "product": (product, 2, ()),
    "quantized": (quantized, 1, (0.05,)),
    "log_cosh": (log_cosh, 2, ()),
}
#: Results with gradients.
SMOOTH = ("gated", "polar", "product", "log_cosh")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(params=["meaning", "kernel"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    with gemskit.interpret() if request.param == "kernel" else contextlib.nullcontext():
        yield request.param


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def tensors(count: int, *shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shapes[i % len(shapes)], generator=g, dtype=F64).to(dtype) for i in range(count)]


def close(got: Any, want: Any) -> None:
    for g, w in zip(flat(got), flat(want), strict=True):
        assert g.shape == w.shape
        if not g.dtype.is_floating_point:
            assert torch.equal(g, w.to(g.dtype))
            continue
        unit = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double(), w.double(), rtol=6 * unit, atol=6 * unit, equal_nan=True)


def exact(op: Any, inputs: list[Tensor], numbers: tuple[Any, ...], dtypes: list[torch.dtype]) -> list[Tensor]:
    """The meaning in float64, rounded to the dtypes that the operator has."""
    found = flat(op.meaning(*[t.double() if t.is_floating_point() else t for t in inputs], *numbers))
    return [t.to(d) for t, d in zip(found, dtypes, strict=True)]


# -- eagerly --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("name", OPS)
def test_values_and_dtypes(name: str, dtype: torch.dtype, mode: str) -> None:
    op, count, numbers = OPS[name]
    inputs = tensors(count, (7, 1, 9), (5, 9), dtype=dtype)
    before = _launch.launches().total()
    found = flat(op(*inputs, *numbers))
    assert _launch.launches().total() - before == (mode == "kernel")
    dtypes = [t.dtype for t in flat(op.meaning(*inputs, *numbers))]
    assert [t.dtype for t in found] == dtypes
    # The meaning rounds halves at every step; that of `quantized` computes in float32 whatever it is given.
    same = mode == "meaning" or (name == "quantized" and dtype == F64)
    close(found, op.meaning(*inputs, *numbers) if same else exact(op, inputs, numbers, dtypes))


def test_promotion_is_the_meanings(mode: str) -> None:
    a, b = tensors(2, (40,), dtype=BF16)
    wide = product(a, b)
    assert wide.dtype == F32 and torch.equal(wide, a.float() * b.float()), "exact: nothing was rounded to bfloat16"
    assert product(a.double(), b).dtype == F64 and product(a, b.half()).dtype == F32
    assert within(a, 0, 1).dtype == torch.bool and level(a, 0.5).dtype == torch.int32
    x = torch.tensor([1 + 2**-20, -(2**-30)])
    q, rest = quantized(x, 1.0)
    assert q.dtype == torch.int8 and rest.dtype == F16, "computed in float32, rounded at the end"
    torch.testing.assert_close(rest.float(), torch.tensor([2**-20, -(2**-30)]).half().float())


@pytest.mark.parametrize("name", OPS)
def test_layouts_and_sizes(name: str, mode: str) -> None:
    op, count, numbers = OPS[name]
    for inputs in (
        tensors(count, (0, 3), (3,)),
        tensors(count, ()),
        tensors(count, (1, 4), (6, 1)),
        [t.t() for t in tensors(count, (8, 5))],
        [t[:, ::2] for t in tensors(count, (3, 10))],
        [t.expand(4, 3) for t in tensors(count, (3,), (1, 3))],
    ):
        close(op(*inputs, *numbers), op.meaning(*inputs, *numbers))


def test_tensors_and_numbers_for_a_parameter(mode: str) -> None:
    (x,) = tensors(1, (6, 5))
    low = torch.linspace(-1, 1, 6)[:, None]
    assert torch.equal(within(x, low, 2), (x >= low) & (x < 2))
    assert torch.equal(within(torch.arange(10), 2, 5.5), (torch.arange(10) >= 2) & (torch.arange(10) < 5.5))
    assert torch.equal(quantized(x, low.abs() + 0.1)[0], torch.round(x / (low.abs() + 0.1)).to(torch.int8))


def test_a_new_number_compiles_nothing() -> None:
    with gemskit.interpret():
        a, b = tensors(2, (8,))
        gated(a, b, 0.5)
        kernels = len(gated._formula._bound)  # type: ignore[union-attr]
        for beta in (0.25, 2.0, 3):
            gated(a, b, beta)
        assert len(gated._formula._bound) == kernels  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gated", "within", "level", "product", "log_cosh"])
def test_out(name: str, mode: str) -> None:
    op, count, numbers = OPS[name]
    inputs = tensors(count, (6, 1), (6, 4))
    want = op.meaning(*inputs, *numbers)
    out = torch.empty(want.shape[::-1], dtype=want.dtype).t()
    assert op(*inputs, *numbers, out=out) is out
    close(out, want)
    if want.is_floating_point():
        with pytest.raises(GemskitError, match=name):
            op(*inputs, *numbers, out=torch.empty(want.shape, dtype=torch.int32))


def test_in_place(mode: str) -> None:
    for op, write in ((gated, gated_), (product, product_), (log_cosh, log_cosh_)):
        a, b = tensors(2, (6, 4), (4,))
        want = op.meaning(a, b)
        assert write(a, b) is a
        close(a, want)
    (x,) = tensors(1, (9,))
    want = ((x >= 0) & (x < 1)).float()
    assert within_(x, 0, 1) is x and torch.equal(x, want)
    half = tensors(2, (5,), dtype=BF16)
    want = (half[0].float() * half[1].float()).bfloat16()
    assert torch.equal(product_(*half), want), "in place the result is rounded to the target's dtype"
    with pytest.raises((ShapeError, ArgumentError)):
        gated_(*tensors(2, (4,), (6, 4)))


def test_errors_name_the_operator_and_what_it_takes(mode: str) -> None:
    for call in (
        lambda: gated(torch.ones(3), torch.ones(4)),
        lambda: gated(1.0, 2.0),  # type: ignore[arg-type]
        lambda: within("a", 0, 1),  # type: ignore[arg-type]
        lambda: gated(torch.ones(3).to_sparse(), torch.ones(3)),
    ):
        with pytest.raises(GemskitError, match=r"(gated|within)"):
            call()
    if mode == "kernel":
        with pytest.raises(GemskitError, match="level"):
            level(torch.arange(4), 0.5)
    with pytest.raises(GradientError):
        gated(torch.ones(3, requires_grad=True), torch.ones(3), out=torch.empty(3))


# -- gradients ------------------------------------------------------------------------------------------------------------------


def gradients(fn: Callable[..., Any], inputs: list[Tensor], numbers: tuple[Any, ...]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outs = [o for o in flat(fn(*leaves, *numbers)) if o.requires_grad]
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(o.shape, generator=g, dtype=F64).bfloat16().to(o.dtype) for o in outs]
    return list(torch.autograd.grad(outs, leaves, weights))


@pytest.mark.parametrize("shapes", [((6, 4),), ((6, 1), (4,)), ((3, 1, 5), (2, 5)), ((0, 4), (4,))])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name: str, shapes: tuple[tuple[int, ...], ...], mode: str) -> None:
    op, count, numbers = OPS[name]
    inputs = tensors(count, *shapes)
    found = gradients(op, inputs, numbers)
    want = gradients(op.meaning, [t.double() for t in inputs], numbers)
    for g, w in zip(found, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_mixed_dtypes_have_the_dtypes_of_their_inputs(name: str, mode: str) -> None:
    op, count, numbers = OPS[name]
    a, b = tensors(count, (6, 4), (4,))
    found = gradients(op, [a, b.bfloat16()], numbers)
    assert [g.dtype for g in found] == [F32, BF16]
    want = gradients(op.meaning, [a.double(), b.bfloat16().double()], numbers)
    for g, w in zip(found, want, strict=True):
        # The meaning squares the bfloat16 operand in itself.
        unit = 4 * torch.finfo(g.dtype if mode == "kernel" else BF16).eps
        torch.testing.assert_close(g.double(), w, rtol=unit, atol=unit)


def test_gradients_run_as_kernels() -> None:
    with gemskit.interpret():
        a, b = (t.requires_grad_() for t in tensors(2, (6, 4), (4,)))
        y = log_cosh(a, b)
        with gemskit.record() as calls:
            torch.autograd.grad(y.sum(), (a, b))
        names = [call.kernel for call in calls]
        assert "meaning" not in names and {"sub", "tanh", "mul", "neg"} <= set(names)


@pytest.mark.parametrize("fake", ["python"], indirect=True)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_third_call_is_a_replay(name: str, fake: Fake) -> None:
    op, count, numbers = OPS[name]
    leaves = [t.requires_grad_() for t in tensors(count, (6, 4), (4,))]

    def step() -> tuple[Tensor, ...]:
        outs = flat(op(*leaves, *numbers))
        return torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    warm(step, fake)  # asserts that nothing was launched by Python


def test_only_some_results_and_inputs(mode: str) -> None:
    x, y = tensors(2, (4, 3))
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(polar(leaf, y)[1].sum(), leaf)
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(polar.meaning(wide, y.double())[1].sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    leaf = x.clone().requires_grad_()
    q, rest = quantized(leaf, 0.1)
    assert not q.requires_grad and rest.requires_grad
    if mode == "kernel":  # straight through; torch's gradient of the meaning is the same, by way of rounding
        assert torch.equal(torch.autograd.grad(rest.sum(), leaf)[0], torch.ones_like(leaf))
    assert not within(leaf, 0, 1).requires_grad and not level(leaf, 0.5).requires_grad


def test_in_place_gradient(mode: str) -> None:
    a, b = tensors(2, (6, 4))
    leaf = a.clone().requires_grad_()
    x = leaf * 1
    gated_(x, b)
    got = torch.autograd.grad(x.sum(), leaf)
    wide = a.double().requires_grad_()
    want = torch.autograd.grad(gated.meaning(wide, b.double()).sum(), wide)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)


# -- torch.compile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_compiled(name: str, mode: str) -> None:
    op, count, numbers = OPS[name]
    inputs = tensors(count, (6, 1), (4,))
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: op(*given, *numbers), backend="aot_eager", fullgraph=True)
    close(compiled(*inputs), flat(op.meaning(*inputs, *numbers)))
    if name in SMOOTH:
        got, want = gradients(compiled, inputs, ()), gradients(op, inputs, numbers)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compiled_with_outputs_without_gradients(mode: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: quantized(x, 0.1), backend="aot_eager", fullgraph=True)
    leaf = tensors(1, (5, 3))[0].requires_grad_()
    q, rest = compiled(leaf)
    assert not q.requires_grad
    assert torch.equal(torch.autograd.grad(rest.sum(), leaf)[0], torch.ones_like(leaf))


def test_compiled_in_place_and_out(mode: str) -> None:
    def body(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        gated(a, b, 0.5, out=out)
        return product_(a * 1, b)

    torch.compiler.reset()
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    a, b = tensors(2, (6, 4))
    out = torch.empty(6, 4)
    close(compiled(a, b, out), product.meaning(a, b))
    close(out, gated.meaning(a, b, 0.5))
