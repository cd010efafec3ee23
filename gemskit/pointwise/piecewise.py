"""Activations made of straight pieces."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.errors import ArgumentError, ShapeError
from gemskit.pointwise._drive import pointwise


@pointwise(aten="relu")
def relu(input: Tensor) -> Tensor:
    """``input`` where positive, else 0; NaN stays. The gradient at 0 is 0. Source: ``torch.relu``."""
    return torch.relu(input)


@relu.formula
@jit
def _(input):
    return tl.where(input < 0, 0, input)


@relu.gradient
@jit
def _(grad, out):
    return tl.where(out <= 0, 0, grad)


relu_ = relu.inplace


@pointwise()
def relu_squared(input: Tensor) -> Tensor:
    """``max(input, 0) ** 2``; NaN stays. Source: So et al. 2021."""
    return torch.relu(input).square()


@relu_squared.formula
@jit
def _(input):
    positive = tl.where(input < 0, 0, input)
    return positive * positive


@relu_squared.gradient
@jit
def _(grad, input):
    return grad * (2 * tl.where(input <= 0, 0, input))


@jit
def _limited(input, low, high):
    low, high = low.to(input.dtype), high.to(input.dtype)
    return tl.where(input < low, low, tl.where(input > high, high, input))


@jit
def hardtanh_slope(grad, input, min_val, max_val):
    """The gradient of :func:`hardtanh`."""
    return tl.where((input <= min_val) | (input >= max_val), 0, grad)


@pointwise(aten="hardtanh", rounds=True)
def hardtanh(
    input: Tensor, min_val: Number = -1.0, max_val: Number = 1.0, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """``input`` limited to ``[min_val, max_val]``; NaN stays. Source: ``torch.nn.functional.hardtanh``."""
    return torch.ops.aten.hardtanh(input, min_val, max_val)  # type: ignore[no-any-return]


@hardtanh.formula
@jit
def _(input, min_val, max_val):
    return _limited(input, min_val, max_val)


hardtanh.gradient(hardtanh_slope)
hardtanh_ = hardtanh.inplace


@pointwise(aten="relu6")
def relu6(input: Tensor) -> Tensor:
    """``input`` limited to ``[0, 6]``; NaN stays. Source: ``torch.nn.functional.relu6``."""
    return torch.nn.functional.relu6(input)


@relu6.formula
@jit
def _(input):
    return tl.where(input < 0, 0, tl.where(input > 6, 6, input)).to(input.dtype)


@relu6.gradient
@jit
def _(grad, input):
    return hardtanh_slope(grad, input, 0, 6)


relu6_ = relu6.inplace


@jit
def threshold_slope(grad, input, threshold):
    """The gradient of :func:`threshold`."""
    return tl.where(input <= threshold.to(input.dtype), 0, grad)


@pointwise(aten="threshold", rounds=True)
def threshold(input: Tensor, threshold: Number, value: Number, *, out: Tensor | None = None) -> Tensor:
    """``input`` where larger than ``threshold``, else ``value``; NaN stays. Source: ``torch.threshold``."""
    return torch.threshold(input, threshold, value)


@threshold.formula
@jit
def _(input, threshold, value):
    return tl.where(input <= threshold.to(input.dtype), value.to(input.dtype), input)


threshold.gradient(threshold_slope)
threshold_ = threshold.inplace


@jit
def leaky_relu_slope(grad, input, negative_slope):
    """The gradient of :func:`leaky_relu`."""
    return tl.where(input > 0, grad, grad * negative_slope)


@pointwise(aten="leaky_relu", floats=("input",))
def leaky_relu(input: Tensor, negative_slope: float = 0.01, *, out: Tensor | None = None) -> Tensor:
    """``input`` where positive, else ``negative_slope * input``. Source: ``torch.nn.functional.leaky_relu``."""
    return torch.nn.functional.leaky_relu(input, negative_slope)


@leaky_relu.formula
@jit
def _(input, negative_slope):
    return tl.where(input > 0, input, input * negative_slope)


leaky_relu.gradient(leaky_relu_slope)
leaky_relu_ = leaky_relu.inplace


@pointwise(aten="_prelu_kernel", floats=("input",))
def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """:func:`prelu` with a ``weight`` that broadcasts."""
    return torch._prelu_kernel(input, weight)


@_prelu.formula
@jit
def _(input, weight):
    return tl.where(input > 0, input, weight * input)


@_prelu.gradient
@jit
def _(grad, input, weight):
    positive = input > 0
    return tl.where(positive, grad, weight * grad), tl.where(positive, 0, input * grad)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``input`` where positive, else ``weight * input``, with one weight or one for each channel (dimension 1).

    Source: ``torch.nn.functional.prelu``; He et al. 2015.
    """
    channels = input.shape[1] if input.ndim > 1 else 1
    if weight.ndim > 1 or weight.numel() not in (1, channels):
        raise ShapeError(
            f"prelu: weight must have one element or one for each of {channels} channels, given {list(weight.shape)}"
        )
    if input.dtype != weight.dtype:
        raise ArgumentError(f"prelu: input is {input.dtype}, weight is {weight.dtype}; they must be the same")
    places = [1] * input.ndim
    if input.ndim > 1:
        places[1] = weight.numel()
    return _prelu(input, weight.reshape(places))


