"""Norms of channels: of a batch, by running statistics, and of each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._layout import contiguous
from gemskit.errors import ArgumentError, ShapeError
from gemskit.nn._channels import BY_VARIANCE, NORMAL, RSTD, SLOPE, STATISTICS, SUMS, along, norm, target
from gemskit.nn._drive import row_shape
from gemskit.nn.group_norm import group_norm
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce.statistics import var_mean
from gemskit.reduce.sums import mean as mean_of

Like = Mapping[str, Any]


def _dims(ndim: int) -> tuple[int, ...]:
    """All dimensions but that of the channels."""
    return (0, *range(2, ndim))


def _flat(t: Tensor, ndim: int) -> Tensor:
    """A vector of channels as a result of :func:`_dims`: a view, also of what is to be written."""
    return t.reshape(1, -1, *(1,) * (ndim - 2))


# -- by the statistics of the batch ---------------------------------------------------------------------------------------


@norm()
def _batch_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`batch_norm` in training, the mean and the unbiased variance of each channel in the type computed in."""
    out = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    var, mean = torch.var_mean(input.to(compute_type(input.dtype)), _dims(input.ndim))
    return out, mean, var


@_batch_norm.shape_rule
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    size = tuple(input.shape)
    if len(size) < 2 or 0 in size or input.stride() != contiguous(size) or math.prod(size) == size[1] or eps <= 0:
        return None
    return (
        None
        if any(v is not None and tuple(v.shape) != size[1:2] for v in (weight, bias))
        else (size, size[1:2], size[1:2])
    )


@_batch_norm.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    out, mean, var = outs
    ndim, compute = input.ndim, compute_type(input.dtype)
    rstd = torch.empty_like(mean)
    if keep is not None:
        keep["rstd"] = rstd
    rows = [_flat(v, ndim) for v in (mean, rstd, var)]
    STATISTICS({"input": input, "eps": eps}, rows, tuple(input.shape), _dims(ndim), compute)
    named = {"input": input, "mean": rows[0], "rstd": rows[1], "weight": along(weight, ndim), "bias": along(bias, ndim)}
    NORMAL(named, (out,), compute)


