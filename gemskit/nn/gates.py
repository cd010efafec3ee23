"""Gated activations: one half gates the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._layout import contiguous
from gemskit._op import Named, P, R
from gemskit.errors import DtypeError, ShapeError
from gemskit.pointwise._drive import Elementwise, Pointwise


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the last dimension, as views."""
    d = x.shape[-1] // 2
    return x.narrow(-1, 0, d), x.narrow(-1, d, d)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements at even and at odd places of the last dimension, as views."""
    first, second = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    return first, second


class _Gate(Pointwise[P, R]):
    """An elementwise operator of ``x`` and ``y``, which are the halves of ``x`` where ``y`` is None."""

    parts = staticmethod(halves)

    # A packed input has another shape than the result: it cannot be overwritten.
    elementwise = False

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        if values[1] is not None:
            return super().shapes(values)
        size = tuple(values[0].shape)
        plain = size and 0 not in size and size[-1] % 2 == 0 and values[0].stride() == contiguous(size)
        return [(*size[:-1], size[-1] // 2)] if plain else None

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        if named["y"] is not None:
            return super().plan(named, outs)
        run = super().plan(self._unpacked(named), outs)
        return lambda outs, keep, arguments: run(outs, keep, self._unpacked(arguments))

    def _unpacked(self, named: Named) -> dict[str, Any]:
        x, y = self.parts(named["x"])
        return {**named, "x": x, "y": y}

    def gradient(self, fn: Any) -> Any:
        super().gradient(fn)
        two, names = self._vjp, self._saves
        assert two is not None
        kernel = Elementwise(f"{self.name}_grad", fn, results=2)

        def vjp(**named: Any) -> Mapping[str, Tensor | None]:
            if named["y"] is not None:
                return two(**named)
            grad, x = named["grad"], named["x"]
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            outs: Sequence[Tensor] = self.parts(dx)
            named = self._unpacked(named)
            kernel(named, outs, compute_type(grad.dtype))
            return {"x": dx}

        self.set_gradient(vjp, names, self.differentiable)
        return fn


class _Interleaved(_Gate[P, R]):
    """The same of the elements at even and at odd places."""

    parts = staticmethod(pairs)


def _operands(
    name: str, x: Tensor, y: Tensor | None, parts: Callable[[Tensor], tuple[Tensor, Tensor]] = halves
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gate and factor in the type computed in, and the dtype of the result."""
    if y is None:
        if not x.ndim or x.shape[-1] % 2:
            raise ShapeError(f"{name}: packed x must have a last dimension of even size, given shape {list(x.shape)}")
        x, y = parts(x)
    dtype = torch.result_type(x, y)
    if not x.is_floating_point() or not y.is_floating_point():
        raise DtypeError(f"{name}: x and y must be floating point, given {x.dtype} and {y.dtype}")
    return x.to(compute_type(dtype)), y.to(compute_type(dtype)), dtype


def _gate(meaning: Callable[P, R]) -> _Gate[P, R]:
    return _Gate(meaning)


