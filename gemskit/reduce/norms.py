"""Norms of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language, pointwise
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import Named
from gemskit.errors import ArgumentError
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import Dims, reduction, spread
from gemskit.reduce._fold import Fold
from gemskit.reduce.logic import nonzero


@reduction(aten="linalg_vector_norm")
def _vector_norm(
    input: Tensor,
    kind: str,
    ord: float,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`vector_norm`, its ``ord`` in ``kind`` too where that has a kernel of its own ("2", "inf"), else "p"."""
    found: Tensor = torch.linalg.vector_norm(input, ord, dim, keepdim, dtype=dtype)
    return found


@jit
def _square(input):
    return input * input


@jit
def _root(state0):
    return language.sqrt(state0)


@jit
def _magnitude(input):
    return tl.abs(input)


@jit
def _power(input, ord):
    return language.pow(tl.abs(input), tl.zeros_like(input) + ord)


@jit
def _unpower(state0, ord):
    return language.pow(state0, language.div(tl.zeros_like(state0) + 1, tl.zeros_like(state0) + ord))


def _of(kind: str) -> Callable[[Named], bool]:
    return lambda named: named["kind"] == kind


_vector_norm.combine(identity=0, map=_square, finish=_root, when=_of("2"))(language.add)
_vector_norm.combine(identity=0, map=_magnitude, when=_of("1"))(language.add)
_vector_norm.combine(identity=0, map=nonzero, state=("index",), when=_of("0"))(language.add)
_vector_norm.combine(identity=0, map=_magnitude, when=_of("inf"))(language.maximum)
_vector_norm.combine(identity="highest", map=_magnitude, when=_of("-inf"))(language.minimum)
_vector_norm.combine(identity=0, map=_power, finish=_unpower, when=_of("p"))(language.add)


@jit
def _sign(input):
    return tl.where(input > 0, 1, tl.where(input < 0, -1, input))


@jit
def _grad_1(grad, input):
    return grad * _sign(input)


@jit
def _grad_2(grad, input, out):
    return tl.where(out == 0, 0, grad * language.div(input, out))


@jit
def _grad_p(grad, input, out, ord):
    # sign * (|x| / norm)**(ord - 1): one power, which overflows nowhere. Zeros get the subgradient 0.
    share = language.div(tl.abs(input), tl.abs(out))
    slope = grad * _sign(input) * language.pow(share, tl.zeros_like(input) + (ord - 1))
    return tl.where((out == 0) | (input == 0), 0, slope)


@jit
def _hit(input, out):
    return ((tl.abs(input) == out) | ((input != input) & (out != out))).to(tl.int32)


@jit
def _grad_most(grad, input, out, hits):
    hit = (tl.abs(input) == out) | ((input != input) & (out != out))
    return _sign(input) * tl.where(hit, language.div(grad, hits), 0)


_GRADS = {
    "1": Elementwise("vector_norm_grad_1", _grad_1),
    "2": Elementwise("vector_norm_grad_2", _grad_2),
    "p": Elementwise("vector_norm_grad_p", _grad_p),
}
_HITS = Fold("vector_norm_hits", map=_hit, combine=language.add, identity=(0,), state=("index",))
_GRAD_MOST = Elementwise("vector_norm_grad_most", _grad_most)


@_vector_norm.gradient_by
def _(
    grad: Tensor, input: Tensor, kind: str, ord: float, dim: Dims, keepdim: bool, out: Tensor
) -> Mapping[str, Tensor]:
    if kind == "0":
        return {}
    n, compute = input.ndim, compute_type(grad.dtype)
    named: dict[str, Any] = {
        "grad": spread(grad, dim, n, keepdim), "input": input, "out": spread(out, dim, n, keepdim), "ord": ord
    }  # fmt: skip
    dx = torch.empty_like(input)
    if kind in _GRADS:
        _GRADS[kind](named, [dx], compute)
    else:
        named["hits"] = _HITS.to_shape(named, input.shape, (named["out"].shape, compute), compute)
        _GRAD_MOST(named, [dx], compute)
    return {"input": dx}


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``sum(|x|**ord)**(1/ord)`` over ``dim`` (all if None): the largest or smallest ``|x|`` for inf and -inf, 0 counts.

    ``x`` is converted to ``dtype`` first. Halves are summed in float32. The gradient is 0 where the norm is, and shared by
    ties. Source: ``torch.linalg.vector_norm``.
    """
    order = float(ord)
    kind = f"{order:g}" if order in (0, 1, 2, math.inf, -math.inf) else "p"
    return _vector_norm(x, kind, order, dim, keepdim, dtype=dtype, out=out)


def norm(
    input: Tensor,
    p: float | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`vector_norm` of order ``p``; "fro" and None are 2. Norms of matrices ("nuc") are refused.

    Source: ``torch.norm``.
    """
    if isinstance(p, str) and p != "fro":
        raise ArgumentError(f"norm: p must be a number, 'fro' or None, given {p!r}")
    return vector_norm(input, 2 if p is None or isinstance(p, str) else p, dim, keepdim, dtype=dtype, out=out)


def dist(input: Tensor, other: Tensor, p: float = 2) -> Tensor:
    """:func:`vector_norm` of order ``p`` of ``input - other``, broadcast. Source: ``torch.dist``."""
    return vector_norm(pointwise.sub(input, other), p)
