"""Matrix products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import Number, compute_type
from gemskit._jit import jit
from gemskit._layout import contiguous
from gemskit.blas._drive import gemm
from gemskit.errors import NoKernel
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._fold import Fold

Like = Mapping[str, Any]


@jit
def plain(acc):
    """The epilogue of a bare product."""
    return acc


@gemm(aten="mm", factors=("input", "mat2"))
def mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Matrix product of ``input`` (M, K) and ``mat2`` (K, N).

    Halves accumulate in float32; float32 obeys ``torch.set_float32_matmul_precision``. Source: ``torch.mm``.
    """
    return torch.mm(input, mat2)


mm.epilogue(plain)


@mm.gradient_by
def _(grad: Tensor, input: Tensor, mat2: Tensor, needs: set[str]) -> dict[str, Tensor]:
    return {
        **({"input": mm(grad, mat2.mT)} if "input" in needs else {}),
        **({"mat2": mm(input.mT, grad)} if "mat2" in needs else {}),
    }


@gemm(aten="addmm", factors=("mat1", "mat2"))
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Number = 1, alpha: Number = 1, out: Tensor | None = None
) -> Tensor:
    """``beta * input + alpha * (mat1 @ mat2)``; ``input`` broadcasts to (M, N) and is ignored where ``beta`` is 0.

    Source: ``torch.addmm``.
    """
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


@addmm.epilogue
@jit
def _(acc, input, beta, alpha):
    # NaN and inf in an input that does not count must not show.
    return acc * alpha + tl.where(beta == 0, 0, input * beta)


addmm_ = addmm.inplace


@jit
def _scaled(grad, factor):
    return grad * factor


@jit
def _same(grad):
    return grad


_SCALE = Elementwise("scale", _scaled)
_SCALED_SUM = Fold("scaled_sum", map=_scaled, combine=language.add, identity=(0,))
_ROW_SUM = Fold("row_sum", map=_same, combine=language.add, identity=(0,))
_COPY = Elementwise("rows", _same)


def _times(grad: Tensor, factor: Number, shape: tuple[int, ...]) -> Tensor:
    """``factor * grad``, summed to ``shape``."""
    named, compute = {"grad": grad, "factor": factor}, compute_type(grad.dtype)
    if shape != grad.shape:
        return _SCALED_SUM.to_shape(named, grad.shape, (shape, grad.dtype), compute)
    if factor == 1:
        return grad
    out = torch.empty_like(grad)
    _SCALE(named, [out], compute)
    return out


@addmm.gradient_by
def _(
    grad: Tensor, mat1: Tensor, mat2: Tensor, beta: Number, alpha: Number, needs: set[str], like: Like
) -> dict[str, Tensor]:
    found = {"input": _times(grad, beta, tuple(like["input"][0]))} if "input" in needs else {}
    if needs & {"mat1", "mat2"}:
        grad = _times(grad, alpha, tuple(grad.shape))
    if "mat1" in needs:
        found["mat1"] = mm(grad, mat2.mT)
    if "mat2" in needs:
        found["mat2"] = mm(mat1.mT, grad)
    return found


@gemm(factors=("input", "weight"))
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias`` of ``input`` (..., K), ``weight`` (N, K) and ``bias`` (N,): (..., N).

    Source: ``torch.nn.functional.linear``.
    """
    return torch.nn.functional.linear(input, weight, bias)


@linear.shape_rule
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[int, ...]] | None:
    size, (n, k) = tuple(input.shape), weight.shape if weight.ndim == 2 else (0, 0)
    fits = size and size[-1] == k and k and 0 not in size and input.stride() == contiguous(size)
    return [(*size[:-1], n)] if fits and n and (bias is None or tuple(bias.shape) == (n,)) else None


@linear.views
def _(out: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.ndim != 2:
        raise NoKernel(f"linear: no kernel for a weight of shape {list(weight.shape)}; served is (N, K)")
    return (out, input, weight.mT) if input.ndim > 1 else (out[None], input[None], weight.mT)


@linear.epilogue
@jit
def _(acc, bias):
    if bias is not None:
        acc = acc + bias
    return acc


def _rows(t: Tensor) -> Tensor:
    """``t`` as a matrix of its last dimension; copied only where its rows are no single stride apart."""
    shape = (math.prod(t.shape[:-1]), t.shape[-1])
    try:
        return t.view(shape)
    except RuntimeError:
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        _COPY({"grad": t}, [out], t.dtype)
        return out.view(shape)


@linear.gradient_by
def _(grad: Tensor, input: Tensor, weight: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "input" in needs:
        found["input"] = linear(grad, weight.mT)
    if "weight" in needs:
        found["weight"] = mm(_rows(grad).mT, _rows(input))
    if "bias" in needs:
        compute = compute_type(grad.dtype)
        found["bias"] = _ROW_SUM.to_shape({"grad": grad}, grad.shape, like["bias"], compute)
    return found
