"""Dtypes: torch to Triton, the type a kernel computes in, and torch's promotion over many operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

#: A Python scalar as torch takes one, where it is real.
Number = int | float | bool
#: And where it may be complex.
Scalar = int | float | bool | complex

TRITON: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.bool: tl.int1,
}

#: What only matrix products read and write.
FLOAT8: dict[torch.dtype, Any] = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}

#: What is computed in float32 and rounded once.
HALVES = frozenset((torch.float16, torch.bfloat16))


#: Complex dtypes have no counterpart in Triton: kernels see the parts, in these.
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type that formulas see: half types compute in float32, bool in uint8 (0 and 1), complex ones in that of their parts,
    everything else in itself.
    """
    if dtype == torch.bool:
        return torch.uint8
    if dtype in PARTS:
        return PARTS[dtype]
    return torch.float32 if dtype in HALVES else dtype


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float32 for halves, int64 for ints, else itself."""
    return compute_type(dtype) if dtype.is_floating_point else torch.int64


def scalar_annotation(dtype: torch.dtype) -> str:
    """The Triton type of a run-time scalar for a kernel that computes in ``dtype``."""
    if dtype.is_floating_point:
        return "fp64" if dtype == torch.float64 else "fp32"
    return "i64"


def common_dtype(values: Iterable[Tensor | Scalar]) -> torch.dtype:
    """torch's promotion: tensors with dimensions, then 0-dim tensors, then Python scalars, by category."""
    found: list[torch.dtype | None] = [None, None, None]
    for v in values:
        if isinstance(v, Tensor):
            rank, dtype = (0 if v.ndim else 1), v.dtype
        else:
            rank = 2
            dtype = (
                torch.bool if isinstance(v, bool) else torch.int64 if isinstance(v, int) else torch.get_default_dtype()
            )
            if isinstance(v, complex):
                dtype = dtype.to_complex()
        seen = found[rank]
        found[rank] = dtype if seen is None else torch.promote_types(seen, dtype)
    result: torch.dtype | None = None
    for dtype_ in found:
        if dtype_ is not None and (result is None or _category(dtype_) > _category(result)):
            # A scalar of a higher category takes part only through its category.
            result = dtype_ if result is None else torch.promote_types(result, dtype_)
    assert result is not None
    return result


def _category(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return 3
    return 2 if dtype.is_floating_point else 0 if dtype == torch.bool else 1
