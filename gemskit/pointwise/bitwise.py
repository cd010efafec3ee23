"""Operations on the bits of ints and bools."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.pointwise._drive import pointwise


@pointwise(aten="bitwise_and.Tensor")
def bitwise_and(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input & other`` of ints or bools. Source: ``torch.bitwise_and``."""
    return torch.bitwise_and(input, other)  # type: ignore[arg-type]


@bitwise_and.formula
@jit
def _(input, other):
    return input & other


bitwise_and_ = bitwise_and.inplace


@pointwise(aten="bitwise_or.Tensor")
def bitwise_or(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input | other`` of ints or bools. Source: ``torch.bitwise_or``."""
    return torch.bitwise_or(input, other)  # type: ignore[arg-type]


@bitwise_or.formula
@jit
def _(input, other):
    return input | other


bitwise_or_ = bitwise_or.inplace

#: The names of ``Tensor.__or__`` and ``Tensor.__ior__`` in ATen.
__or__ = bitwise_or
__ior__ = bitwise_or_


@pointwise(aten="bitwise_xor.Tensor")
def bitwise_xor(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input ^ other`` of ints or bools. Source: ``torch.bitwise_xor``."""
    return torch.bitwise_xor(input, other)  # type: ignore[arg-type]


@bitwise_xor.formula
@jit
def _(input, other):
    return input ^ other


bitwise_xor_ = bitwise_xor.inplace


@pointwise(aten="bitwise_left_shift.Tensor")
def bitwise_left_shift(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input << other`` of ints; 0 where ``other`` is negative or at least the number of bits.

    Source: ``torch.bitwise_left_shift``.
    """
    return torch.bitwise_left_shift(input, other)  # type: ignore[arg-type]


@bitwise_left_shift.formula
@jit
def _(input, other):
    away = (other < 0) | (other >= input.dtype.primitive_bitwidth)
    return tl.where(away, 0, input << tl.where(away, 0, other))


bitwise_left_shift_ = bitwise_left_shift.inplace


@pointwise(aten="bitwise_right_shift.Tensor")
def bitwise_right_shift(input: Tensor | Number, other: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """``input >> other`` of ints; 0, or -1 of negative ones, where ``other`` is negative or at least the number of bits.

    Source: ``torch.bitwise_right_shift``.
    """
    return torch.bitwise_right_shift(input, other)  # type: ignore[arg-type]


@bitwise_right_shift.formula
@jit
def _(input, other):
    last: tl.constexpr = input.dtype.primitive_bitwidth - 1
    away = (other < 0) | (other > last)
    # A step of one less than the width leaves the sign of a signed type; one more empties an unsigned one.
    shifted = input >> tl.where(away, last, other)
    return tl.where(away & (input >= 0), 0, shifted)


bitwise_right_shift_ = bitwise_right_shift.inplace
