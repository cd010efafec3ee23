"""Softmax and its logarithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.errors import DtypeError
from gemskit.nn._drive import columns, rowwise
from gemskit.nn._rows import Rows, Statistic
from gemskit.pointwise import _fast
from gemskit.reduce._drive import element


def _floating(op: str, input: Tensor, dtype: torch.dtype | None, hint: str = "; pass dtype=torch.float32") -> None:
    # torch refuses these on every device but meta, where the result's dtype is asked for.
    if not (dtype or input.dtype).is_floating_point:
        raise DtypeError(f"{op}: the dtype must be floating point, given {dtype or input.dtype}{hint}")


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


@rowwise()
def safe_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`softmax` in which a row that is all -inf (nothing to attend to) gives 0. Source: ``torch._safe_softmax``."""
    _floating("safe_softmax", input, dtype)
    return torch._safe_softmax(input, dim, dtype)


@jit
def shifted(input, peak, precise):
    """What is summed over a row. Where the peak is infinite this is NaN, as torch gives."""
    if precise:
        return language.exp(input - peak)
    else:
        return _fast.exp_share(input - peak)


@jit
def online(input):
    """One element as a state of :func:`gemskit.language.online_softmax`."""
    return input, tl.where(input == float("inf"), float("nan"), 1.0).to(input.dtype)


@jit
def online_step(peak, total, tiles):
    """The next elements of each lane, one of every tile: rescaled once for all, 5 instructions an element instead of 12."""
    top = peak
    for t in tl.static_range(len(tiles)):
        top = language.maximum(top, tiles[t][0])
    # -inf - -inf is NaN; a lane without anything larger sums zeros.
    base = tl.where(top == -float("inf"), 0, top)
    total = total * _fast.exp_share(peak - base)
    for t in tl.static_range(len(tiles)):
        total += _fast.exp_share(tiles[t][0] - base)
    return top, total


#: The maximum of a row and the sum of exponentials below it, in two passes over registers or in one over memory.
SOFTMAX_STATISTICS = (
    Statistic(("peak",), element, language.maximum, ("lowest",), "tile"),
    Statistic(("total",), shifted, language.add, (0,), "tile"),
    # A second exponential per element is cheaper than a second pass over memory.
    Statistic(("peak", "total"), online, language.online_softmax, ("lowest", 0), "loop", online_step),
)
for _op in (softmax, log_softmax, safe_softmax):
    _op.take(SOFTMAX_STATISTICS)


@jit
def _part(input, peak, total, precise):
    if precise:
        # One division a row: a product with the inverse is off by one unit more, less than sums in another order are.
        return language.exp(input - peak) * language.div(tl.full(total.shape, 1, total.dtype), total)
    else:
        # Not the exponentials that were summed: to keep those a held row would take two registers for one.
        return libdevice.exp2((input - peak) * _fast.LOG2E - libdevice.log2(total))


softmax.formula(_part)


@safe_softmax.formula
@jit
def _(input, peak, total, precise):
    return tl.where(peak == float("-inf"), 0, _part(input, peak, total, precise))


@log_softmax.formula
@jit
def _(input, peak, total):
    return input - peak - language.log(total)


@jit
def _weighted(grad, out):
    return grad * out


@jit
def _softmax_grad(grad, out, dot):
    return out * (grad - dot)


@jit
def _grad_element(grad):
    return grad


@jit
def _log_softmax_grad(grad, out, dot, precise):
    return grad - _fast.exp(out, precise) * dot


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


@safe_softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_SOFTMAX_GRAD, grad, out, dim, like)


