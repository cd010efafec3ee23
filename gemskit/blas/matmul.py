"""Matrix products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gemskit.blas._drive import gemm


@triton.jit
def plain(acc):
    """The epilogue of a bare product."""
    return acc


@gemm(aten="mm", factors=("input", "mat2"))
def mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Matrix product of ``input`` (M, K) and ``mat2`` (K, N). Source: ``torch.mm``."""
    return torch.mm(input, mat2)


mm.epilogue(plain)


@mm.gradient_by
def _(grad: Tensor, input: Tensor, mat2: Tensor, needs: set[str]) -> dict[str, Tensor]:
    return {
        **({"input": mm(grad, mat2.mT)} if "input" in needs else {}),
        **({"mat2": mm(input.mT, grad)} if "mat2" in needs else {}),
    }
