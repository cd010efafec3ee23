"""Products of many elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._drive import dims_of, reduction, spread
from gemskit.reduce._fold import Fold


@jit
def times(a, b):
    """The product, as a combine function."""
    return a * b


@reduction(aten="prod.dim_int")
def prod(
    input: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Product along ``dim`` (of all elements if None); 1 for no elements. Source: ``torch.prod``.

    ``input`` is converted to ``dtype`` first. Halves are multiplied in float32; ints and bools give int64 and wrap around.
    The gradient holds where elements are 0.
    """
    if dim is None:
        return torch.prod(input, dtype=dtype).view([1] * (input.ndim if keepdim else 0))
    return torch.prod(input, dim, keepdim, dtype=dtype)


prod.combine(identity=1)(times)


@jit
def _apart(input):
    return tl.where(input == 0, 1, input), (input == 0).to(tl.int32)


@jit
def _together(product_a, zeros_a, product_b, zeros_b):
    return product_a * product_b, zeros_a + zeros_b


@jit
def _others(grad, input, product, zeros):
    # The product of all elements but this one.
    without = language.div(product, tl.where(input == 0, 1, input))
    return grad * tl.where(zeros == 0, without, tl.where((zeros == 1) & (input == 0), product, 0))


_APART = Fold("prod_apart", map=_apart, combine=_together, identity=(1, 0), state=("accumulate", "index"))
_OTHERS = Elementwise("prod_grad", _others, keep=("product", "zeros"))


@prod.gradient_by
def _(grad: Tensor, input: Tensor, dim: int | None, keepdim: bool, like: Mapping[str, Any]) -> dict[str, Tensor]:
    n = input.ndim
    shape, dims, compute = tuple(input.shape) or (1,), dims_of(dim, n), compute_type(grad.dtype)
    kept = [1 if d in dims else m for d, m in enumerate(shape)]
    product = torch.empty(kept, dtype=compute, device=input.device)
    zeros = torch.empty(kept, dtype=torch.int64, device=input.device)
    _APART({"input": input}, [product, zeros], shape, dims, compute, grad.dtype)
    dx = torch.empty_like(input)
    named = {"grad": spread(grad, dim, n, keepdim), "input": input, "product": product, "zeros": zeros}
    _OTHERS(named, [dx if n else dx.view(1)], compute, None, grad.dtype)
    return {"input": dx}
