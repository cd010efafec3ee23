"""The loss of rows of logarithms of probabilities, composed of operators: only what the targets name is read."""

from __future__ import annotations

from torch import Tensor, int64, uint8

from gemskit._checks import describe
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.nn.loss import reduction_of
from gemskit.pointwise.arithmetic import div, mul, neg, where
from gemskit.pointwise.compare import ne
from gemskit.pointwise.copying import to_copy
from gemskit.pointwise.indexing import gather, take
from gemskit.reduce.sums import sum


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """``-weight[target] * input[target]`` of each row of logarithms of probabilities, reduced; the mean divides by the weights.

    ``input`` is (C), (N, C) or (N, C, d1, ...), ``target`` has its shape without C. Rows whose target is ``ignore_index`` are
    0 and do not count. ``size_average`` and ``reduce`` are torch's deprecated forms of ``reduction``.
    Source: ``torch.nn.functional.nll_loss``.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    dim = min(1, input.ndim - 1)
    expected = tuple(n for d, n in enumerate(input.shape) if d != dim)
    if not input.ndim or target.shape != expected:
        raise ShapeError(f"nll_loss: target must have the shape of input without C, given {describe((input, target))}")
    if target.dtype not in (int64, uint8):
        raise DtypeError(f"nll_loss: target must hold int64 or uint8 class indices, given {describe(target)}")
    if reduction not in ("none", "mean", "sum"):
        raise ArgumentError(f"nll_loss: reduction must be none, mean or sum, given {reduction!r}")
    index = to_copy(target, dtype=int64) if target.dtype == uint8 else target
    counts = ne(index, ignore_index)
    index = where(counts, index, 0)
    loss = neg(gather(input, dim, index.unsqueeze(dim)).squeeze(dim))
    shares: Tensor | None = None
    if weight is not None:
        shares = where(counts, take(weight, index), 0.0)
        loss = mul(loss, shares)
    loss = where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    total = sum(loss)
    if reduction == "sum":
        return total
    return div(total, sum(counts if shares is None else shares))