@log_softmax.gradient_by
def _(grad: Tensor, out: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return _gradient(_LOG_SOFTMAX_GRAD, grad, out, dim, like)


# -- gradients as operators -----------------------------------------------------------------------------------------------


@operator(aten="_softmax_backward_data", floats=("grad_output", "output"))
def softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of :func:`softmax`: ``output * (grad_output - sum(grad_output * output))`` along ``dim``.

    In ``input_dtype``. Source: ``torch._softmax_backward_data``.
    """
    _floating("softmax_backward", grad_output, None, "")
    return torch._softmax_backward_data(grad_output, output, dim, grad_output.dtype).to(input_dtype)


@operator(aten="_log_softmax_backward_data", floats=("grad_output", "output"))
def log_softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of :func:`log_softmax`: ``grad_output - exp(output) * sum(grad_output)`` along ``dim``.

    In ``input_dtype``. Source: ``torch._log_softmax_backward_data``.
    """
    _floating("log_softmax_backward", grad_output, None, "")
    return torch._log_softmax_backward_data(grad_output, output, dim, grad_output.dtype).to(input_dtype)


def _backward(rows: Rows, outs: Sequence[Tensor], grad: Tensor, out: Tensor, dim: int, **numbers: float) -> None:
    shape, dims = tuple(out.shape) or (1,), columns({"dim": dim}, out.ndim)
    rows({"grad": grad, "out": out, **numbers}, outs, shape, dims, compute_type(grad.dtype))


@softmax_backward.kernel
def _(
    outs: Sequence[Tensor], keep: object, grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> None:
    _backward(_SOFTMAX_GRAD, outs, grad_output, output, dim)


@log_softmax_backward.kernel
def _(
    outs: Sequence[Tensor], keep: object, grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> None:
    _backward(_LOG_SOFTMAX_GRAD, outs, grad_output, output, dim)


# -- scaled ---------------------------------------------------------------------------------------------------------------


@operator(floats=("x",))
def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """``softmax(scale * x)`` along the last dimension, of any length and number of dimensions, in the shape and dtype of ``x``.

    Of floating-point tensors; halves are computed in float32.
    """
    _floating("scaled_softmax_forward", x, None, "")
    return torch.softmax(x * scale, -1)


@operator(floats=("grad_output", "softmax_results"))
def scaled_softmax_backward(grad_output: Tensor, softmax_results: Tensor, scale: float) -> Tensor:
    """The gradient of :func:`scaled_softmax_forward`: ``scale * p * (g - sum(g * p))`` along the last dimension.

    ``g`` is ``grad_output`` and ``p`` are the ``softmax_results``, of one shape; floating point, and halves are computed in
    float32.
    """
    _floating("scaled_softmax_backward", grad_output, None, "")
    dot = (grad_output * softmax_results).sum(-1, keepdim=True) if grad_output.ndim else grad_output * softmax_results
    return scale * softmax_results * (grad_output - dot)


@jit
def _scaled(input, scale):
    return input * scale


@jit
def _scaled_shifted(input, scale, peak, precise):
    return _fast.exp(input * scale - peak, precise)


@jit
def _scaled_online(input, scale):
    return online(input * scale)


@jit
def _scaled_softmax(input, scale, peak, total, precise):
    return _part(input * scale, peak, total, precise)


@jit
def _scaled_softmax_grad(grad, out, scale, dot):
    return scale * (out * (grad - dot))


_SCALED = Rows(
    "scaled_softmax",
    _scaled_softmax,
    [
        Statistic(("peak",), _scaled, language.maximum, ("lowest",), "tile"),
        Statistic(("total",), _scaled_shifted, language.add, (0,), "tile"),
        Statistic(("peak", "total"), _scaled_online, language.online_softmax, ("lowest", 0), "loop", online_step),
    ],
)
_SCALED_GRAD = Rows("scaled_softmax_grad", _scaled_softmax_grad, [Statistic(("dot",), _weighted, language.add, (0,))])


@scaled_softmax_forward.kernel
def _(outs: Sequence[Tensor], keep: object, x: Tensor, scale: float) -> None:
    shape, dims = tuple(x.shape) or (1,), columns({"dim": -1}, x.ndim)
    _SCALED({"input": x, "scale": float(scale)}, outs, shape, dims, compute_type(x.dtype))


@scaled_softmax_forward.gradient_by
def _(grad: Tensor, out: Tensor, scale: float) -> dict[str, Tensor]:
    dx = torch.empty_like(out)
    _backward(_SCALED_GRAD, [dx], grad, out, -1, scale=float(scale))
    return {"x": dx}


@scaled_softmax_backward.kernel
def _(outs: Sequence[Tensor], keep: object, grad_output: Tensor, softmax_results: Tensor, scale: float) -> None:
    _backward(_SCALED_GRAD, outs, grad_output, softmax_results, -1, scale=float(scale))
