"""The loss of a linear layer's output, a part of whose rows is in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import language
from gemskit._bind import parameters
from gemskit._checks import describe
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit._layout import cdiv
from gemskit._op import operator
from gemskit.blas._epilogue import Epilogue
from gemskit.blas._terms import shaped
from gemskit.blas.matmul import addmm_, linear, mm
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.nn.loss import INPUT_GRAD, cross_entropy, numbers, observe, operands, reduced
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import cast
from gemskit.reduce._fold import Fold

#: Rows that products need to be fast. Each part reads all of the weight, and reads and writes all of its gradient: 1 ms of
#: 4.2 GB at 128256x4096 in float32, where the products of 900 rows take 4.
LEAST = 896
#: Rows of a tile of a product.
TILE = 128


def parts(rows: int) -> list[tuple[int, int]]:
    """Start and number of the rows whose logits are in memory together: a ninth of all, where that is enough."""
    tiles = cdiv(rows, TILE)
    count = max(1, cdiv(tiles, max(rows // 9, LEAST) // TILE))
    edges = [min(rows, tiles * k // count * TILE) for k in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, out_dtype: torch.dtype | None = None,
    acc_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """:func:`cross_entropy` of ``input @ linear_weight.T + linear_bias``, whose logits (N, C) are never stored.

    A ninth of them is in memory at a time (or those of 896 rows, where that is more). ``input`` is (N, H) or (H), ``target``
    as of cross_entropy. ``softcap`` turns logits into ``softcap * tanh(logits / softcap)``. Halves are multiplied and rounded
    to halves as by :func:`linear`; ``out_dtype=torch.float32`` converts these logits first, so that the loss is float32.

    Where gradients are needed, the forward pass computes them (three products in all, as with stored logits) unless
    ``reduction`` is ``"none"``, which computes the logits again. The gradient of the weight is summed over the parts in
    ``acc_dtype``: float32 for halves, or their own dtype to save memory. Source: ``torch.nn.functional.linear_cross_entropy``.
    """
    given = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    grads = [n for n, t in given.items() if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()]
    return fused_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, -100 if ignore_index is None else ignore_index,
        label_smoothing, z_loss, softcap, out_dtype, acc_dtype, " ".join(grads),
    )  # fmt: skip


@operator(floats=("input", "linear_weight"))
def fused_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, out_dtype: torch.dtype | None = None,
    acc_dtype: torch.dtype | None = None, prepare: str = "",
) -> Tensor:  # fmt: skip
    """:func:`linear_cross_entropy`, told in ``prepare`` which gradients the forward pass computes; others compute logits anew."""
    if input.ndim not in (1, 2) or linear_weight.ndim != 2:
        raise ShapeError(
            f"fused_linear_cross_entropy: input must be (N, H) or (H) and linear_weight (C, H), given {describe(input)} and "
            f"{describe(linear_weight)}"
        )
    if not input.dtype == linear_weight.dtype == (input if linear_bias is None else linear_bias).dtype:
        raise DtypeError(
            f"fused_linear_cross_entropy: input, linear_weight and linear_bias must have one dtype, given {describe(input)}, "
            f"{describe(linear_weight)} and {describe(linear_bias)}"
        )
    for dtype in (out_dtype, acc_dtype):
        if dtype not in (None, input.dtype, compute_type(input.dtype)):
            raise DtypeError(
                f"fused_linear_cross_entropy: out_dtype and acc_dtype are the dtype of input or the one computed in, "
                f"{compute_type(input.dtype)}, given {dtype}"
            )
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"fused_linear_cross_entropy: softcap must be positive, given {softcap}")
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy.meaning(
        logits.to(out_dtype or input.dtype), target, weight, None, ignore_index, None, reduction, label_smoothing,
        z_loss=z_loss,
    )  # fmt: skip


@jit
def _capped(acc, softcap):
    return softcap * language.tanh(acc * language.div(softcap * 0 + 1, softcap))


def _capped_meaning(acc: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(acc / softcap)


@jit
def _element(value):
    return value


@jit
def _scaled(value, grad, denominator):
    if denominator is not None:
        scale = language.div(grad, denominator)
        # Where nothing counts the mean is 0 / 0, but no row has a gradient.
        return tl.where((denominator == 0) & (value == 0), 0, value * scale)
    else:
        return value * grad


_SCALED = Elementwise("linear_cross_entropy_scaled", _scaled)
_BIAS = Fold("linear_cross_entropy_bias", map=_element, combine=language.add, identity=(0,))


def _walk(
    named: Mapping[str, Any], rows: Mapping[int, Tensor], grads: dict[str, Tensor], compute: torch.dtype,
    grad: Tensor | None = None, denominator: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``rows`` (by number, of :func:`observe`) and ``grads`` (by parameter), a part of the rows at a time.

    The gradients are those of the sum of all losses unless ``grad`` and ``denominator`` are given, which then scale them.
    """
    input, weight, target = named["input"], named["linear_weight"], named["target"]
    pieces, classes = parts(len(input)), len(weight)
    # Rows begin at multiples of 16 bytes, which descriptors of factors need.
    shape = (max(size for _, size in pieces), cdiv(classes, 64) * 64)
    buffer = torch.empty(shape, dtype=input.dtype, device=input.device).narrow(1, 0, classes)
    biases = torch.empty((len(pieces), classes), dtype=compute, device=input.device) if "linear_bias" in grads else None
    capped = None if named["softcap"] is None else Epilogue(_capped, _capped_meaning, softcap=named["softcap"])
    for k, (start, size) in enumerate(pieces):
        logits, x = buffer.narrow(0, 0, size), input.narrow(0, start, size)
        linear(x, weight, named["linear_bias"], epilogue=capped, out=logits)
        part = {n: t.narrow(0, start, size) for n, t in rows.items()}
        _, found = operands(logits, target.narrow(0, start, size), named["weight"])
        scalars = {**named, **found}
        observe(scalars, part, logits.shape, 1, compute)
        if not grads:
            continue
        scalars |= {"peak": part[2], "log_total": part[3], "mass": part[4], "denominator": denominator}
        scalars["grad"] = grad.narrow(0, start, size).unsqueeze(1) if grad is not None and grad.ndim else grad
        INPUT_GRAD(scalars, (logits,), logits.shape, (1,), compute)
        if "input" in grads:
            mm(logits, weight, out=grads["input"].narrow(0, start, size))
        if "linear_weight" in grads:
            total = grads["linear_weight"]
            if k:
                addmm_(total, logits.mT, x, total.dtype)
            else:
                mm(logits.mT, x, total.dtype, out=total)
        if biases is not None:
            _BIAS({"value": logits}, [biases.narrow(0, k, 1)], logits.shape, (0,), compute)
    if biases is not None:
        _BIAS({"value": biases}, [grads["linear_bias"][None]], biases.shape, (0,), compute)


