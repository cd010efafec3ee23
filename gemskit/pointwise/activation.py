"""Smooth activations: sigmoid, tanh, and the units made of exponentials."""

from __future__ import annotations

from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.errors import ArgumentError
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import Elementwise, pointwise


@pointwise(aten="silu", floats=("input",))
def silu(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sigmoid linear unit, ``input * sigmoid(input)``. Source: ``torch.nn.functional.silu``."""
    return torch.nn.functional.silu(input)


@silu.formula
@jit
def _(input, precise):
    return input * _fast.sigmoid(input, precise)


@jit
def silu_slope(grad, input, precise):
    """The gradient of :func:`silu`."""
    s = _fast.sigmoid(input, precise)
    return grad * s * (1 + input * _fast.rest(input, s, precise))


silu.gradient(silu_slope)


silu_ = silu.inplace


@pointwise(aten="sigmoid")
def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 / (1 + exp(-input))``. Source: ``torch.sigmoid``."""
    return torch.sigmoid(input)


@sigmoid.formula
@jit
def _(input, precise):
    return _fast.sigmoid(input, precise)


@sigmoid.gradient
@jit
def _(grad, out):
    return grad * (1 - out) * out


sigmoid_ = sigmoid.inplace


@pointwise(aten="tanh")
def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Hyperbolic tangent. Source: ``torch.tanh``."""
    return torch.tanh(input)


@tanh.formula
@jit
def _(input, precise):
    return _fast.tanh(input, precise)


@tanh.gradient
@jit
def _(grad, out):
    return grad * (1 - out * out)


tanh_ = tanh.inplace


@pointwise(aten="gelu", floats=("input",))
def gelu(input: Tensor, *, approximate: Literal["none", "tanh"] = "none", out: Tensor | None = None) -> Tensor:
    """Gaussian error linear unit: ``input * P(N(0, 1) <= input)``, or its approximation by tanh.

    Source: ``torch.nn.functional.gelu``; Hendrycks & Gimpel 2016.
    """
    return torch.nn.functional.gelu(input, approximate=approximate)


@jit
def _gelu_tanh(x):
    """``sqrt(2 / pi) * (x + 0.044715 x**3)``, whose tanh is taken, and its derivative."""
    square = x * x
    inner = x * (0.7978845608028654 + 0.035677408136300125 * square)
    return inner, 0.7978845608028654 + 0.10703222440890037 * square


@gelu.formula
@jit
def _(input, approximate, precise):
    if approximate == "tanh":
        inner, _ = _gelu_tanh(input)
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return input * _fast.sigmoid(2 * inner, precise)
    else:
        return input * _fast.normal(input, precise)


@jit
def gelu_slope(input, approximate, precise):
    """The derivative of :func:`gelu`."""
    if approximate == "tanh":
        inner, slope = _gelu_tanh(input)
        s = _fast.sigmoid(2 * inner, precise)
        return s + s * _fast.rest(2 * inner, s, precise) * input * (2 * slope)
    else:
        return _fast.normal(input, precise) + input * _fast.density(input, precise)


@gelu.gradient
@jit
def _(grad, input, approximate, precise):
    return grad * gelu_slope(input, approximate, precise)


gelu_ = gelu.inplace


# -- exponential units ---------------------------------------------------------------------------------------------------


@jit
def elu_slope(grad, input, alpha, scale, input_scale, precise):
    """The gradient of :func:`elu`."""
    low = grad * (input_scale * alpha * scale) * _fast.exp(input * input_scale, precise)
    return tl.where(input <= 0, low, grad * scale)


@jit
def _elu(input, alpha, scale, input_scale, precise):
    low = _fast.expm1(input * input_scale, precise) * (alpha * scale)
    return tl.where(input <= 0, low, input * scale)


@pointwise(aten="elu", floats=("input",))
def elu(
    input: Tensor, alpha: float = 1.0, *, scale: float = 1.0, input_scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``scale * input`` where positive, else ``scale * alpha * (exp(input_scale * input) - 1)``.

    Source: ``torch.nn.functional.elu``; Clevert et al. 2016.
    """
    return torch.ops.aten.elu(input, alpha, scale, input_scale)  # type: ignore[no-any-return]


elu.formula(_elu)
elu.gradient(elu_slope)
elu_ = elu.inplace


@pointwise(floats=("input",))
def _celu(input: Tensor, alpha: float) -> Tensor:
    """:func:`celu` with an ``alpha`` that is not 0."""
    return torch.celu(input, alpha)


@_celu.formula
@jit
def _(input, alpha, precise):
    return _elu(input, alpha, 1.0, 1 / alpha, precise)


@_celu.gradient
@jit
def _(grad, input, alpha, precise):
    return elu_slope(grad, input, alpha, 1.0, 1 / alpha, precise)


def _nonzero(alpha: float) -> float:
    if alpha == 0:
        raise ArgumentError("celu: alpha must not be 0")
    return alpha


def celu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """``max(0, input) + min(0, alpha * (exp(input / alpha) - 1))``. Source: ``torch.celu``; Barron 2017."""
    return _celu(input, _nonzero(alpha))


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """In-place :func:`celu`: overwrites ``input``."""
    return _celu.inplace(input, _nonzero(alpha))


@pointwise(aten="selu", floats=("input",))
def selu(input: Tensor) -> Tensor:
    """:func:`elu` with the scales that keep mean 0 and variance 1. Source: ``torch.selu``; Klambauer et al. 2017."""
    return torch.selu(input)


@selu.formula
@jit
def _(input, precise):
    return _elu(input, 1.6732632423543772, 1.0507009873554805, 1.0, precise)


@selu.gradient
@jit
def _(grad, input, precise):
    return elu_slope(grad, input, 1.6732632423543772, 1.0507009873554805, 1.0, precise)


selu_ = selu.inplace

# -- smooth units --------------------------------------------------------------------------------------------------------


@pointwise(aten="softplus", floats=("input",))
def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, out: Tensor | None = None) -> Tensor:
    """``log(1 + exp(beta * input)) / beta``; ``input`` itself where ``beta * input > threshold``.

    Source: ``torch.nn.functional.softplus``.
    """
    return torch.nn.functional.softplus(input, beta, threshold)


