"""Products of batches of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from gemskit._dtypes import Number
from gemskit.blas._drive import gemm
from gemskit.blas._epilogue import AnyEpilogue
from gemskit.blas._terms import plain, plus, scaled, widened
from gemskit.blas.matmul import Like
from gemskit.pointwise._place import cast


@gemm(aten="bmm", factors=("input", "mat2"))
def bmm(
    input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, epilogue: AnyEpilogue | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Matrix products of the batches ``input`` (B, M, K) and ``mat2`` (B, K, N): (B, M, N). Source: ``torch.bmm``."""
    return torch.bmm(*widened(out_dtype, input, mat2))


bmm.epilogue(plain)


@bmm.gradient_by
def _(grad: Tensor, input: Tensor, mat2: Tensor, needs: set[str]) -> dict[str, Tensor]:
    grad = cast(grad, input.dtype)
    return {
        **({"input": bmm(grad, mat2.mT)} if "input" in needs else {}),
        **({"mat2": bmm(input.mT, grad)} if "mat2" in needs else {}),
    }


@gemm(aten="baddbmm", factors=("batch1", "batch2"))
def baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, out_dtype: torch.dtype | None = None, *, beta: Number = 1,
    alpha: Number = 1, epilogue: AnyEpilogue | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``beta * input + alpha * (batch1 @ batch2)`` of batches; ``input`` broadcasts and is ignored where ``beta`` is 0.

    With ``out_dtype`` float32 the input of half factors may be float32 too. Source: ``torch.baddbmm``.
    """
    return torch.baddbmm(*widened(out_dtype, input, batch1, batch2), beta=beta, alpha=alpha)


baddbmm.epilogue(plus)

baddbmm_ = baddbmm.inplace


@baddbmm.gradient_by
def _(
    grad: Tensor, batch1: Tensor, batch2: Tensor, beta: Number, alpha: Number, needs: set[str], like: Like
) -> dict[str, Tensor]:
    found = {"input": scaled(grad, beta, like["input"])} if "input" in needs else {}
    if needs & {"batch1", "batch2"}:
        grad = scaled(grad, alpha, (grad.shape, batch1.dtype))
    if "batch1" in needs:
        found["batch1"] = bmm(grad, batch2.mT)
    if "batch2" in needs:
        found["batch2"] = bmm(batch1.mT, grad)
    return found
