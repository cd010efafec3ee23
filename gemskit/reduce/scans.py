"""Running sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit.reduce._drive import element, scan
from gemskit.reduce._scan import Scan


@scan(aten="cumsum")
def cumsum(input: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Sum of all elements up to and including each along ``dim``. Source: ``torch.cumsum``.

    ``input`` is converted to ``dtype`` first. Halves are summed in float32; ints and bools give int64 and wrap around.
    Results do not depend on timing, also where a long row is shared by several programs.
    """
    return torch.cumsum(input, dim, dtype=dtype)


cumsum.combine(identity=0)(language.add)
cumsum_ = cumsum.inplace

_BACKWARDS = Scan("cumsum_grad", map=element, combine=language.add, identity=(0,), reverse=True)


@cumsum.gradient_by
def _(grad: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    # element names its operand so.
    named = {"input": grad}
    _BACKWARDS(named, [dx], shape, dim, compute_type(grad.dtype))
    return {"input": dx}
