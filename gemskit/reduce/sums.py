"""Sums and means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gemskit import language
from gemskit.reduce._drive import expand_to, reduction

Dims = int | Sequence[int] | None


@reduction(aten="sum.dim_IntList")
def sum(
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Sum over ``dim`` (all dimensions if None); float32 accumulation for halves, int64 result for ints. Source: ``torch.sum``."""
    return torch.sum(input, dim, keepdim, dtype=dtype)


sum.combine(identity=0)(language.add)


@sum.gradient_by
def _(grad: Tensor, dim: Dims, keepdim: bool, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": expand_to(grad, like["input"], dim, keepdim).to(like["input"][1])}
