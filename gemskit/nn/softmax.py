"""Softmax and its logarithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit.nn._drive import columns, rowwise
from gemskit.nn._rows import Rows, Statistic


@rowwise()
def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``exp(input) / sum(exp(input))`` along ``dim``, shifted by the maximum. All -inf gives NaN. Source: ``torch.softmax``."""
    return torch.softmax(input, dim, dtype=dtype)


@triton.jit
def _element(input):
    return input


@triton.jit
def _shifted(input, peak):
    # Where the peak is -inf every element is: NaN, as torch gives.
    return language.exp(input - peak)


softmax.statistic("peak", combine=language.maximum, identity="lowest")(_element)
softmax.statistic("total", combine=language.add)(_shifted)


@softmax.formula
@triton.jit
def _(input, peak, total):
    return language.div(language.exp(input - peak), total)


@rowwise()
def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``input - log(sum(exp(input)))`` along ``dim``, shifted by the maximum. Source: ``torch.log_softmax``."""
    return torch.log_softmax(input, dim, dtype=dtype)


log_softmax.statistic("peak", combine=language.maximum, identity="lowest")(_element)
log_softmax.statistic("total", combine=language.add)(_shifted)


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
_LOG_SOFTMAX_GRAD = Rows("log_softmax_grad", _log_softmax_grad, [Statistic(("dot",), _grad_element, language.add, (0,))])


def _gradient(rows: Rows, grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    named = {"grad": grad, "out": out}
    rows.plan(named, tuple(shape) or (1,), columns({"dim": dim}, len(shape)), [dx], compute_type(grad.dtype))([dx], named)
    return {"input": dx}


@softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_SOFTMAX_GRAD, grad, out, dim, like)


@log_softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_LOG_SOFTMAX_GRAD, grad, out, dim, like)
