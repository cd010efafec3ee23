"""Variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit.reduce._drive import reduction

Dims = int | Sequence[int] | None


@reduction(aten="var.correction")
def var(
    input: Tensor, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False, out: Tensor | None = None
) -> Tensor:
    """``sum((input - mean)**2) / max(0, n - correction)`` over ``dim`` (all dimensions if None). Source: ``torch.var``."""
    return torch.var(input, dim, correction=correction, keepdim=keepdim)


@triton.jit
def _observe(input):
    return input, input * 0, input * 0 + 1


@triton.jit
def _unbiased(state1, correction, count):
    return state1 / tl.maximum(count - correction, 0.0)


var.combine(identity=(0, 0, 0), map=_observe, finish=_unbiased, results=1)(language.welford)