@_gate
def silu_and_mul(x: Tensor, y: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(x) * y``; without ``y`` the last dimension of ``x`` holds both: ``silu(x[..., :d]) * x[..., d:]``.

    Computed in float32 (float64 for float64) and rounded once; ``x`` and ``y`` broadcast. Source: SwiGLU (Shazeer 2020).
    """
    gate, up, dtype = _operands("silu_and_mul", x, y)
    return (F.silu(gate) * up).to(dtype)


@silu_and_mul.formula
@jit
def _(x, y):
    return x * language.sigmoid(x) * y


@silu_and_mul.gradient
@jit
def _(grad, x, y):
    s = language.sigmoid(x)
    return grad * y * (s * (1 + x * (1 - s))), grad * (x * s)


@_gate
def gelu_and_mul(x: Tensor, y: Tensor | None = None, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """``gelu(x) * y``; without ``y`` the last dimension of ``x`` holds both: ``gelu(x[..., :d]) * x[..., d:]``.

    ``approximate`` is ``"none"`` or ``"tanh"``. Computed in float32 (float64 for float64) and rounded once; ``x`` and ``y``
    broadcast. Source: GEGLU (Shazeer 2020).
    """
    gate, up, dtype = _operands("gelu_and_mul", x, y)
    return (F.gelu(gate, approximate=approximate) * up).to(dtype)


@jit
def _share(x, approximate: tl.constexpr):
    """``gelu(x) = x * share`` and the slope of the share."""
    if approximate == "tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = language.tanh(inner)
        # Where tanh is flat its slope is 0, however steep the inner polynomial is (0 * inf would be NaN).
        steep = tl.where(t * t == 1, 0, 0.7978845608028654 * (1 + 3 * 0.044715 * x * x))
        return 0.5 * (1 + t), 0.5 * (1 - t * t) * steep
    else:
        return 0.5 * (1 + language.erf(x * 0.7071067811865476)), 0.3989422804014327 * language.exp(-0.5 * x * x)


@gelu_and_mul.formula
@jit
def _(x, y, approximate):
    share, _slope = _share(x, approximate)
    return x * share * y


@gelu_and_mul.gradient
@jit
def _(grad, x, y, approximate):
    share, slope = _share(x, approximate)
    return grad * y * (share + x * slope), grad * (x * share)


def gelu_tanh_and_mul(x: Tensor, y: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """:func:`gelu_and_mul` with ``approximate="tanh"``."""
    return gelu_and_mul(x, y, approximate="tanh", out=out)


def mul_and_silu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``x[..., :d] * silu(x[..., d:])`` for packed ``x`` (..., 2d): :func:`silu_and_mul` with the halves swapped."""
    first, second = _packed("mul_and_silu", x)
    return silu_and_mul(second, first, out=out)


def swiglu(input: Tensor) -> Tensor:
    """``silu(input[..., :d]) * input[..., d:]`` for packed ``input`` (..., 2d). Source: Shazeer 2020."""
    return silu_and_mul(input)


def geglu(input: Tensor) -> Tensor:
    """``gelu(input[..., :d]) * input[..., d:]`` with gelu's tanh form, for packed ``input`` (..., 2d). Source: Shazeer 2020."""
    return gelu_and_mul(input, approximate="tanh")


def _packed(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.ndim or x.shape[-1] % 2:
        raise ShapeError(f"{name}: packed x must have a last dimension of even size, given shape {list(x.shape)}")
    return halves(x)


@_gate
def relu_and_mul(x: Tensor, y: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``relu(x) * y``; without ``y`` the last dimension of ``x`` holds both: ``relu(x[..., :d]) * x[..., d:]``.

    Computed in float32 (float64 for float64) and rounded once; ``x`` and ``y`` broadcast. Source: ReGLU (Shazeer 2020).
    """
    gate, up, dtype = _operands("relu_and_mul", x, y)
    return (F.relu(gate) * up).to(dtype)


@relu_and_mul.formula
@jit
def _(x, y):
    return language.relu(x) * y


@relu_and_mul.gradient
@jit
def _(grad, x, y):
    return grad * y * language.d_relu(x), grad * language.relu(x)


def reglu(input: Tensor) -> Tensor:
    """``relu(input[..., :d]) * input[..., d:]`` for packed ``input`` (..., 2d). Source: Shazeer 2020."""
    return relu_and_mul(input)


# -- gates with bounds ----------------------------------------------------------------------------------------------------


@jit
def _below(x, limit):
    return tl.where(x > limit, limit, x)


@jit
def _within(x, limit):
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@_gate
def silu_and_mul_with_clamp(
    x: Tensor, y: Tensor | None = None, limit: float = 7.0, *, out: Tensor | None = None
) -> Tensor:
    """``silu(min(x, limit)) * clamp(y, -limit, limit)``; without ``y`` the last dimension of ``x`` holds both as halves.

    Computed in float32 (float64 for float64) and rounded once; ``x`` and ``y`` broadcast. No gradient beyond the bounds.
    """
    gate, up, dtype = _operands("silu_and_mul_with_clamp", x, y)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(dtype)


@silu_and_mul_with_clamp.formula
@jit
def _(x, y, limit):
    x = _below(x, limit)
    return x * language.sigmoid(x) * _within(y, limit)


@silu_and_mul_with_clamp.gradient
@jit
def _(grad, x, y, limit):
    gate, up = _below(x, limit), _within(y, limit)
    s = language.sigmoid(gate)
    dx = tl.where(x > limit, 0, grad * up * (s * (1 + gate * (1 - s))))
    return dx, tl.where(tl.abs(y) > limit, 0, grad * (gate * s))


@_Interleaved
def swigluoai_and_mul(
    x: Tensor, y: Tensor | None = None, alpha: float = 1.702, limit: float = 7.0, *, out: Tensor | None = None
) -> Tensor:
    """``(u + 1) * g * sigmoid(alpha * g)`` with ``g = min(x, limit)`` and ``u = clamp(y, -limit, limit)``.

    Without ``y`` the last dimension of ``x`` holds both in turn: ``x[..., 0::2]`` and ``x[..., 1::2]``. Computed in float32
    (float64 for float64) and rounded once; ``x`` and ``y`` broadcast. No gradient beyond the bounds. Source: gpt-oss.
    """
    gate, up, dtype = _operands("swigluoai_and_mul", x, y, pairs)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(alpha * gate))).to(dtype)


@swigluoai_and_mul.formula
@jit
def _(x, y, alpha, limit):
    x = _below(x, limit)
    return (_within(y, limit) + 1) * (x * language.sigmoid(alpha * x))


@swigluoai_and_mul.gradient
@jit
def _(grad, x, y, alpha, limit):
    gate, up = _below(x, limit), _within(y, limit) + 1
    s = language.sigmoid(alpha * gate)
    dx = tl.where(x > limit, 0, grad * up * (s * (1 + alpha * gate * (1 - s))))
    return dx, tl.where(tl.abs(y) > limit, 0, grad * (gate * s))
