"""Losses of rows of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra import libdevice

from gemskit import language
from gemskit._bind import parameters
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError
from gemskit.nn._drive import row_shape
from gemskit.nn._rows import Rows, Statistic
from gemskit.nn.softmax import SOFTMAX_STATISTICS
from gemskit.pointwise import _fast
from gemskit.reduce._drive import element
from gemskit.reduce._fold import Fold, add_pairs


@operator()
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """``-sum_c q_c * log_softmax(input)_c`` of each row, reduced by ``"mean"``, ``"sum"`` or ``"none"``. Logits stay intact.

    ``input`` is (C), (N, C) or (N, C, d1, ...). ``target`` holds class indices (int64 or uint8, without C), so that ``q`` is
    ``weight`` at the target, or class probabilities (floats, the shape of ``input``), so that ``q = weight * target``.
    Label smoothing mixes in ``weight / C``. Indices equal to ``ignore_index`` give 0 and no gradient, even for NaN logits; the
    mean divides by the weight of the others. An index out of range raises on CPU and gives NaN on an accelerator, where raising
    would have to wait for the kernel. ``z_loss * logsumexp(input) ** 2`` is added to each row, times its weight in the mean.
    Differentiable in ``input`` and in probabilities. ``size_average`` and ``reduce`` are torch's deprecated forms of
    ``reduction``. Source: ``torch.nn.functional.cross_entropy``.
    """
    indices = input.shape != target.shape or not target.dtype.is_floating_point
    if not input.dtype.is_floating_point:
        raise DtypeError(f"cross_entropy: input must be floating point, given {describe(input)}")
    if indices and target.dtype not in (torch.int64, torch.uint8):
        raise DtypeError(f"cross_entropy: target must hold int64 or uint8 class indices, given {describe(target)}")
    if indices and weight is not None and weight.dtype != input.dtype:
        raise DtypeError(f"cross_entropy: weight must have the dtype of input, {input.dtype}, given {describe(weight)}")
    if indices and target.is_meta and target.shape != input.shape:
        target = target.long()
    if not z_loss:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    loss = F.cross_entropy(input, target, weight, None, ignore_index, None, "none", label_smoothing)
    lse = torch.logsumexp(input, min(1, input.ndim - 1))
    share = torch.ones_like(lse)
    if input.shape != target.shape:
        counts = target != ignore_index
        share = (share if weight is None else weight[target.long().where(counts, 0)]).where(counts, 0)
        lse = lse.where(counts, 0)
    loss = loss + z_loss * share * lse.square()
    reduction = reduction_of(size_average, reduce, reduction)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / share.sum()


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """What the deprecated arguments mean where they are given."""
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


@cross_entropy.shape_rule
def _(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> list[tuple[int, ...]] | None:
    reduction, size = rest[3], tuple(input.shape)
    plain = len(size) == 2 and 0 not in size and tuple(target.shape) == size[:1] and rest[0] is None and rest[2] is None
    return [()] if plain and reduction in ("mean", "sum") and (weight is None or weight.shape == size[1:]) else None


# -- row kernels ----------------------------------------------------------------------------------------------------------
# With q_c = ((1 - label_smoothing) * p_c + label_smoothing / C) * weight_c and its sum `mass`, the loss of a row is
# -sum_c q_c * (input_c - peak - log_total) = log_total * mass - sum_c q_c * (input_c - peak), and its gradient
# softmax_c * mass - q_c. The z-loss adds z_loss * share * lse**2 to the loss, with lse = peak + log_total, and twice
# z_loss * share * lse to the mass of the gradient.
# Class indices arrive as `target`, probabilities as `chances`; the other one is None.
# Every kernel returns the loss, the row's weight in the mean, and what the gradient needs: peak, log_total, mass.


@jit
def add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@jit
def _hit(target, weight, col):
    """The class weight where the target is, else 0."""
    if weight is None:
        return tl.where(col == target, 1.0, 0.0)
    else:
        return tl.where(col == target, weight, 0.0)


@jit
def _q(target, chances, weight, label_smoothing, col, cols):
    q = _hit(target, None, col) if chances is None else chances
    if label_smoothing is not None:
        q = (1 - label_smoothing) * q + label_smoothing / cols
    if weight is not None:
        q = q * weight
    return q


@jit
def _in_range(chosen, target, cols):
    # torch stops the whole device on an index out of range; NaN shows it and harms nothing.
    return tl.where((target >= 0) & (target < cols), chosen, float("nan"))


@jit
def _with_z(loss, mass, share, lse, z_loss):
    if z_loss is not None:
        loss += z_loss * share * lse * lse
        mass += 2 * z_loss * share * lse
    return loss, mass


@jit
def _hard(target, ignore_index, cols, peak, total, picked, chosen, z_loss):
    log_total = language.log(total)
    if chosen is None:
        chosen = _in_range(tl.full(total.shape, 1.0, total.dtype), target, cols)
    loss, mass = _with_z(chosen * (log_total - (picked - peak)), chosen, chosen, peak + log_total, z_loss)
    counts = target != ignore_index
    return tl.where(counts, loss, 0.0), tl.where(counts, chosen, 0.0), peak, log_total, tl.where(counts, mass, 0.0)


@jit
def soft_observe(input, peak, target, chances, weight, label_smoothing, col, cols):
    q = _q(target, chances, weight, label_smoothing, col, cols)
    x = input - peak
    if target is None:
        chosen = q * 0
    else:
        chosen = _hit(target, weight, col)
    return language.exp(x), q, q * x, chosen


@jit
def soft(target, ignore_index, cols, peak, total, mass, cross, chosen, z_loss):
    log_total = language.log(total)
    loss = log_total * mass - cross
    if target is None:
        share = tl.full((1, 1), 1.0, total.dtype)
        loss, mass = _with_z(loss, mass, share, peak + log_total, z_loss)
    else:
        share = _in_range(chosen, target, cols)
        loss, mass = _with_z(loss, mass, share, peak + log_total, z_loss)
        counts = target != ignore_index
        loss = tl.where(counts, loss + (share - chosen), 0.0)
        mass = tl.where(counts, mass + (share - chosen), 0.0)
        share = tl.where(counts, share, 0.0)
    return loss, share, peak, log_total, mass


def hard_rows(name: str, formula: Any) -> Rows:
    """Five numbers of each row where q is the weight at the target or 0."""
    gathers = {"picked": ("input", "target"), "chosen": ("weight", "target")}
    return Rows(name, formula, SOFTMAX_STATISTICS, results=5, keep=("target",), gathers=gathers)


def soft_rows(name: str, formula: Any, observe: Any) -> Rows:
    """Five numbers of each row for any other q, of which ``observe`` sums four."""
    statistics = [
        Statistic(("peak",), element, language.maximum, ("lowest",)),
        Statistic(("total", "mass", "cross", "chosen"), observe, add4, (0, 0, 0, 0)),
    ]
    return Rows(name, formula, statistics, results=5, keep=("target",))


_HARD = hard_rows("cross_entropy", _hard)
_SOFT = soft_rows("cross_entropy_soft", soft, soft_observe)


@jit
def _scaled(value, grad, denominator):
    if grad is not None:
        if denominator is not None:
            grad = grad / denominator
        value *= grad
    return value


@jit
def input_grad(
    input,
    grad,
    target,
    chances,
    weight,
    label_smoothing,
    ignore_index,
    softcap,
    peak,
    log_total,
    mass,
    denominator,
    col,
    cols,
    precise,
):
    # Of logits that were capped, softcap * tanh(x / softcap), it is the gradient of x. Without grad it is not scaled yet.
    if precise:
        p = language.exp(input - peak - log_total)
    else:
        p = libdevice.exp2((input - peak) * _fast.LOG2E - log_total * _fast.LOG2E)
    dx = _scaled(p * mass - _q(target, chances, weight, label_smoothing, col, cols), grad, denominator)
    if softcap is not None:
        t = input / softcap
        dx *= 1 - t * t
    if target is not None:
        dx = tl.where(target != ignore_index, dx, 0.0)
    return dx


@jit
def _chances_grad(input, grad, weight, label_smoothing, peak, log_total, denominator):
    d = _scaled(peak + log_total - input, grad, denominator)
    if label_smoothing is not None:
        d *= 1 - label_smoothing
    return d if weight is None else d * weight


INPUT_GRAD = Rows("cross_entropy_grad", input_grad, keep=("target",))
_CHANCES_GRAD = Rows("cross_entropy_grad_target", _chances_grad)


# -- reductions over the rows ---------------------------------------------------------------------------------------------


@jit
def _loss(loss):
    return loss


@jit
def _loss_share(loss, share):
    return loss, share


@jit
def _mean(state0, state1):
    return language.div(state0, state1), state1


_SUM = Fold("cross_entropy_sum", map=_loss, combine=language.add, identity=(0,))
_MEAN = Fold(
    "cross_entropy_mean", map=_loss_share, combine=add_pairs, identity=(0, 0), finish=_mean,
    state=("accumulate", "accumulate"), results=2,
)  # fmt: skip


def operands(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[int, dict[str, Any]]:
    """The dimension of the classes, and the operands as they broadcast over ``input``."""
    dim = min(1, input.ndim - 1)
    hard = input.shape != target.shape
    return dim, {
        "input": input,
        "target": target.unsqueeze(dim) if hard else None,
        "chances": None if hard else target,
        "weight": None if weight is None else weight.reshape(-1, *(1,) * (input.ndim - 1 - dim)),
    }


def observe(
    named: Mapping[str, Any], rows: Mapping[int, Tensor], shape: Sequence[int], dim: int, compute: torch.dtype
) -> None:
    """Results of the row kernels, by number: loss, weight in the mean, peak, log_total, mass."""
    kernel = _HARD if named["target"] is not None and named["label_smoothing"] is None else _SOFT
    kernel(named, tuple(rows.values()), tuple(shape), (dim,), compute, tuple(rows))


def reduced(out: Tensor, rows: Mapping[int, Tensor], reduction: str, compute: torch.dtype) -> Tensor | None:
    """The losses of all rows as one number; what the mean divides by."""
    kept = tuple(rows[0].shape)
    one = (1,) * len(kept)
    results, fold = [out.reshape(one)], _SUM
    if reduction == "mean":
        fold = _MEAN
        results.append(torch.empty(one, dtype=compute, device=out.device))
    states = {"loss": rows[0], "share": rows.get(1)}
    fold(states, results, kept, tuple(range(len(kept))), compute)
    return results[1] if reduction == "mean" else None


def numbers(
    name: str, ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None
) -> dict[str, Any]:
    """The scalars of the row kernels; those that change nothing are no part of them."""
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"{name}: label_smoothing must be between 0 and 1, given {label_smoothing}")
    return {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing or None, "z_loss": z_loss or None,
        "softcap": softcap,
    }  # fmt: skip


@cross_entropy.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Any] | None, input: Tensor, target: Tensor, weight: Tensor | None,
    size_average: bool | None, ignore_index: int, reduce: bool | None, reduction: str, label_smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    scalars = numbers("cross_entropy", ignore_index, label_smoothing, z_loss)
    reduction = reduction_of(size_average, reduce, reduction)
    (out,) = outs
    dim, named = operands(input, target, weight)
    compute = compute_type(out.dtype)
    kept = row_shape(input.shape, (dim,))

    def values() -> Tensor:
        return torch.empty(kept, dtype=compute, device=input.device)

    rows = {0: out.unsqueeze(dim) if reduction == "none" else values()}
    if reduction == "mean":
        rows[1] = values()
    if keep is not None:
        rows |= {2: values(), 3: values(), 4: values()}
        keep.update(peak=rows[2], log_total=rows[3], mass=rows[4], denominator=None)
    observe({**named, **scalars}, rows, input.shape, dim, compute)
    if reduction != "none":
        denominator = reduced(out, rows, reduction, compute)
        if keep is not None:
            keep["denominator"] = denominator


def _gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    peak: Tensor, log_total: Tensor, mass: Tensor, denominator: Tensor | None, needs: set[str],
) -> Mapping[str, Tensor]:  # fmt: skip
    dim, named = operands(input, target, weight)
    named |= numbers("cross_entropy", ignore_index, label_smoothing)
    named |= {
        "grad": grad.unsqueeze(dim) if grad.ndim else grad, "peak": peak, "log_total": log_total, "mass": mass,
        "denominator": denominator,
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, like, kernel in (("input", input, INPUT_GRAD), ("target", target, _CHANCES_GRAD)):
        if name in needs:
            found[name] = torch.empty_like(like)
            kernel(named, (found[name],), input.shape, (dim,), peak.dtype)
    return found


cross_entropy.set_gradient(_gradient, parameters(_gradient), ("input", "target"))


# -- the gradient as an operator ------------------------------------------------------------------------------------------


@operator(writes=("input",), floats=("input",))
def cross_entropy_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, *, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The gradient of :func:`cross_entropy` with respect to ``input``; ``cross_entropy_backward_`` overwrites the logits.

    ``grad_output`` has the shape of the loss. For training loops that write their own backward pass and have no memory for a
    second tensor of that size.
    """
    dim = min(1, input.ndim - 1)
    x = input.to(compute_type(input.dtype))
    log_p = torch.log_softmax(x, dim)
    share: Any = torch.ones_like(x.select(dim, 0)).unsqueeze(dim)
    counts = torch.ones_like(share, dtype=torch.bool)
    by_class = None if weight is None else weight.reshape(-1, *(1,) * (input.ndim - 1 - dim)).to(x.dtype)
    if input.shape == target.shape:
        q = target.to(x.dtype)
    else:
        index = target.long().unsqueeze(dim)
        counts = index != ignore_index
        q = torch.zeros_like(x).scatter(dim, index.where(counts, 0), 1.0)
        share = (share if by_class is None else (q * by_class).sum(dim, keepdim=True)).where(counts, 0)
    q = (1 - label_smoothing) * q + label_smoothing / x.shape[dim]
    q = q if by_class is None else q * by_class
    mass = q.sum(dim, keepdim=True) + 2 * z_loss * share * torch.logsumexp(x, dim, keepdim=True)
    grad = grad_output.to(x.dtype)
    grad = grad.unsqueeze(dim) if reduction == "none" else grad / share.sum() if reduction == "mean" else grad
    found: Tensor = ((log_p.exp() * mass - q) * grad).where(counts, 0).to(input.dtype)
    return found


cross_entropy_backward_ = cross_entropy_backward.inplace


@cross_entropy_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: object, grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    dim, named = operands(input, target, weight)
    named |= numbers("cross_entropy_backward", ignore_index, label_smoothing, z_loss)
    compute, kept = compute_type(input.dtype), row_shape(input.shape, (dim,))
    picked = (1, 2, 3, 4) if reduction == "mean" else (2, 3, 4)
    rows = {k: torch.empty(kept, dtype=compute, device=input.device) for k in picked}
    observe(named, rows, input.shape, dim, compute)
    named |= {"peak": rows[2], "log_total": rows[3], "mass": rows[4], "grad": grad_output, "denominator": None}
    if reduction == "none":
        named["grad"] = grad_output.unsqueeze(dim)
    elif reduction == "mean":
        named["denominator"] = torch.empty((1,) * len(kept), dtype=compute, device=input.device)
        _SUM({"loss": rows[1]}, [named["denominator"]], tuple(kept), tuple(range(len(kept))), compute)
    INPUT_GRAD(named, outs, input.shape, (dim,), compute)
