"""Gated products: an activation of one product times another of the same input, in one kernel."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.blas._drive import Product
from gemskit.blas._terms import shaped
from gemskit.blas.matmul import addmm, linear, mm, rows
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.pointwise import _fast
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import copy
from gemskit.pointwise.activation import gelu_slope

_MEANINGS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}


def _halves(weight: Tensor, weight_up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of the gate and of what it gates."""
    if weight_up is not None:
        return weight, weight_up
    if weight.ndim != 2 or weight.shape[0] % 2:
        raise ShapeError(f"gated_linear: a weight of both halves has an even number of rows, given {describe(weight)}")
    n = weight.shape[0] // 2
    return weight.narrow(0, 0, n), weight.narrow(0, n, n)


@operator(floats=("input", "weight", "weight_up"))
def gated_linear(
    input: Tensor, weight: Tensor, weight_up: Tensor | None = None, *,
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "none"] = "silu", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(input @ weight.T) * (input @ weight_up.T)`` of ``input`` (..., K) and weights (N, K): (..., N).

    Without ``weight_up`` a ``weight`` (2N, K) holds both, the gate's rows first (vLLM's ``gate_up_proj``). Neither product is
    stored or rounded; the gradient computes both again. Source: SwiGLU, GEGLU, ReGLU and GLU (Shazeer 2020).
    """
    gate, up = _halves(weight, weight_up)
    if activation not in _MEANINGS:
        raise ArgumentError(f"activation must be one of {', '.join(_MEANINGS)}")
    if gate.ndim != 2 or gate.shape != up.shape:
        raise ShapeError(f"weights of one shape (N, K) are needed, not {list(gate.shape)} and {list(up.shape)}")
    dtype = input.dtype
    if not dtype.is_floating_point or dtype != gate.dtype or dtype != up.dtype:
        raise DtypeError(f"all tensors must have one floating dtype, given {dtype}, {gate.dtype} and {up.dtype}")
    x, gate, up = (t.to(compute_type(dtype)) for t in (input, gate, up))
    found: Tensor = _MEANINGS[activation](F.linear(x, gate)) * F.linear(x, up)
    return found.to(dtype)


@jit
def _activated(x, activation, precise):
    if activation == "silu":
        return x * _fast.sigmoid(x, precise)
    elif activation == "gelu":
        return x * _fast.normal(x, precise)
    elif activation == "gelu_tanh":
        return x * _fast.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x), precise)
    elif activation == "relu":
        return tl.where(x < 0, 0, x)
    elif activation == "sigmoid":
        return _fast.sigmoid(x, precise)
    else:
        return x


@jit
def _slope(x, activation, precise):
    if activation == "silu":
        s = _fast.sigmoid(x, precise)
        return s * (1 + x * _fast.rest(x, s, precise))
    elif activation == "gelu":
        return gelu_slope(x, "none", precise)
    elif activation == "gelu_tanh":
        return gelu_slope(x, "tanh", precise)
    elif activation == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif activation == "sigmoid":
        s = _fast.sigmoid(x, precise)
        return s * _fast.rest(x, s, precise)
    else:
        return 1


@jit
def _gate(acc, up, activation, precise):
    return _activated(acc, activation, precise) * up


@jit
def _gate_grads(grad, gate, up, activation, precise):
    return grad * up * _slope(gate, activation, precise), grad * _activated(gate, activation, precise)


_PRODUCT = Product("gated_linear", _gate, gated=True)
_GRADS = Elementwise("gated_linear_grad", _gate_grads, results=2)


@gated_linear.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, weight: Tensor, weight_up: Tensor | None, activation: str
) -> None:
    (out,) = outs
    gate, up = _halves(weight, weight_up)
    if gate.stride() != up.stride():
        # One set of strides serves both.
        gate, up = (
            t if t.is_contiguous() else copy(t, torch.empty(t.shape, dtype=t.dtype, device=t.device))
            for t in (gate, up)
        )
    if input.ndim == 1:
        out, input = out[None], input[None]
    named = {"up": up.mT, "activation": activation}
    _PRODUCT.plan(input, gate.mT, named, out)(out, input, gate.mT, named)


@gated_linear.gradient_by
def _(
    grad: Tensor, input: Tensor, weight: Tensor, weight_up: Tensor | None, activation: str, needs: set[str]
) -> dict[str, Tensor]:
    n = grad.shape[-1]
    if weight_up is None:
        both = linear(input, weight)
        gate, up = both.narrow(-1, 0, n), both.narrow(-1, n, n)
    else:
        gate, up = linear(input, weight), linear(input, weight_up)
    if weight_up is None:
        # Side by side, so that one product gives the gradient of the weight.
        d = torch.empty((*grad.shape[:-1], 2 * n), dtype=grad.dtype, device=grad.device)
        halves = d.narrow(-1, 0, n), d.narrow(-1, n, n)
    else:
        d, _ = halves = torch.empty_like(gate), torch.empty_like(up)
    _GRADS({"grad": grad, "gate": gate, "up": up, "activation": activation}, halves, compute_type(grad.dtype))
    found: dict[str, Tensor] = {}
    x, (d_gate, d_up) = rows(input), map(rows, halves)
    if "input" in needs and weight_up is None:
        found["input"] = linear(d, weight.mT)
    elif "input" in needs and weight_up is not None:
        found["input"] = shaped(addmm(mm(d_gate, weight), d_up, weight_up), input.shape)
    if "weight" in needs:
        found["weight"] = mm(rows(d).mT if weight_up is None else d_gate.mT, x)
    if "weight_up" in needs:
        found["weight_up"] = mm(d_up.mT, x)
    return found