def gradient(
    grads: Sequence[Tensor], input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, training: bool,
    needs: set[str], like: Like, into: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients that are in ``needs``, written ``into`` tensors where there are some.

    Both sums are gradients of vectors; they are results twice, where those have another dtype than sums.
    """
    grad, ndim, compute = grads[0], input.ndim, compute_type(input.dtype)
    named: dict[str, Any] = {"grad": grad, "input": input, "mean": _flat(mean, ndim), "rstd": _flat(rstd, ndim)}
    found: dict[str, Tensor] = {}
    total = dot = None
    if training or needs & {"weight", "bias"}:
        dims = _dims(ndim)
        kept = row_shape(input.shape, dims)
        other = {n: (input.shape[1:2], compute) for n in ("bias", "weight") if n not in needs}
        vectors = {n: target(n, {**like, **other}, into, grad.device) for n in ("bias", "weight")}
        rows = [_flat(v, ndim) for v in vectors.values()]
        if training and not all(v.dtype == compute for v in rows):
            rows = [torch.empty(kept, dtype=compute, device=grad.device) for _ in range(2)] + rows
        SUMS(named, rows, tuple(input.shape), dims, compute)
        found |= {n: v for n, v in vectors.items() if n in needs}
        if training:
            total, dot = rows[0], rows[1]
    if "input" in needs:
        found["input"] = into["input"] if into else torch.empty_like(input)
        count = math.prod(input.shape) // max(input.shape[1], 1)
        of = dict.fromkeys(("grad_mean", "grad_var"))
        if len(grads) == 3:
            of = {n: _flat(g, ndim) for n, g in zip(of, grads[1:])}
        named |= {**of, "total": total, "dot": dot, "weight": along(weight, ndim)}
        count = max(count, 1)
        named |= {"share": 1.0 / count, "count": float(count), "freedom": 2.0 / max(count - 1, 1)}
        SLOPE(named, (found["input"],), compute)
    return found


@_batch_norm.gradient_by
def _(
    grads: tuple[Tensor, ...],
    input: Tensor,
    weight: Tensor | None,
    out1: Tensor,
    rstd: Tensor,
    needs: set[str],
    like: Like,
) -> dict[str, Tensor]:
    return gradient(grads, input, out1, rstd, weight, True, needs, like, {})


# -- by running statistics ------------------------------------------------------------------------------------------------


@norm()
def _batch_norm_fixed(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """:func:`batch_norm` by given statistics, which have no gradient."""
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)


@_batch_norm_fixed.shape_rule
def _(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    size = tuple(input.shape)
    if len(size) < 2 or 0 in size or input.stride() != contiguous(size) or eps < 0:
        return None
    vectors = (running_mean, running_var, weight, bias)
    return None if any(v is not None and tuple(v.shape) != size[1:2] for v in vectors) else (size,)


@_batch_norm_fixed.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, input: Tensor, running_mean: Tensor, running_var: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    vectors = {"mean": running_mean, "var": running_var, "weight": weight, "bias": bias}
    named = {"input": input, "eps": eps, **{n: along(v, input.ndim) for n, v in vectors.items()}}
    BY_VARIANCE(named, outs, compute_type(input.dtype))


def _fixed_gradient(
    grad: Tensor, input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, eps: float,
    needs: set[str], like: Like,
) -> dict[str, Tensor]:  # fmt: skip
    rstd = torch.empty_like(running_var, dtype=compute_type(input.dtype))
    RSTD({"var": running_var, "eps": eps}, (rstd,), rstd.dtype)
    return gradient((grad,), input, running_mean, rstd, weight, False, needs, like, {})


_batch_norm_fixed.set_gradient(
    _fixed_gradient,
    ("grad", "input", "running_mean", "running_var", "weight", "eps", "needs", "like"),
    ("input", "weight", "bias"),
)


# -- running statistics ---------------------------------------------------------------------------------------------------


@norm(writes=("running_mean", "running_var"))
def _track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """``(1 - momentum) * running + momentum * new`` for both statistics."""
    pairs = ((running_mean, mean), (running_var, var))
    first, second = ((r * (1 - momentum) + v * momentum).to(r.dtype) for r, v in pairs)
    return first, second


# Every element is read before it is written.
_track.elementwise = True


@jit
def _rounded(x, factor):
    """The product as torch has it, in a kernel of its own: compilers would fuse it with the sum that it goes into."""
    if factor.dtype.is_floating():
        # A zero that compilers do not know to be one.
        return tl.math.fma(x.to(factor.dtype), factor, (factor - factor) * -1.0)
    else:
        return x * factor


@jit
def _moved(running_mean, running_var, mean, var, momentum):
    old = 1 - momentum
    return (
        _rounded(running_mean, old) + _rounded(mean, momentum),
        _rounded(running_var, old) + _rounded(var, momentum),
    )


_MOVED = Elementwise("batch_norm_track", _moved, results=2)


@_track.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, running_mean: Tensor, running_var: Tensor, mean: Tensor,
    var: Tensor, momentum: float,
) -> None:  # fmt: skip
    named = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "var": var, "momentum": momentum}
    _MOVED(named, outs, compute_type(mean.dtype))


def _statistics(op: str, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    if (running_mean is None) != (running_var is None):
        raise ArgumentError(f"{op}: running_mean and running_var must both be tensors or both None")
    for name, v in (("running_mean", running_mean), ("running_var", running_var)):
        if v is not None and isinstance(input, Tensor) and (v.ndim != 1 or v.shape != input.shape[1:2]):
            raise ShapeError(
                f"{op}: {name} must have an element for each channel of {describe(input)}, given {describe(v)}"
            )


# -- torch's forms --------------------------------------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` for each channel of ``input`` (N, C, ...).

    In training mean and biased variance are those of the batch, and the running ones, if given, are moved in place by
    ``momentum`` towards mean and unbiased variance; else the running ones are used. Halves are computed in float32.
    Source: ``torch.nn.functional.batch_norm`` (Ioffe and Szegedy 2015).
    """
    _statistics("batch_norm", input, running_mean, running_var)
    if not training:
        if running_mean is None or running_var is None:
            raise ArgumentError("batch_norm: takes running_mean and running_var where training=False")
        return _batch_norm_fixed(input, running_mean, running_var, weight, bias, eps)
    out, mean, var = _batch_norm(input, weight, bias, eps)
    # torch leaves them as they are where there is nothing to learn from.
    if running_mean is not None and running_var is not None and input.numel():
        _track.inplace(running_mean, running_var, mean.detach(), var.detach(), momentum)
    return out


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`group_norm` with a channel in each group; ``use_input_stats=False`` is :func:`batch_norm` by running statistics.

    Running statistics are moved towards the mean of those of the samples, for which the input is read once more.
    Source: ``torch.nn.functional.instance_norm`` (Ulyanov et al. 2016).
    """
    _statistics("instance_norm", input, running_mean, running_var)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ArgumentError("instance_norm: takes running_mean and running_var where use_input_stats=False")
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if math.prod(input.shape[2:]) == 1:
        raise ShapeError(f"instance_norm: takes several positions of a channel, given {describe(input)}")
    if running_mean is not None and running_var is not None and input.numel():
        with torch.no_grad():
            dtype = compute_type(input.dtype)
            var, mean = var_mean(input.detach(), tuple(range(2, input.ndim)), correction=1)
            _track.inplace(
                running_mean, running_var, mean_of(mean, 0, dtype=dtype), mean_of(var, 0, dtype=dtype), momentum
            )
    # Without channels there are no groups either; any number of them gives the empty result.
    return group_norm(input, input.shape[1] or 1, weight, bias, eps)
