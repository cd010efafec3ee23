"""Running sums, products, extrema and sums of exponentials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.errors import DtypeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import copy
from gemskit.reduce._drive import dims_of, element, scan
from gemskit.reduce._fold import Fold
from gemskit.reduce._scan import Scan
from gemskit.reduce.products import times
from gemskit.reduce.sums import logarithm, one

Like = Mapping[str, Any]


@scan(aten="cumsum")
def cumsum(input: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Sum of all elements up to and including each along ``dim``. Source: ``torch.cumsum``.

    ``input`` is converted to ``dtype`` first. Halves are summed in float32; ints and bools give int64 and wrap around.
    Results do not depend on timing, also where a long row is shared by several programs.
    """
    return torch.cumsum(input, dim, dtype=dtype)


cumsum.combine(identity=0)(language.add)
cumsum_ = cumsum.inplace

_BACKWARDS = Scan("cumsum_grad", map=element, combine=language.add, identity=(0,), reverse=True)


def _empty(like: Like, grad: Tensor) -> Tensor:
    shape, dtype = like["input"]
    return torch.empty(shape, dtype=dtype, device=grad.device)


@cumsum.gradient_by
def _(grad: Tensor, dim: int, like: Like) -> dict[str, Tensor]:
    dx = _empty(like, grad)
    # element names its operand so.
    named = {"input": grad}
    _BACKWARDS(named, [dx], dx.shape, dim, compute_type(grad.dtype))
    return {"input": dx}


# -- products -------------------------------------------------------------------------------------------------------------


