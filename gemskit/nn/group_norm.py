"""Norms of groups of channels in each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit._dtypes import compute_type
from gemskit._layout import contiguous
from gemskit.nn import _group_rows
from gemskit.nn._channels import NORMAL, STATISTICS, WEIGHTED, WEIGHTED_SLOPE, norm, sums_of, vectors_of
from gemskit.nn._drive import row_shape

#: Elements of four bytes in a row that is held in registers: H200 has room for 32 in each of 1,024 threads, and half of that
#: for each of two operands.
HELD, HELD_GRAD = 32768, 16384


@norm()
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance of each sample and group of channels.

    ``input`` is (N, C, ...), weight and bias are (C). Halves are computed in float32. Source: ``torch.nn.functional.group_norm``
    (Wu and He 2018).
    """
    return F.group_norm(input, num_groups, weight, bias, eps)


@group_norm.shape_rule
def _(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    size = tuple(input.shape)
    if len(size) < 2 or 0 in size or num_groups <= 0 or size[1] % num_groups or input.stride() != contiguous(size):
        return None
    if any(v is not None and tuple(v.shape) != size[1:2] for v in (weight, bias)):
        return None
    return None if size[0] * size[1] // num_groups * math.prod(size[2:]) == 1 else (size,)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """A view of (N, C, ...) as (N, groups, C / groups, ...)."""
    found: Tensor = t.unflatten(1, (groups, t.shape[1] // groups))  # type: ignore[no-untyped-call]
    return found


def _vector(v: Tensor | None, groups: int, ndim: int) -> Tensor | None:
    """A vector of channels as it broadcasts over that."""
    return None if v is None else v.reshape(1, groups, -1, *(1,) * (ndim - 2))


@group_norm.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, input: Tensor, num_groups: int, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    (out,) = outs
    compute = compute_type(input.dtype)
    x = _grouped(input, num_groups)
    dims = tuple(range(2, x.ndim))
    rows = row_shape(x.shape, dims)
    mean, rstd = (torch.empty(rows, dtype=compute, device=input.device) for _ in range(2))
    if keep is not None:
        keep.update(mean=mean, rstd=rstd)
    if not input.numel():
        return
    how = _group_rows.tile((out, input), num_groups, compute, HELD)
    if how is not None:
        _group_rows.forward(how, out, (None, None) if keep is None else (mean, rstd), input, weight, bias, eps, compute)
        return
    STATISTICS({"input": x, "eps": eps}, (mean, rstd), tuple(x.shape), dims, compute)
    vectors = {"weight": _vector(weight, num_groups, input.ndim), "bias": _vector(bias, num_groups, input.ndim)}
    NORMAL({"input": x, "mean": mean, "rstd": rstd, **vectors}, (_grouped(out, num_groups),), compute)


def gradient(
    grad: Tensor, input: Tensor, num_groups: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: set[str],
    like: Mapping[str, Any], into: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients that are in ``needs``, written ``into`` tensors where there are some. Statistics are (N, groups, 1, ...)."""
    found: dict[str, Tensor] = {}
    compute, size = compute_type(input.dtype), (input.shape[0], input.shape[1])
    vectors = bool(needs & {"weight", "bias"})
    if "input" in needs:
        found["input"] = into["input"] if into else torch.empty_like(input)
        how = _group_rows.tile((found["input"], grad, input), num_groups, compute, HELD_GRAD)
        if how is not None:
            sums = torch.empty((2, *size), dtype=compute, device=grad.device) if vectors else None
            each = (None, None) if sums is None else (sums[0], sums[1])
            _group_rows.backward(how, found["input"], each, grad, input, mean, rstd, weight, compute)
            return found if sums is None else found | vectors_of(sums[0], sums[1], needs, like, into)
    g, x, w = _grouped(grad, num_groups), _grouped(input, num_groups), _vector(weight, num_groups, input.ndim)
    dims = tuple(range(2, x.ndim))
    if vectors or w is not None:
        total, dot = sums_of(g, x, mean, rstd, dims[1:])
        if vectors:
            found |= vectors_of(total.reshape(size), dot.reshape(size), needs, like, into)
    if "input" in needs and input.numel():
        if w is None:
            total, dot = sums_of(g, x, mean, rstd, dims)
        else:
            by_channel = {"total": total, "dot": dot, "weight": w}
            kept = row_shape(x.shape, dims)
            total, dot = (torch.empty(kept, dtype=compute, device=grad.device) for _ in range(2))
            WEIGHTED(by_channel, (total, dot), tuple(by_channel["total"].shape), (2,), compute)
        count = math.prod(x.shape[2:])
        rows = {"mean": mean, "rstd": rstd, "total": total, "dot": dot, "share": 1.0 / count, "count": float(count)}
        named = {"grad": g, "input": x, "weight": w, **rows}
        WEIGHTED_SLOPE(named, (_grouped(found["input"], num_groups),), compute)
    return found


@group_norm.gradient_by
def _(
    grad: Tensor, input: Tensor, num_groups: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: set[str],
    like: Mapping[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    return gradient(grad, input, num_groups, weight, mean, rstd, needs, like, {})
