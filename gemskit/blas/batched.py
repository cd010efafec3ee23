"""Products of batches of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from gemskit.blas._drive import gemm
from gemskit.blas.matmul import plain


@gemm(aten="bmm", factors=("input", "mat2"))
def bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Matrix products of the batches ``input`` (B, M, K) and ``mat2`` (B, K, N): (B, M, N). Source: ``torch.bmm``."""
    return torch.bmm(input, mat2)


bmm.epilogue(plain)


@bmm.gradient_by
def _(grad: Tensor, input: Tensor, mat2: Tensor, needs: set[str]) -> dict[str, Tensor]:
    return {
        **({"input": bmm(grad, mat2.mT)} if "input" in needs else {}),
        **({"mat2": bmm(input.mT, grad)} if "mat2" in needs else {}),
    }
