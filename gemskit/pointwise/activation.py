"""Activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit.pointwise._drive import pointwise


@pointwise(aten="silu")
def silu(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sigmoid linear unit, ``input * sigmoid(input)``. Source: ``torch.nn.functional.silu``."""
    return torch.nn.functional.silu(input)


@silu.formula
@triton.jit
def _(input):
    return input * language.sigmoid(input)


@silu.gradient
@triton.jit
def _(grad, input):
    s = language.sigmoid(input)
    return grad * s * (1 + input * (1 - s))


silu_ = silu.inplace
