"""Truth: what is not zero (NaN included) counts as true. The result is bool (in place: 0 and 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from gemskit._jit import jit
from gemskit.pointwise._drive import pointwise


@pointwise(aten="logical_and")
def logical_and(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """True where both are not zero. Source: ``torch.logical_and``."""
    return torch.logical_and(input, other)


@logical_and.formula
@jit
def _(input, other):
    return (input != 0) & (other != 0)


logical_and_ = logical_and.inplace


@pointwise(aten="logical_or")
def logical_or(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """True where one or both are not zero. Source: ``torch.logical_or``."""
    return torch.logical_or(input, other)


@logical_or.formula
@jit
def _(input, other):
    return (input != 0) | (other != 0)


logical_or_ = logical_or.inplace


@pointwise(aten="logical_xor")
def logical_xor(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """True where exactly one is not zero. Source: ``torch.logical_xor``."""
    return torch.logical_xor(input, other)


@logical_xor.formula
@jit
def _(input, other):
    return (input != 0) ^ (other != 0)


logical_xor_ = logical_xor.inplace