@softplus.formula
@jit
def _(input, beta, threshold, precise):
    x = input * beta
    curve = _fast.log1p_exp(x, precise)
    if precise:
        return tl.where(x > threshold, input, language.div(tl.where(x > 0, x, 0) + curve, beta))
    else:
        # Choosing from two sums would round each by itself.
        line = tl.where(x > tl.minimum(threshold, 0.0), input, 0)
        return tl.where(x > threshold, 0, curve) * (1 / beta) + line


@jit
def softplus_slope(grad, input, beta, threshold, precise):
    """The gradient of :func:`softplus`."""
    x = input * beta
    return tl.where(x > threshold, grad, grad * _fast.sigmoid(x, precise))


softplus.gradient(softplus_slope)


@pointwise(aten="log_sigmoid", floats=("input",))
def log_sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``log(1 / (1 + exp(-input)))``. Source: ``torch.nn.functional.logsigmoid``."""
    return torch.nn.functional.logsigmoid(input)


@log_sigmoid.formula
@jit
def _(input, precise):
    return tl.where(input < 0, input, 0) - _fast.log1p_exp(input, precise)


@log_sigmoid.gradient
@jit
def _(grad, input, precise):
    return grad * _fast.sigmoid(-input, precise)


@jit
def _tanh_softplus(x, precise):
    """``tanh(log(1 + e**x)) = w / (w + 2)`` with ``w = e**x (e**x + 2)``, 1 from 20 on; then ``e**x``, ``w``, ``1 / (w + 2)``."""
    e = _fast.exp(x, precise)
    w = e * (e + 2)
    r = _fast.inverse(w + 2, precise)
    return tl.where(x > 20, 1.0, w * r), e, w, r


@jit
def mish_slope(input, precise):
    """The derivative of :func:`mish`."""
    t, e, w, r = _tanh_softplus(input, precise)
    # sigmoid times 1 - t**2; zero times an infinite input is NaN, as torch.
    rest = tl.where(input > 20, 0.0, e * _fast.inverse(1 + e, precise) * (4 * (w + 1) * r * r))
    return t + input * rest


@pointwise(aten="mish", floats=("input",))
def mish(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input * tanh(softplus(input))``. Source: ``torch.nn.functional.mish``; Misra 2019."""
    return torch.nn.functional.mish(input)


@mish.formula
@jit
def _(input, precise):
    if precise:
        t, _, _, _ = _tanh_softplus(input, precise)
        return input * t
    else:
        return _fast.mish(input)


@mish.gradient
@jit
def _(grad, input, precise):
    return grad * mish_slope(input, precise)


mish_ = mish.inplace


@pointwise()
def quick_gelu(input: Tensor) -> Tensor:
    """``input * sigmoid(1.702 * input)``: CLIP's approximation of :func:`gelu`."""
    return input * torch.sigmoid(1.702 * input)


@quick_gelu.formula
@jit
def _(input, precise):
    return input * _fast.sigmoid(1.702 * input, precise)


@quick_gelu.gradient
@jit
def _(grad, input, precise):
    s = _fast.sigmoid(1.702 * input, precise)
    return grad * (s + s * _fast.rest(1.702 * input, s, precise) * input * 1.702)


# -- gates ---------------------------------------------------------------------------------------------------------------


@jit
def _gated(value, gate, precise):
    return value * _fast.sigmoid(gate, precise)


@jit
def _gated_grad(grad, value, gate, precise):
    s = _fast.sigmoid(gate, precise)
    return grad * s, grad * value * (s * _fast.rest(gate, s, precise))


_GLU = Elementwise("glu", _gated)
_GLU_GRAD = Elementwise("glu_grad", _gated_grad, results=2)


def _halves(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    half = input.shape[dim] // 2
    return input.narrow(dim, 0, half), input.narrow(dim, half, half)


@operator(aten="glu", floats=("input",))
def glu(input: Tensor, dim: int = -1, *, out: Tensor | None = None) -> Tensor:
    """``a * sigmoid(b)`` of the two halves of ``input`` along ``dim``, whose size is even.

    Source: ``torch.nn.functional.glu``; Dauphin et al. 2017.
    """
    return torch.nn.functional.glu(input, dim)


@glu.kernel
def _(outs: tuple[Tensor], keep: dict[str, Tensor] | None, input: Tensor, dim: int) -> None:
    value, gate = _halves(input, dim)
    _GLU({"value": value, "gate": gate}, outs, compute_type(input.dtype))


def glu_slope(grad: Tensor, input: Tensor, dim: int, into: Tensor) -> None:
    """Write the gradient of :func:`glu` into ``into``, a tensor like ``input``."""
    value, gate = _halves(input, dim)
    _GLU_GRAD({"grad": grad, "value": value, "gate": gate}, _halves(into, dim), compute_type(input.dtype))


@glu.gradient_by
def _(grad: Tensor, input: Tensor, dim: int) -> dict[str, Tensor | None]:
    found = torch.empty_like(input)
    glu_slope(grad, input, dim, found)
    return {"input": found}