@scan(aten="cumprod")
def cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Product of all elements up to and including each along ``dim``. Source: ``torch.cumprod``.

    ``input`` is converted to ``dtype`` first. Halves are multiplied in float32; ints and bools give int64 and wrap around.
    The gradient holds where elements are 0.
    """
    return torch.cumprod(input, dim, dtype=dtype)


cumprod.combine(identity=1)(times)
cumprod_ = cumprod.inplace


@jit
def _onwards(input, grad):
    return input, tl.zeros_like(input) + 1, grad


@jit
def _behind(first_b, rest_b, sum_b, first_a, rest_a, sum_a):
    # Of a range: its first factor, the product of its others, and sum(grad[i] * product of the others up to i). The scan
    # runs from the end, so what comes as a lies behind; the identity there is (1, 1, 0).
    through = rest_a * first_b
    behind = tl.where(sum_b == 0, 0, through * sum_b)
    return first_a, through * rest_b, sum_a + behind


@jit
def _last_state(state2):
    return state2


@jit
def _scaled(rest, before):
    if before is not None:
        rest = rest * before
    return rest


_ONWARDS = Scan(
    "cumprod_onwards", map=_onwards, combine=_behind, identity=(1, 1, 0), finish=_last_state,
    state=("accumulate",) * 3, reverse=True, commutes=False,
)  # fmt: skip
_SCALED = Elementwise("cumprod_grad", _scaled)


@cumprod.gradient_by
def _(grad: Tensor, input: Tensor, out: Tensor, dim: int) -> dict[str, Tensor]:
    # d/dx[j] is the product of what comes before j times sum(grad[i] * x[j + 1] .. x[i]) over i >= j: nothing is divided.
    compute = compute_type(grad.dtype)
    rest = torch.empty(input.shape, dtype=compute, device=input.device)
    _ONWARDS({"input": input, "grad": grad}, [rest], tuple(input.shape), dim, compute, grad.dtype)
    dx = torch.empty_like(input)
    if not input.ndim:
        dx, rest, out = dx.view(1), rest.view(1), out.view(1)
    n = dx.shape[dim]
    if n:
        _SCALED({"rest": rest.narrow(dim, 0, 1), "before": None}, [dx.narrow(dim, 0, 1)], compute)
        named = {"rest": rest.narrow(dim, 1, n - 1), "before": out.narrow(dim, 0, n - 1)}
        _SCALED(named, [dx.narrow(dim, 1, n - 1)], compute)
    return {"input": dx.view(input.shape) if not input.ndim else dx}


# -- extrema --------------------------------------------------------------------------------------------------------------


@scan(aten="cummax", named=torch.return_types.cummax)
def cummax(input: Tensor, dim: int, *, out: tuple[Tensor, Tensor] | None = None) -> torch.return_types.cummax:
    """Largest element up to and including each along ``dim``, and its index: the last of equal ones, NaN is largest.

    The gradient goes to the element at the index. Source: ``torch.cummax``.
    """
    return torch.cummax(input, dim)


@scan(aten="cummin", named=torch.return_types.cummin)
def cummin(input: Tensor, dim: int, *, out: tuple[Tensor, Tensor] | None = None) -> torch.return_types.cummin:
    """Smallest element up to and including each along ``dim``, and its index: the last of equal ones, NaN is smallest.

    The gradient goes to the element at the index. Source: ``torch.cummin``.
    """
    return torch.cummin(input, dim)


@jit
def _located(input, col):
    return input, col


@jit
def _last_max(x, i, y, j):
    nan_x, nan_y = x != x, y != y
    second = (y > x) | (nan_y & ~nan_x) | (((x == y) | (nan_x & nan_y)) & (j > i))
    return tl.where(second, y, x), tl.where(second, j, i)


@jit
def _last_min(x, i, y, j):
    nan_x, nan_y = x != x, y != y
    second = (y < x) | (nan_y & ~nan_x) | (((x == y) | (nan_x & nan_y)) & (j > i))
    return tl.where(second, y, x), tl.where(second, j, i)


cummax.combine(identity=("lowest", "lowest"), map=_located, state=("compute", "index"))(_last_max)
cummin.combine(identity=("highest", "lowest"), map=_located, state=("compute", "index"))(_last_min)


@jit
def _keyed(grad, indices):
    return grad, indices


@jit
def _of_first(sum_a, key_a, sum_b, key_b):
    # Indices only grow along a row: from its end, the sum of what went to the smallest index seen.
    key = tl.minimum(key_a, key_b)
    return tl.where(key_a == key, sum_a, 0) + tl.where(key_b == key, sum_b, 0), key


@jit
def _if_there(state0, state1, col):
    return tl.where(state1 == col, state0, 0)


_TO_INDEX = Scan(
    "cummax_grad", map=_keyed, combine=_of_first, identity=(0, "highest"), finish=_if_there,
    state=("accumulate", "index"), keep=("indices",), reverse=True,
)  # fmt: skip


def _at_index(grads: tuple[Tensor, ...], dim: int, out1: Tensor, like: Like) -> dict[str, Tensor]:
    dx = _empty(like, grads[0])
    _TO_INDEX({"grad": grads[0], "indices": out1}, [dx], tuple(dx.shape), dim, compute_type(dx.dtype))
    return {"input": dx}


cummax.gradient_by(_at_index)
cummin.gradient_by(_at_index)


# -- sums of exponentials -------------------------------------------------------------------------------------------------


@scan(aten="logcumsumexp")
def logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    """``log(cumsum(exp(input)))`` along ``dim`` of floating-point elements, shifted by the running maximum.

    Source: ``torch.logcumsumexp``.
    """
    if not input.dtype.is_floating_point:
        raise DtypeError(f"logcumsumexp: input must be floating point, given {input.dtype}")
    return torch.logcumsumexp(input, dim)


logcumsumexp.combine(identity=(-math.inf, 0), map=one, finish=logarithm)(language.online_softmax)


@jit
def _shared(grad, out):
    return -out, grad


@jit
def _share(state0, state1, input):
    return state1 * language.exp(input + state0)


_SHARES = Scan(
    "logcumsumexp_grad", map=_shared, combine=language.online_softmax, identity=(-math.inf, 0), finish=_share,
    state=("accumulate", "accumulate"), reverse=True,
)  # fmt: skip


@logcumsumexp.gradient_by
def _(grad: Tensor, input: Tensor, out: Tensor, dim: int) -> dict[str, Tensor]:
    # sum(grad[i] * exp(input[j] - out[i])) over i >= j, where out[j] is the smallest and no exponent is positive.
    dx = torch.empty_like(input)
    _SHARES({"grad": grad, "input": input, "out": out}, [dx], tuple(input.shape), dim, compute_type(input.dtype))
    return {"input": dx}


# -- normalised -----------------------------------------------------------------------------------------------------------


@operator(floats=("input",))
def normed_cumsum(input: Tensor, dim: int = -1) -> Tensor:
    """``cumsum(input) / sum(input)`` along ``dim``, whose last element is exactly 1: the distribution of weights."""
    if not input.dtype.is_floating_point:
        raise DtypeError(f"normed_cumsum: input must be floating point, given {input.dtype}")
    total = input.cumsum(dim)
    return total / total.narrow(dim, -1, 1) if input.ndim and input.shape[dim] else total / total


@jit
def _normed(running, total):
    return language.div(running, total)


@jit
def _dotted(grad, out):
    return grad * out


@jit
def _less(state0, dot, total):
    return language.div(state0 - dot, total)


_RUNNING = Scan("normed_cumsum", map=element, combine=language.add, identity=(0,))
_NORMED = Elementwise("normed_cumsum_share", _normed)
_TOTAL = Fold("normed_cumsum_sum", map=element, combine=language.add, identity=(0,))
_DOT = Fold("normed_cumsum_dot", map=_dotted, combine=language.add, identity=(0,))
_LESS = Scan("normed_cumsum_grad", map=element, combine=language.add, identity=(0,), finish=_less, reverse=True)


@normed_cumsum.kernel
def _(outs: Sequence[Tensor], keep: object, input: Tensor, dim: int) -> None:
    if not input.ndim:
        input, outs = input.view(1), [outs[0].view(1)]
    compute, n = compute_type(input.dtype), input.shape[dim]
    if not input.numel():
        return
    running = outs[0] if outs[0].dtype == compute else torch.empty_like(input, dtype=compute)
    _RUNNING({"input": input}, [running], tuple(input.shape), dim, compute)
    last = running.narrow(dim, n - 1, 1)
    # A copy, as the last element is overwritten too.
    total = copy(last, torch.empty(last.shape, dtype=compute, device=last.device))
    _NORMED({"running": running, "total": total}, [outs[0]], compute)


@normed_cumsum.gradient_by
def _(grad: Tensor, input: Tensor, out: Tensor, dim: int) -> dict[str, Tensor]:
    # (sum(grad[i], i >= j) - sum(grad * out)) / total
    dx, compute, dims = torch.empty_like(input), compute_type(input.dtype), dims_of(dim, input.ndim)
    shape = tuple(input.shape) or (1,)
    kept = [1 if d in dims else m for d, m in enumerate(shape)]
    total, dot = (torch.empty(kept, dtype=compute, device=input.device) for _ in range(2))
    _TOTAL({"input": input}, [total], shape, dims, compute)
    _DOT({"grad": grad, "out": out}, [dot], shape, dims, compute)
    named = {"input": grad, "dot": dot, "total": total}
    _LESS(named, [dx if input.ndim else dx.view(1)], shape, dim, compute)
    return {"input": dx}
