"""Softmax and its logarithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit.errors import DtypeError
from gemskit.nn._drive import Rowwise, columns, rowwise
from gemskit.nn._rows import Rows, Statistic


def _floating(op: str, input: Tensor, dtype: torch.dtype | None) -> None:
    # torch refuses these on every device but meta, where the result's dtype is asked for.
    if not (dtype or input.dtype).is_floating_point:
        raise DtypeError(
            f"{op}: the dtype must be floating point, given {dtype or input.dtype}; pass dtype=torch.float32"
        )


@rowwise()
def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``exp(input) / sum(exp(input))`` along ``dim``, shifted by the maximum; ``input`` is converted to ``dtype`` first.

    A row that is all -inf, or has +inf or NaN, gives NaN. Ints need ``dtype``. Source: ``torch.softmax``.
    """
    _floating("softmax", input, dtype)
    return torch.softmax(input, dim, dtype=dtype)


@rowwise()
def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``input - log(sum(exp(input)))`` along ``dim``, shifted by the maximum; ``input`` is converted to ``dtype`` first.

    A row that is all -inf, or has +inf or NaN, gives NaN. Ints need ``dtype``. Source: ``torch.log_softmax``.
    """
    _floating("log_softmax", input, dtype)
    return torch.log_softmax(input, dim, dtype=dtype)


@triton.jit
def element(input):
    """What the maximum of a row is taken of."""
    return input


@triton.jit
def shifted(input, peak):
    """What is summed over a row. Where the peak is infinite this is NaN, as torch gives."""
    return language.exp(input - peak)


@triton.jit
def online(input):
    """One element as a state of :func:`gemskit.language.online_softmax`."""
    return input, tl.where(input == float("inf"), float("nan"), 1.0).to(input.dtype)


def _statistics(op: Rowwise[..., Any]) -> None:
    op.statistic("peak", combine=language.maximum, identity="lowest", only="tile")(element)
    op.statistic("total", combine=language.add, only="tile")(shifted)
    # A second exponential per element is cheaper than a second pass over memory.
    op.statistic("peak", "total", combine=language.online_softmax, identity=("lowest", 0), only="loop")(online)


_statistics(softmax)
_statistics(log_softmax)


@softmax.formula
@triton.jit
def _(input, peak, total):
    return language.div(language.exp(input - peak), total)


@log_softmax.formula
@triton.jit
def _(input, peak, total):
    return input - peak - language.log(total)


@triton.jit
def _weighted(grad, out):
    return grad * out


@triton.jit
def _softmax_grad(grad, out, dot):
    return out * (grad - dot)


@triton.jit
def _grad_element(grad):
    return grad


@triton.jit
def _log_softmax_grad(grad, out, dot):
    return grad - language.exp(out) * dot


_SOFTMAX_GRAD = Rows("softmax_grad", _softmax_grad, [Statistic(("dot",), _weighted, language.add, (0,))])
_LOG_SOFTMAX_GRAD = Rows(
    "log_softmax_grad", _log_softmax_grad, [Statistic(("dot",), _grad_element, language.add, (0,))]
)


def _gradient(rows: Rows, grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    dims = columns({"dim": dim}, len(shape))
    rows({"grad": grad, "out": out}, [dx], tuple(shape) or (1,), dims, compute_type(grad.dtype))
    return {"input": dx}


@softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_SOFTMAX_GRAD, grad, out, dim, like)


@log_softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_LOG_SOFTMAX_GRAD, grad, out, dim, like)
