"""Matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit import language
from gemskit._dtypes import Number, compute_type
from gemskit._jit import jit
from gemskit._layout import contiguous
from gemskit._op import Named
from gemskit.blas._drive import Gemm, gemm
from gemskit.blas._epilogue import AnyEpilogue
from gemskit.blas._terms import multiply, no_bools, one_dtype, plain, plus, scaled, shaped, widened
from gemskit.pointwise._place import cast, copy
from gemskit.reduce._fold import Fold

Like = Mapping[str, Any]


@gemm(aten="mm", factors=("input", "mat2"))
def mm(
    input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, epilogue: AnyEpilogue | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Matrix product of ``input`` (M, K) and ``mat2`` (K, N). Source: ``torch.mm``.

    Halves accumulate in float32, which ``out_dtype`` may keep; float32 obeys ``torch.set_float32_matmul_precision``.
    """
    return torch.mm(*widened(out_dtype, input, mat2))


mm.epilogue(plain)


@mm.gradient_by
def _(grad: Tensor, input: Tensor, mat2: Tensor, needs: set[str]) -> dict[str, Tensor]:
    grad = cast(grad, input.dtype)
    return {
        **({"input": mm(grad, mat2.mT)} if "input" in needs else {}),
        **({"mat2": mm(input.mT, grad)} if "mat2" in needs else {}),
    }


@gemm(aten="addmm", factors=("mat1", "mat2"))
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, beta: Number = 1,
    alpha: Number = 1, epilogue: AnyEpilogue | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``beta * input + alpha * (mat1 @ mat2)``; ``input`` broadcasts to (M, N) and is ignored where ``beta`` is 0.

    With ``out_dtype`` float32 the input of half factors may be float32 too. Source: ``torch.addmm``.
    """
    return torch.addmm(*widened(out_dtype, input, mat1, mat2), beta=beta, alpha=alpha)


addmm.epilogue(plus)

addmm_ = addmm.inplace


@addmm.gradient_by
def _(
    grad: Tensor, mat1: Tensor, mat2: Tensor, beta: Number, alpha: Number, needs: set[str], like: Like
) -> dict[str, Tensor]:
    found = {"input": scaled(grad, beta, like["input"])} if "input" in needs else {}
    if needs & {"mat1", "mat2"}:
        grad = scaled(grad, alpha, (grad.shape, mat1.dtype))
    if "mat1" in needs:
        found["mat1"] = mm(grad, mat2.mT)
    if "mat2" in needs:
        found["mat2"] = mm(mat1.mT, grad)
    return found


@jit
def _same(grad):
    return grad


_ROW_SUM = Fold("row_sum", map=_same, combine=language.add, identity=(0,))


def summed(grad: Tensor, like: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
    """``grad`` summed to the shape of an operand that was broadcast."""
    return (
        grad if grad.shape == like[0] else _ROW_SUM.to_shape({"grad": grad}, grad.shape, like, compute_type(grad.dtype))
    )


@gemm(factors=("input", "weight"))
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, epilogue: AnyEpilogue | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``input @ weight.T + bias`` of ``input`` (..., K), ``weight`` (N, K) and ``bias`` (N,): (..., N).

    A ``weight`` (K,) gives (...). Source: ``torch.nn.functional.linear``.
    """
    return torch.nn.functional.linear(input, weight, bias)


@linear.shape_rule
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[int, ...]] | None:
    size, (n, k) = tuple(input.shape), weight.shape if weight.ndim == 2 else (0, 0)
    fits = size and size[-1] == k and k and 0 not in size and input.stride() == contiguous(size)
    return [(*size[:-1], n)] if fits and n and (bias is None or tuple(bias.shape) == (n,)) else None


@linear.views
def _(out: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.ndim == 1:
        out, weight = out.unsqueeze(-1), weight[None]
    return (out, input, weight.mT) if input.ndim > 1 else (out[None], input[None], weight.mT)


@linear.epilogue
@jit
def _(acc, bias):
    if bias is not None:
        acc = acc + bias
    return acc


def rows(t: Tensor) -> Tensor:
    """``t`` as a matrix of its last dimension; copied only where its rows are no single stride apart."""
    shape = (math.prod(t.shape[:-1]), t.shape[-1])
    try:
        return t.view(shape)
    except RuntimeError:
        return copy(t, torch.empty(t.shape, dtype=t.dtype, device=t.device)).view(shape)


@linear.gradient_by
def _(grad: Tensor, input: Tensor, weight: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "bias" in needs:
        found["bias"] = summed(grad, like["bias"])
    if weight.ndim == 1:
        grad, weight = grad.unsqueeze(-1), weight[None]
    if "input" in needs:
        found["input"] = linear(grad, weight.mT)
    if "weight" in needs:
        found["weight"] = shaped(mm(rows(grad).mT, rows(input)), like["weight"][0])
    return found


class _Matmul(Gemm[Any, Any]):
    """A product in which a factor may be a vector, which takes a sum along it instead of tiles."""

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        a, b = named["input"], named["other"]
        if a.ndim > 1 < b.ndim:
            return super().plan(named, outs)
        one_dtype(self.name, input=a, other=b)
        no_bools(self.name, a.dtype, outs[0].numel() * a.shape[-1] or (a.ndim == b.ndim == 1))

        def run(outs: Sequence[Tensor], keep: Any, arguments: Named) -> None:
            a, b = arguments["input"], arguments["other"]
            vector, matrix = (b, a) if b.ndim == 1 else (a, b.mT)
            out = outs[0].unsqueeze(-1)
            multiply(matrix, vector, matrix.shape, (out.shape, out.dtype), out=out)

        return run


def _matmul(meaning: Callable[..., Tensor]) -> _Matmul:
    return _Matmul(meaning, factors=("input", "other"), aten="matmul")


@_matmul
def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input @ other``, (.., M, K) by (.., K, N): (.., M, N), in their dtype. Batches broadcast.

    A vector is a row on the left, a column on the right, and its dimension is not in the result. Source: ``torch.matmul``.
    """
    return torch.matmul(input, other)


matmul.epilogue(plain)


@matmul.gradient_by
def _(grad: Tensor, input: Tensor, other: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    a = input if input.ndim > 1 else input[None]
    b = other if other.ndim > 1 else other[:, None]
    if other.ndim == 1:
        grad = grad.unsqueeze(-1)
    if input.ndim == 1:
        grad = grad.unsqueeze(-2)
    if "input" in needs:
        found["input"] = shaped(summed(matmul(grad, b.mT), (tuple(a.shape), a.dtype)), input.shape)
    if "other" in needs and b.ndim == 2:
        found["other"] = shaped(mm(rows(a).mT, rows(grad)), other.shape)
    elif "other" in needs:
        found["other"] = summed(matmul(a.mT, grad), (tuple(b.shape), b.dtype))
    return found