@jit
def _six(input):
    """``input + 3`` limited to [0, 6]; NaN stays."""
    shifted = input + 3
    return tl.where(shifted < 0, 0, tl.where(shifted > 6, 6, shifted))


@jit
def hardsigmoid_slope(grad, input):
    """The gradient of :func:`hardsigmoid`."""
    # 1 / 6 in float32, for float64 too, as torch.
    return tl.where((input > -3) & (input < 3), grad * 0.1666666716337204, 0)


@pointwise(aten="hardsigmoid", floats=("input",))
def hardsigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``min(max(input + 3, 0), 6) / 6``. Source: ``torch.nn.functional.hardsigmoid``; Howard et al. 2019."""
    return torch.ops.aten.hardsigmoid(input)  # type: ignore[no-any-return]


@hardsigmoid.formula
@jit
def _(input):
    return _six(input) * (1 / 6)


hardsigmoid.gradient(hardsigmoid_slope)
hardsigmoid_ = hardsigmoid.inplace


@jit
def hardswish_slope(grad, input):
    """The gradient of :func:`hardswish`."""
    middle = grad * (input * (1 / 3) + 0.5)
    return tl.where(input <= -3, 0, tl.where(input < 3, middle, grad))


@pointwise(aten="hardswish", floats=("input",))
def hardswish(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input * hardsigmoid(input)``. Source: ``torch.nn.functional.hardswish``; Howard et al. 2019."""
    return torch.ops.aten.hardswish(input)  # type: ignore[no-any-return]


@hardswish.formula
@jit
def _(input):
    return input * _six(input) * (1 / 6)


hardswish.gradient(hardswish_slope)
hardswish_ = hardswish.inplace


@pointwise(floats=("input",), rounds=True)
def _softshrink(input: Tensor, lambd: float, *, out: Tensor | None = None) -> Tensor:
    """:func:`softshrink` with a ``lambd`` that is not negative."""
    return torch.nn.functional.softshrink(input, lambd)


@_softshrink.formula
@jit
def _(input, lambd):
    # NaN and -0.0 stay.
    return tl.where(input > lambd, input - lambd, tl.where(input < -lambd, input + lambd, input * 0))


@_softshrink.gradient
@jit
def _(grad, input, lambd):
    return tl.where((input >= -lambd) & (input <= lambd), 0, grad)


def softshrink(input: Tensor, lambd: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """``input`` moved toward zero by ``lambd >= 0``, to no less than zero. Source: ``torch.nn.functional.softshrink``."""
    if lambd < 0:
        raise ArgumentError(f"softshrink: lambd must not be negative, given {lambd}")
    return _softshrink(input, lambd, out=out)
