"""The loss of a linear layer's output, a part of which is in memory at a time."""

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
from gemskit.nn._loss_parts import JOIN, NUMBERS, PART_GRAD, PART_HARD, PART_SOFT, SHIFTED
from gemskit.nn.loss import cross_entropy, numbers, reduced
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import cast
from gemskit.reduce._drive import element
from gemskit.reduce._fold import Fold

#: What parts begin at multiples of: the wider side of a tile of a product.
TILE = 256
#: Classes of a part, and the most parts. Each part adds its share of the input's gradient to a sum in float32: at 4096 classes
#: these bytes take 5 % of the time of its products. At 128256 x 4096 and 8192 rows, 15 parts of 33 or 34 tiles fill the last
#: round of an H200 (a loss of 1 % by the model in blas/_rule.py), 16 do not (3 %).
CLASSES, FIFTEEN = 4096, 15
#: Rows of a part, and the most parts, where the forward pass computes gradients. Each part reads all of the weight.
ROWS, EIGHT = 1024, 8


def parts(size: int, least: int, most: int) -> list[tuple[int, int]]:
    """Start and size of at most so many parts of at least this size, or of the one part that there is."""
    tiles, count = cdiv(size, TILE), max(1, min(most, size // least))
    edges = [min(size, tiles * k // count * TILE) for k in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def keeps_logits(rows: int, classes: int, features: int) -> bool:
    """Whether all logits are kept for the gradient: they are small beside the weight, or beside the input."""
    return min(rows, classes) <= features // 4


def in_forward(prepare: str, reduction: str, rows: int, features: int) -> bool:
    """Whether the forward pass computes the gradients, by parts of the rows: that takes a product less.

    But the weight's is summed over the parts in float32. With fewer rows than this the sum is more than a quarter of the logits,
    and its bytes, read and written for every part, take as long as that product.
    """
    return reduction != "none" and (prepare == "input" or (prepare != "" and rows >= 8 * features))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """:func:`cross_entropy` of ``input @ linear_weight.T + linear_bias``, whose logits (N, C) are not stored.

    Those of a fifteenth of the classes are in memory at a time (or of 4096, where that is more; all where N or C is a quarter of
    H at most). ``input`` is (N, H) or (H), ``target`` as of cross_entropy. ``softcap`` turns logits into
    ``softcap * tanh(logits / softcap)``. Halves are multiplied and rounded to halves as by :func:`linear`;
    ``out_dtype=torch.float32`` converts these logits first, so that the loss is float32.

    The backward pass computes the logits of each part again (four products in all, where stored logits take three), so that the
    gradient of the weight is written once and nothing else is as large. Where only ``input`` needs a gradient, or N is 8 * H at
    least, the forward pass computes the gradients, by parts of the rows, unless ``reduction`` is ``"none"``: the one sum in
    float32 that this needs is then small beside the logits. Source: ``torch.nn.functional.linear_cross_entropy``.
    """
    given = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    grads = [n for n, t in given.items() if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()]
    return fused_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, -100 if ignore_index is None else ignore_index,
        label_smoothing, z_loss, softcap, out_dtype, " ".join(grads),
    )  # fmt: skip


@operator(floats=("input", "linear_weight"))
def fused_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, out_dtype: torch.dtype | None = None,
    prepare: str = "",
) -> Tensor:  # fmt: skip
    """:func:`linear_cross_entropy`, told in ``prepare`` which gradients will be asked for."""
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
    if out_dtype not in (None, input.dtype, compute_type(input.dtype)):
        raise DtypeError(
            f"fused_linear_cross_entropy: out_dtype is the dtype of input or the one computed in, "
            f"{compute_type(input.dtype)}, given {out_dtype}"
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
def _scaled(value, grad, denominator):
    if denominator is not None:
        scale = language.div(grad, denominator)
        # Where nothing counts the mean is 0 / 0, but no row has a gradient.
        return tl.where((denominator == 0) & (value == 0), 0, value * scale)
    else:
        return value * grad


_SCALED = Elementwise("linear_cross_entropy_scaled", _scaled)
_BIAS = Fold("linear_cross_entropy_bias", map=element, combine=language.add, identity=(0,))


class _Logits:
    """Memory for the logits of a part, and what computes and reads them."""

    def __init__(self, named: Mapping[str, Any], rows: int, pieces: Sequence[tuple[int, int]]) -> None:
        input: Tensor = named["input"]
        # Rows begin at multiples of 16 bytes, which descriptors of factors need.
        shape = (rows, cdiv(max(size for _, size in pieces), 64) * 64)
        self.buffer = torch.empty(shape, dtype=input.dtype, device=input.device)
        self.capped = None if named["softcap"] is None else Epilogue(_capped, _capped_meaning, softcap=named["softcap"])

    def of(
        self, named: Mapping[str, Any], start: int, size: int, kept: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The memory, and the arguments of the row kernels for these classes, whose logits are in it if not ``kept``."""
        input, weight, bias = named["input"], named["linear_weight"], named["linear_bias"]
        buffer = self.buffer.narrow(0, 0, len(input)).narrow(1, 0, size)
        if kept is None:
            bias = None if bias is None else bias.narrow(0, start, size)
            linear(input, weight.narrow(0, start, size), bias, epilogue=self.capped, out=buffer)
        target, weight = named["target"], named["weight"]
        part = {**named, "input": buffer if kept is None else kept.narrow(1, 0, size)}
        part |= {"target": None, "chances": None, "weight": None if weight is None else weight.narrow(0, start, size)}
        if target.ndim == 2:
            part["chances"] = target.narrow(1, start, size)
            return buffer, part
        part["target"] = target[:, None]
        if start:
            part["target"] = torch.empty((len(target), 1), dtype=torch.int64, device=target.device)
            SHIFTED({"target": target[:, None], "start": start}, [part["target"]], torch.int64)
            part["ignore_index"] = named["ignore_index"] - start
        return buffer, part


def _observe(
    named: Mapping[str, Any], rows: Mapping[int, Tensor], logits: _Logits, pieces: Sequence[tuple[int, int]],
    compute: torch.dtype,
) -> None:  # fmt: skip
    """Fill ``rows`` by number: loss, weight in the mean, peak, log_total, mass."""
    input, target = named["input"], named["target"]
    hard = target.ndim == 1
    kernel = PART_HARD if hard and named["label_smoothing"] is None else PART_SOFT
    found = torch.empty((len(NUMBERS), len(pieces), len(input), 1), dtype=compute, device=input.device)
    for k, piece in enumerate(pieces):
        buffer, part = logits.of(named, *piece)
        kernel(part, tuple(found[n, k] for n in range(len(NUMBERS))), buffer.shape, (1,), compute)
    joined = {**named, **{n: found[k, :, :, 0].mT for k, n in enumerate(NUMBERS)}}
    joined["target"] = target[:, None] if hard else None
    JOIN(joined, tuple(rows.values()), (len(input), len(pieces)), (1,), compute, tuple(rows))


def _differentiate(
    named: Mapping[str, Any], rows: Mapping[int, Tensor], grads: Mapping[str, Tensor], logits: _Logits,
    pieces: Sequence[tuple[int, int]], compute: torch.dtype, kept: Tensor | None = None, grad: Tensor | None = None,
    denominator: Tensor | None = None, more: bool = False,
) -> None:  # fmt: skip
    """Fill ``grads``, by parameter, a part of the classes at a time; ``kept`` are the logits if there is one part.

    The gradients are those of the sum of all losses unless ``grad`` and ``denominator`` are given, which then scale them. With
    ``more`` the weight's has a sum of other rows, which is added to.
    """
    input, weight = named["input"], named["linear_weight"]
    scale = {"grad": grad.unsqueeze(1) if grad is not None and grad.ndim else grad, "denominator": denominator}
    for start, size in pieces:
        buffer, part = logits.of(named, start, size, kept)
        part |= {"peak": rows[2], "log_total": rows[3], "mass": rows[4], **scale}
        PART_GRAD(part, (buffer,), buffer.shape, (1,), compute)
        if "input" in grads:
            total, share = grads["input"], weight.narrow(0, start, size)
            if start:
                addmm_(total, buffer, share, total.dtype)
            else:
                mm(buffer, share, total.dtype, out=total)
        if "linear_weight" in grads:
            total = grads["linear_weight"].narrow(0, start, size)
            if more:
                addmm_(total, buffer.mT, input, total.dtype)
            else:
                mm(buffer.mT, input, total.dtype, out=total)
        if "linear_bias" in grads:
            _BIAS({"input": buffer}, [grads["linear_bias"].narrow(0, start, size)[None]], buffer.shape, (0,), compute)


def _by_rows(
    named: Mapping[str, Any], rows: Mapping[int, Tensor], names: Sequence[str], compute: torch.dtype
) -> dict[str, Tensor]:  # fmt: skip
    """Fill ``rows`` and return the gradients of the sum of all losses, a part of the rows at a time."""
    input, size, device = named["input"], named["linear_weight"].shape, named["input"].device
    whole, pieces = [(0, named["classes"])], parts(len(input), ROWS, EIGHT)
    logits = _Logits(named, max(count for _, count in pieces), whole)
    specs = {"input": (input.shape, input.dtype), "linear_weight": (size, compute)}
    grads = {n: torch.empty(specs[n][0], dtype=specs[n][1], device=device) for n in names if n in specs}
    biases = torch.empty((len(pieces) * ("linear_bias" in names), size[0]), dtype=compute, device=device)
    for k, (start, count) in enumerate(pieces):
        some = {**named, "input": input.narrow(0, start, count), "target": named["target"].narrow(0, start, count)}
        found = {n: t.narrow(0, start, count) for n, t in rows.items()}
        _observe(some, found, logits, whole, compute)
        wanted = {n: t.narrow(0, start, count) if n == "input" else t for n, t in grads.items()}
        if "linear_bias" in names:
            wanted["linear_bias"] = biases[k]
        _differentiate(some, found, wanted, logits, whole, compute, logits.buffer.narrow(0, 0, count), more=k > 0)
    if "linear_bias" in names:
        grads["linear_bias"] = torch.empty(size[0], dtype=compute, device=device)
        _BIAS({"input": biases}, [grads["linear_bias"][None]], biases.shape, (0,), compute)
    return grads


def _matrices(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the one row of a vector as a matrix, and the number of classes."""
    named = {**named, "classes": len(named["linear_weight"])}
    if named["input"].ndim == 1:
        named |= {"input": named["input"][None], "target": named["target"][None]}
    return named


@fused_linear_cross_entropy.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Any] | None, *, reduction: str, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, out_dtype: torch.dtype | None, prepare: str, **tensors: Any,
) -> None:  # fmt: skip
    (out,) = outs
    named = _matrices(tensors)
    named |= numbers("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap)
    input, compute = named["input"], compute_type(out.dtype)
    whole = [(0, named["classes"])]
    rows = {
        k: torch.empty((len(input), 1), dtype=compute, device=input.device)
        for k in (*[0] * (reduction != "none"), *[1] * (reduction == "mean"), *(2, 3, 4) * (keep is not None))
    }
    if reduction == "none":
        rows[0] = out.reshape(-1, 1)
    kept: dict[str, Tensor | None] = dict.fromkeys(("logits", "d_input", "d_linear_weight", "d_linear_bias"))
    if keep is not None and keeps_logits(len(input), named["classes"], input.shape[1]):
        logits = _Logits(named, len(input), whole)
        _observe(named, rows, logits, whole, compute)
        kept["logits"] = logits.buffer
    elif keep is not None and in_forward(prepare, reduction, *input.shape):
        kept |= {f"d_{n}": t for n, t in _by_rows(named, rows, prepare.split(), compute).items()}
    else:
        pieces = parts(named["classes"], CLASSES, FIFTEEN)
        _observe(named, rows, _Logits(named, len(input), pieces), pieces, compute)
    denominator = reduced(out, rows, reduction, compute) if reduction != "none" else None
    if keep is not None:
        keep.update(peak=rows[2], log_total=rows[3], mass=rows[4], denominator=denominator, **kept)


def _gradient(
    grad: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, peak: Tensor, log_total: Tensor,
    mass: Tensor, denominator: Tensor | None, logits: Tensor | None, d_input: Tensor | None,
    d_linear_weight: Tensor | None, d_linear_bias: Tensor | None, needs: set[str], like: Mapping[str, Any],
) -> Mapping[str, Tensor]:  # fmt: skip
    compute = compute_type(grad.dtype)
    found: dict[str, Tensor] = {}
    for n, value in (("input", d_input), ("linear_weight", d_linear_weight), ("linear_bias", d_linear_bias)):
        if value is not None and n in needs:
            found[n] = torch.empty(like[n][0], dtype=like[n][1], device=grad.device)
            scaled = {"value": shaped(value, like[n][0]), "grad": grad, "denominator": denominator}
            if denominator is not None:
                scaled["denominator"] = denominator.reshape(())
            _SCALED(scaled, [found[n]], compute)
    others = needs - {*found}
    if others:
        given = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
        named = _matrices({**given, "weight": weight})
        named |= numbers("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap)
        pieces = parts(named["classes"], CLASSES, FIFTEEN) if logits is None else [(0, named["classes"])]
        grads = {n: torch.empty(like[n][0], dtype=like[n][1], device=grad.device) for n in sorted(others - {"input"})}
        if "input" in others:
            # The only sum over parts.
            dtype = input.dtype if len(pieces) == 1 else compute
            grads["input"] = torch.empty(named["input"].shape, dtype=dtype, device=grad.device)
        rows = {2: peak, 3: log_total, 4: mass}
        memory = _Logits(named, len(named["input"]), pieces)
        _differentiate(named, rows, grads, memory, pieces, compute, logits, grad, denominator)
        found.update({n: cast(shaped(t, like[n][0]), like[n][1]) for n, t in grads.items()})
    return found


fused_linear_cross_entropy.set_gradient(_gradient, parameters(_gradient), ("input", "linear_weight", "linear_bias"))
