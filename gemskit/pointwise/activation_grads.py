"""Gradients of activations: operators with the names and arguments of ``torch.ops.aten``. They have no gradient themselves."""

from __future__ import annotations

from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise.activation import (
    elu_slope,
    gelu_slope,
    glu_slope,
    mish_slope,
    silu_slope,
    softplus_slope,
)
from gemskit.pointwise.math import logit_slope
from gemskit.pointwise.piecewise import (
    hardsigmoid_slope,
    hardswish_slope,
    hardtanh_slope,
    leaky_relu_slope,
    threshold_slope,
)

aten = torch.ops.aten
BOTH = ("grad_output", "input")


@pointwise(aten="sigmoid_backward", floats=("grad_output", "output"))
def sigmoid_backward(grad_output: Tensor, output: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``grad_output * (1 - output) * output``, of the result of sigmoid. Source: ``torch.ops.aten.sigmoid_backward``."""
    return aten.sigmoid_backward(grad_output, output)  # type: ignore[no-any-return]


@sigmoid_backward.formula
@jit
def _(grad_output, output):
    return grad_output * (1 - output) * output


@pointwise(aten="tanh_backward", floats=("grad_output", "output"))
def tanh_backward(grad_output: Tensor, output: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``grad_output * (1 - output**2)``, of the result of tanh. Source: ``torch.ops.aten.tanh_backward``."""
    return aten.tanh_backward(grad_output, output)  # type: ignore[no-any-return]


@tanh_backward.formula
@jit
def _(grad_output, output):
    return grad_output * (1 - output * output)


@pointwise(aten="silu_backward", floats=BOTH)
def silu_backward(grad_output: Tensor, input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of silu at ``input``. Source: ``torch.ops.aten.silu_backward``."""
    return aten.silu_backward(grad_output, input)  # type: ignore[no-any-return]


@silu_backward.formula
@jit
def _(grad_output, input, precise):
    return silu_slope(grad_output, input, precise)


@pointwise(aten="gelu_backward", floats=BOTH)
def gelu_backward(
    grad_output: Tensor, input: Tensor, *, approximate: Literal["none", "tanh"] = "none", out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The gradient of gelu at ``input``. Source: ``torch.ops.aten.gelu_backward``."""
    return aten.gelu_backward(grad_output, input, approximate=approximate)  # type: ignore[no-any-return]


@gelu_backward.formula
@jit
def _(grad_output, input, approximate, precise):
    return grad_output * gelu_slope(input, approximate, precise)


@pointwise(aten="mish_backward", floats=BOTH)
def mish_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The gradient of mish at ``input``. Source: ``torch.ops.aten.mish_backward``."""
    return aten.mish_backward(grad_output, input)  # type: ignore[no-any-return]


@mish_backward.formula
@jit
def _(grad_output, input, precise):
    return grad_output * mish_slope(input, precise)


@pointwise(aten="softplus_backward", floats=BOTH)
def softplus_backward(
    grad_output: Tensor, input: Tensor, beta: float, threshold: float, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The gradient of softplus at ``input``. Source: ``torch.ops.aten.softplus_backward``."""
    return aten.softplus_backward(grad_output, input, beta, threshold)  # type: ignore[no-any-return]


@softplus_backward.formula
@jit
def _(grad_output, input, beta, threshold, precise):
    return softplus_slope(grad_output, input, beta, threshold, precise)


@pointwise(aten="log_sigmoid_backward")
def log_sigmoid_backward(grad_output: Tensor, input: Tensor, buffer: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of log_sigmoid at ``input``; ``buffer`` is what torch keeps on CPUs, kernels do not read it.

    Source: ``torch.ops.aten.log_sigmoid_backward``.
    """
    return aten.log_sigmoid_backward(grad_output, input, buffer)  # type: ignore[no-any-return]


@log_sigmoid_backward.formula
@jit
def _(grad_output, input, precise):
    return grad_output * _fast.sigmoid(-input, precise)


@pointwise(aten="threshold_backward")
def threshold_backward(grad_output: Tensor, input: Tensor, threshold: Number, *, out: Tensor | None = None) -> Tensor:
    """``grad_output`` where ``input`` is larger than ``threshold``, else 0. Source: ``torch.ops.aten.threshold_backward``."""
    return aten.threshold_backward(grad_output, input, threshold)  # type: ignore[no-any-return]


@threshold_backward.formula
@jit
def _(grad_output, input, threshold):
    return threshold_slope(grad_output, input, threshold)


@pointwise(aten="hardtanh_backward", floats=BOTH)
def hardtanh_backward(
    grad_output: Tensor, input: Tensor, min_val: Number, max_val: Number, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """``grad_output`` where ``input`` is inside of the bounds, else 0. Source: ``torch.ops.aten.hardtanh_backward``."""
    return aten.hardtanh_backward(grad_output, input, min_val, max_val)  # type: ignore[no-any-return]


@hardtanh_backward.formula
@jit
def _(grad_output, input, min_val, max_val):
    return hardtanh_slope(grad_output, input, min_val, max_val)


@pointwise(aten="hardsigmoid_backward", floats=BOTH)
def hardsigmoid_backward(grad_output: Tensor, input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of hardsigmoid at ``input``. Source: ``torch.ops.aten.hardsigmoid_backward``."""
    return aten.hardsigmoid_backward(grad_output, input)  # type: ignore[no-any-return]


@hardsigmoid_backward.formula
@jit
def _(grad_output, input):
    return hardsigmoid_slope(grad_output, input)


@pointwise(aten="hardswish_backward", floats=BOTH)
def hardswish_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The gradient of hardswish at ``input``. Source: ``torch.ops.aten.hardswish_backward``."""
    return aten.hardswish_backward(grad_output, input)  # type: ignore[no-any-return]


@hardswish_backward.formula
@jit
def _(grad_output, input):
    return hardswish_slope(grad_output, input)


@pointwise(aten="leaky_relu_backward", floats=BOTH)
def leaky_relu_backward(
    grad_output: Tensor, input: Tensor, negative_slope: float, self_is_result: bool, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The gradient of leaky_relu at ``input``, which may be its result (where ``negative_slope`` is not negative).

    Source: ``torch.ops.aten.leaky_relu_backward``.
    """
    return aten.leaky_relu_backward(grad_output, input, negative_slope, self_is_result)  # type: ignore[no-any-return]


@leaky_relu_backward.formula
@jit
def _(grad_output, input, negative_slope):
    return leaky_relu_slope(grad_output, input, negative_slope)


@pointwise(aten="logit_backward", floats=BOTH)
def logit_backward(
    grad_output: Tensor, input: Tensor, eps: float | None = None, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The gradient of logit at ``input``. Source: ``torch.ops.aten.logit_backward``."""
    return aten.logit_backward(grad_output, input, eps)  # type: ignore[no-any-return]


@logit_backward.formula
@jit
def _(grad_output, input, eps, precise):
    return logit_slope(grad_output, input, eps, precise)


@pointwise(aten="elu_backward", floats=("grad_output", "self_or_result"))
def elu_backward(
    grad_output: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, self_or_result: Tensor, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of elu at its input, or (``is_result``, with an ``alpha`` that is not negative) where it had this result.

    Source: ``torch.ops.aten.elu_backward``.
    """
    return aten.elu_backward(grad_output, alpha, scale, input_scale, is_result, self_or_result)  # type: ignore[no-any-return]


@elu_backward.formula
@jit
def _(grad_output, alpha, scale, input_scale, is_result, self_or_result, precise):
    if is_result:
        low = grad_output * input_scale * (self_or_result + alpha * scale)
        return tl.where(self_or_result <= 0, low, grad_output * scale)
    else:
        return elu_slope(grad_output, self_or_result, alpha, scale, input_scale, precise)


@operator(aten="glu_backward", floats=BOTH)
def glu_backward(grad_output: Tensor, input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    """The gradient of glu at ``input``, whose halves along ``dim`` have the shape of ``grad_output``.

    Source: ``torch.ops.aten.glu_backward``.
    """
    return aten.glu_backward(grad_output, input, dim)  # type: ignore[no-any-return]


@glu_backward.kernel
def _(outs: tuple[Tensor], keep: dict[str, Tensor] | None, grad_output: Tensor, input: Tensor, dim: int) -> None:
    glu_slope(grad_output, input, dim, outs[0])
