"""Losses of rows of logits."""

from __future__ import annotations

from collections.abc import Mapping
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
from gemskit.nn.softmax import SOFTMAX_STATISTICS, element
from gemskit.pointwise import _fast
from gemskit.reduce._fold import Fold, add_pairs


@operator()
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """``-sum_c q_c * log_softmax(input)_c`` of each row, reduced by ``"mean"``, ``"sum"`` or ``"none"``. Logits stay intact.

    ``input`` is (C), (N, C) or (N, C, d1, ...). ``target`` holds class indices (int64 or uint8, without C), so that ``q`` is
    ``weight`` at the target, or class probabilities (floats, the shape of ``input``), so that ``q = weight * target``.
    Label smoothing mixes in ``weight / C``. Indices equal to ``ignore_index`` give 0 and no gradient, even for NaN logits; the
    mean divides by the weight of the others. An index out of range raises on CPU and gives NaN on an accelerator, where raising
    would have to wait for the kernel. Differentiable in ``input`` and in probabilities. ``size_average`` and ``reduce`` are
    torch's deprecated forms of ``reduction``. Source: ``torch.nn.functional.cross_entropy``.
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
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


@cross_entropy.shape_rule
def _(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> list[tuple[int, ...]] | None:
    reduction, size = rest[3], tuple(input.shape)
    plain = len(size) == 2 and 0 not in size and tuple(target.shape) == size[:1] and rest[0] is None and rest[2] is None
    return [()] if plain and reduction in ("mean", "sum") and (weight is None or weight.shape == size[1:]) else None


# -- row kernels ----------------------------------------------------------------------------------------------------------
# With q_c = ((1 - label_smoothing) * p_c + label_smoothing / C) * weight_c and its sum `mass`, the loss of a row is
# -sum_c q_c * (input_c - peak - log_total) = log_total * mass - sum_c q_c * (input_c - peak), and its gradient
# softmax_c * mass - q_c. Class indices arrive as `target`, probabilities as `chances`; the other one is None.
# Every kernel returns the loss, the row's weight in the mean, and what the gradient needs: peak, log_total, mass.


@jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
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
def _hard(target, ignore_index, cols, peak, total, picked, chosen):
    log_total = language.log(total)
    if chosen is None:
        chosen = _in_range(tl.full(total.shape, 1.0, total.dtype), target, cols)
    counts = target != ignore_index
    mass = tl.where(counts, chosen, 0.0)
    loss = tl.where(counts, chosen * (log_total - (picked - peak)), 0.0)
    return loss, mass, peak, log_total, mass


@jit
def _soft_observe(input, peak, target, chances, weight, label_smoothing, col, cols):
    q = _q(target, chances, weight, label_smoothing, col, cols)
    x = input - peak
    if target is None:
        chosen = q * 0
    else:
        chosen = _hit(target, weight, col)
    return language.exp(x), q, q * x, chosen


@jit
def _soft(target, ignore_index, cols, peak, total, mass, cross, chosen):
    log_total = language.log(total)
    loss = log_total * mass - cross
    if target is None:
        share = tl.full((1, 1), 1.0, total.dtype)
    else:
        share = _in_range(chosen, target, cols)
        counts = target != ignore_index
        loss = tl.where(counts, loss + (share - chosen), 0.0)
        mass = tl.where(counts, mass + (share - chosen), 0.0)
        share = tl.where(counts, share, 0.0)
    return loss, share, peak, log_total, mass


_HARD = Rows(
    "cross_entropy",
    _hard,
    SOFTMAX_STATISTICS,
    results=5,
    keep=("target",),
    gathers={"picked": ("input", "target"), "chosen": ("weight", "target")},
)
_SOFT = Rows(
    "cross_entropy_soft",
    _soft,
    [
        Statistic(("peak",), element, language.maximum, ("lowest",)),
        Statistic(("total", "mass", "cross", "chosen"), _soft_observe, _add4, (0, 0, 0, 0)),
    ],
    results=5,
    keep=("target",),
)


@jit
def _scaled(grad, denominator):
    if denominator is not None:
        grad = grad / denominator
    return grad


@jit
def _input_grad(
    input,
    grad,
    target,
    chances,
    weight,
    label_smoothing,
    ignore_index,
    peak,
    log_total,
    mass,
    denominator,
    col,
    cols,
    precise,
):
    if precise:
        p = language.exp(input - peak - log_total)
    else:
        p = libdevice.exp2((input - peak) * _fast.LOG2E - log_total * _fast.LOG2E)
    dx = (p * mass - _q(target, chances, weight, label_smoothing, col, cols)) * _scaled(grad, denominator)
    if target is not None:
        dx = tl.where(target != ignore_index, dx, 0.0)
    return dx


@jit
def _chances_grad(input, grad, weight, label_smoothing, peak, log_total, denominator):
    d = (peak + log_total - input) * _scaled(grad, denominator)
    if label_smoothing is not None:
        d *= 1 - label_smoothing
    return d if weight is None else d * weight


_INPUT_GRAD = Rows("cross_entropy_grad", _input_grad, keep=("target",))
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


def _operands(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[int, dict[str, Tensor | None]]:
    """The dimension of the classes, and the operands as they broadcast over ``input``."""
    dim = min(1, input.ndim - 1)
    hard = input.shape != target.shape
    return dim, {
        "input": input,
        "target": target.unsqueeze(dim) if hard else None,
        "chances": None if hard else target,
        "weight": None if weight is None else weight.reshape(-1, *(1,) * (input.ndim - 1 - dim)),
    }


@cross_entropy.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Any] | None, input: Tensor, target: Tensor, weight: Tensor | None,
    size_average: bool | None, ignore_index: int, reduce: bool | None, reduction: str, label_smoothing: float,
) -> None:  # fmt: skip
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"cross_entropy: label_smoothing must be between 0 and 1, given {label_smoothing}")
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    (out,) = outs
    dim, named = _operands(input, target, weight)
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
    kernel = _HARD if named["target"] is not None and label_smoothing == 0 else _SOFT
    numbers = {"ignore_index": ignore_index, "label_smoothing": label_smoothing or None}
    kernel({**named, **numbers}, tuple(rows.values()), input.shape, (dim,), compute, tuple(rows))
    if reduction == "none":
        return
    one = (1,) * len(kept)
    results = [out.reshape(one)]
    fold = _SUM
    if reduction == "mean":
        fold = _MEAN
        results.append(torch.empty(one, dtype=compute, device=input.device))
        if keep is not None:
            keep["denominator"] = results[1]
    states = {"loss": rows[0], "share": rows.get(1)}
    fold(states, results, tuple(kept), tuple(range(len(kept))), compute)


def _gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    peak: Tensor, log_total: Tensor, mass: Tensor, denominator: Tensor | None, needs: set[str],
) -> Mapping[str, Tensor]:  # fmt: skip
    dim, operands = _operands(input, target, weight)
    named = {
        **operands, "grad": grad.unsqueeze(dim) if grad.ndim else grad, "peak": peak, "log_total": log_total, "mass": mass,
        "denominator": denominator, "ignore_index": ignore_index, "label_smoothing": label_smoothing or None,
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, like, kernel in (("input", input, _INPUT_GRAD), ("target", target, _CHANCES_GRAD)):
        if name in needs:
            found[name] = torch.empty_like(like)
            kernel(named, (found[name],), input.shape, (dim,), peak.dtype)
    return found


cross_entropy.set_gradient(_gradient, parameters(_gradient), ("input", "target"))