def _empty(names: Sequence[str], input: Tensor, weight: Tensor, acc_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Memory for the gradients of these parameters."""
    compute = compute_type(input.dtype)
    specs = {
        "input": (input.shape, input.dtype), "linear_weight": (weight.shape, acc_dtype or compute),
        "linear_bias": (weight.shape[:1], compute),
    }  # fmt: skip
    return {n: torch.empty(specs[n][0], dtype=specs[n][1], device=input.device) for n in names}


def _matrices(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the one row of a vector as a matrix."""
    if named["input"].ndim == 2:
        return dict(named)
    return {**named, "input": named["input"][None], "target": named["target"][None]}


@fused_linear_cross_entropy.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Any] | None, *, reduction: str, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, out_dtype: torch.dtype | None, acc_dtype: torch.dtype | None, prepare: str,
    **tensors: Any,
) -> None:  # fmt: skip
    (out,) = outs
    named = _matrices(tensors)
    named |= numbers("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap)
    input, compute = named["input"], compute_type(out.dtype)
    grads: dict[str, Tensor] = {}
    if keep is not None and reduction != "none":
        grads = _empty(prepare.split(), input, named["linear_weight"], acc_dtype)
    rows = {
        k: torch.empty((len(input), 1), dtype=compute, device=input.device)
        for k in (*[0] * (reduction != "none"), *[1] * (reduction == "mean"), *(2, 3, 4) * bool(grads))
    }
    if reduction == "none":
        rows[0] = out.reshape(-1, 1)
    _walk(named, rows, grads, compute)
    denominator = reduced(out, rows, reduction, compute) if reduction != "none" else None
    if keep is not None:
        keep.update(
            {f"d_{n}": grads.get(n) for n in ("input", "linear_weight", "linear_bias")}, denominator=denominator
        )


def _gradient(
    grad: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, acc_dtype: torch.dtype | None,
    d_input: Tensor | None, d_linear_weight: Tensor | None, d_linear_bias: Tensor | None, denominator: Tensor | None,
    needs: set[str], like: Mapping[str, Any],
) -> Mapping[str, Tensor]:  # fmt: skip
    compute = compute_type(grad.dtype)
    kept = {"input": d_input, "linear_weight": d_linear_weight, "linear_bias": d_linear_bias}
    found: dict[str, Tensor] = {}
    for n in needs:
        shape, dtype = like[n]
        value = kept[n]
        if value is not None:
            found[n] = torch.empty(shape, dtype=dtype, device=grad.device)
            scaled = {"value": shaped(value, shape), "grad": grad, "denominator": denominator}
            if denominator is not None:
                scaled["denominator"] = denominator.reshape(())
            _SCALED(scaled, [found[n]], compute)
    others = [n for n in kept if n in needs and n not in found]
    if others:
        given = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
        named = _matrices({**given, "weight": weight})
        named |= numbers("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap)
        grads = _empty(others, named["input"], linear_weight, acc_dtype)
        rows = {k: torch.empty((len(named["input"]), 1), dtype=compute, device=grad.device) for k in (2, 3, 4)}
        _walk(named, rows, grads, compute, grad, denominator)
        found.update({n: cast(shaped(t, like[n][0]), like[n][1]) for n, t in grads.items()})
    return found


fused_linear_cross_entropy.set_gradient(_gradient, parameters(_gradient), ("input", "linear_weight", "linear_bias"))
