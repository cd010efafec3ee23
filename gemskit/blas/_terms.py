"""Products that need no tiles: outer ones are elementwise, inner ones are sums of what the memory brings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._checks import describe
from gemskit._dtypes import HALVES, Number, compute_type
from gemskit._jit import jit
from gemskit.errors import DtypeError, NoKernel
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._fold import Fold


@jit
def times(value, factor):
    """``value * factor``, the factor a number: of integer products its integral part counts, as in torch."""
    return value * factor.to(value.dtype)


@jit
def plain(acc):
    """The epilogue of a bare product."""
    return acc


@jit
def plus(acc, input, beta, alpha):
    """``beta * input + alpha * acc``; NaN and inf in an input that does not count do not show."""
    return times(acc, alpha) + tl.where(beta == 0, 0, times(input, beta))


@jit
def _term(a, b, factor):
    product = a * b
    if factor is not None:
        product = times(product, factor)
    return product


_OUTER = Elementwise("outer", _term)
_INNER = Fold("inner", map=_term, combine=language.add, identity=(0,))


def multiply(
    a: Tensor, b: Tensor, shape: Sequence[int], like: tuple[Sequence[int], torch.dtype], factor: Number | None = None,
    compute: torch.dtype | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``a * b * factor`` broadcast to ``shape``, then summed to the shape of ``like``, which broadcasts to it."""
    named, compute = {"a": a, "b": b, "factor": factor}, compute or compute_type(a.dtype)
    if tuple(shape) != tuple(like[0]):
        return _INNER.to_shape(named, shape, like, compute, out)
    if out is None:
        out = torch.empty(tuple(shape), dtype=like[1], device=a.device)
    _OUTER(named, [out], compute)
    return out


@jit
def _scaled(grad, factor):
    return times(grad, factor)


_SCALE = Elementwise("scale", _scaled)
_SCALED_SUM = Fold("scaled_sum", map=_scaled, combine=language.add, identity=(0,))


def scaled(grad: Tensor, factor: Number, like: tuple[Sequence[int], torch.dtype]) -> Tensor:
    """``factor * grad``, summed to ``like``."""
    named, compute = {"grad": grad, "factor": factor}, compute_type(grad.dtype)
    if tuple(like[0]) != grad.shape:
        return _SCALED_SUM.to_shape(named, grad.shape, like, compute)
    if factor == 1 and grad.dtype == like[1]:
        return grad
    out = torch.empty_like(grad, dtype=like[1])
    _SCALE(named, [out], compute)
    return out


def shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """``t`` in ``shape``: itself where that is its own, which no view of it is."""
    return t if t.shape == tuple(shape) else t.view(tuple(shape))


def widened(out_dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch multiplies where the result has ``out_dtype``: its own for the dtypes of factors, or float32 for halves."""
    dtype = tensors[-1].dtype
    if out_dtype is None or out_dtype == dtype:
        return tensors
    if dtype not in HALVES or out_dtype != torch.float32:
        raise TypeError(
            f"out_dtype must be {dtype}, the dtype of the factors, or float32 for halves; given {out_dtype}"
        )
    return tuple(t.to(out_dtype) for t in tensors)


def one_dtype(name: str, **tensors: Tensor) -> None:
    """Refuse factors of several dtypes."""
    if len({t.dtype for t in tensors.values()}) > 1:
        raise DtypeError(f"{name}: all tensors must have one dtype, given {describe(tensors)}")


def no_bools(name: str, dtype: torch.dtype, terms: int) -> None:
    """Refuse sums of products of bools, as torch does where there are ``terms`` to add."""
    if dtype == torch.bool and terms:
        raise NoKernel(f"{name}: no kernel for products of bools, which torch has none for either")
