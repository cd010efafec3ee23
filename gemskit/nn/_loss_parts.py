"""Cross entropy of rows of which a part of the classes is in memory at a time.

The row kernels of a part are given its logits, its own of what varies with the classes, ``target`` and ``ignore_index`` counted
from its first class, and ``classes``, the number of all. What rows need of a part comes to a few numbers; those of all parts are
joined to what :mod:`gemskit.nn.loss` computes of whole rows.
"""

from __future__ import annotations

import triton.language as tl

from gemskit import language
from gemskit._jit import jit
from gemskit.nn._rows import Rows, Statistic
from gemskit.nn.loss import hard_rows, input_grad, soft, soft_observe, soft_rows
from gemskit.pointwise._drive import Elementwise

#: Numbers of a row that a part gives: its peak, the exponentials below it, and the sums over its classes of q, of
#: q * (input - peak) and of the weight at the target.
NUMBERS = ("part_peak", "part_total", "part_mass", "part_cross", "part_chosen")


@jit
def _finite(peak):
    # Of a part that is all -inf, beside others that are not.
    return tl.where(peak == float("-inf"), 0.0, peak)


@jit
def _hard(peak, total, picked, chosen, target, cols):
    there = (target >= 0) & (target < cols)
    if chosen is None:
        chosen = tl.full(total.shape, 1.0, total.dtype)
    chosen = tl.where(there, chosen, 0.0)
    return peak, total, chosen, tl.where(there, chosen * (picked - _finite(peak)), 0.0), chosen


@jit
def _soft_observe(input, peak, target, chances, weight, label_smoothing, classes, col):
    return soft_observe(input, _finite(peak), target, chances, weight, label_smoothing, col, classes)


@jit
def _soft(peak, total, mass, cross, chosen):
    return peak, total, mass, cross, chosen


@jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@jit
def _exponentials(part_peak, part_total):
    return part_peak, tl.where(part_peak == float("-inf"), 0.0, part_total)


@jit
def _sums(part_peak, part_mass, part_cross, part_chosen, peak):
    return part_mass, part_cross + part_mass * (_finite(part_peak) - peak), part_chosen


@jit
def _joined(target, ignore_index, classes, peak, total, mass, cross, chosen, z_loss):
    return soft(target, ignore_index, classes, peak, total, mass, cross, chosen, z_loss)


@jit
def _grad(
    input,
    grad,
    target,
    chances,
    weight,
    label_smoothing,
    ignore_index,
    softcap,
    classes,
    peak,
    log_total,
    mass,
    denominator,
    col,
    precise,
):
    return input_grad(
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
        classes,
        precise,
    )


@jit
def _shifted(target, start):
    return target - start


#: The numbers of a part: where q is the weight at the target or 0, and of any other q.
PART_HARD = hard_rows("cross_entropy_part", _hard)
PART_SOFT = soft_rows("cross_entropy_part_soft", _soft, _soft_observe)
#: Loss, weight in the mean, peak, log_total and mass of rows, whose columns are the parts.
JOIN = Rows(
    "cross_entropy_parts",
    _joined,
    [
        Statistic(("peak", "total"), _exponentials, language.online_softmax, ("lowest", 0)),
        Statistic(("mass", "cross", "chosen"), _sums, _add3, (0, 0, 0)),
    ],
    results=5,
    keep=("target",),
)
PART_GRAD = Rows("cross_entropy_part_grad", _grad, keep=("target",))
#: Targets counted from the first class of a part.
SHIFTED = Elementwise("cross_entropy_part_target", _shifted)
