"""Activations."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit.pointwise._drive import pointwise


@pointwise(aten="silu", floats=("input",))
def silu(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sigmoid linear unit, ``input * sigmoid(input)``. Source: ``torch.nn.functional.silu``."""
    return torch.nn.functional.silu(input)


@silu.formula
@triton.jit
def _(input):
    return input * language.sigmoid(input)


@silu.gradient
@triton.jit
def _(grad, input):
    s = language.sigmoid(input)
    return grad * s * (1 + input * (1 - s))


silu_ = silu.inplace


@pointwise(aten="sigmoid")
def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``1 / (1 + exp(-input))``. Source: ``torch.sigmoid``."""
    return torch.sigmoid(input)


@sigmoid.formula
@triton.jit
def _(input):
    return language.sigmoid(input)


@sigmoid.gradient
@triton.jit
def _(grad, out):
    return grad * (1 - out) * out


sigmoid_ = sigmoid.inplace


@pointwise(aten="tanh")
def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Hyperbolic tangent. Source: ``torch.tanh``."""
    return torch.tanh(input)


@tanh.formula
@triton.jit
def _(input):
    return language.tanh(input)


@tanh.gradient
@triton.jit
def _(grad, out):
    return grad * (1 - out * out)


tanh_ = tanh.inplace


@pointwise(aten="relu")
def relu(input: Tensor) -> Tensor:
    """``input`` where positive, else 0; NaN stays. The gradient at 0 is 0. Source: ``torch.relu``."""
    return torch.relu(input)


@relu.formula
@triton.jit
def _(input):
    return tl.where(input < 0, 0, input)


@relu.gradient
@triton.jit
def _(grad, out):
    return tl.where(out <= 0, 0, grad)


relu_ = relu.inplace


@pointwise(aten="gelu", floats=("input",))
def gelu(input: Tensor, *, approximate: Literal["none", "tanh"] = "none", out: Tensor | None = None) -> Tensor:
    """Gaussian error linear unit: ``input * P(N(0, 1) <= input)``, or its approximation by tanh.

    Source: ``torch.nn.functional.gelu``; Hendrycks & Gimpel 2016.
    """
    return torch.nn.functional.gelu(input, approximate=approximate)


@triton.jit
def _gelu_tanh(x):
    """``tanh(sqrt(2 / pi) * (x + 0.044715 x**3))``."""
    return language.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


@gelu.formula
@triton.jit
def _(input, approximate):
    if approximate == "tanh":
        return 0.5 * input * (1 + _gelu_tanh(input))
    else:
        return input * 0.5 * (1 + language.erf(input * 0.7071067811865476))


@gelu.gradient
@triton.jit
def _(grad, input, approximate):
    if approximate == "tanh":
        t = _gelu_tanh(input)
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * input * input)
        return grad * (0.5 * (1 + t) + 0.5 * input * (1 - t * t) * inner)
    else:
        cdf = 0.5 * (1 + language.erf(input * 0.7071067811865476))
        pdf = language.exp(-0.5 * input * input) * 0.3989422804014327
        return grad * (cdf + input * pdf)
