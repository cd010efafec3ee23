"""Rows of a table, selected by index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._checks import describe
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named, Op, P, R, operator
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError
from gemskit.pointwise._place import clear, copy, zeros


@jit(repr=lambda _: "embedding")
def embedding_gather(
    out, table, index, sizes, out_rows, index_rows, out_col, table_row, table_col, rows, cols, size,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[i] = table[index[i]]``; an index outside the table gives NaN (0 in a table of integers)."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(cols, BN)
    row = (i // blocks) * BM + tl.arange(0, BM)[:, None]
    col = (i % blocks) * BN + tl.arange(0, BN)[None, :]
    at = tl.load(index + offset(row, sizes, index_rows), row < rows, other=-1).to(tl.int64)
    other = float("nan") if table.dtype.element_ty.is_floating() else 0
    seen = (at >= 0) & (at < size) & (col < cols)
    value = tl.load(table + at * table_row + col * table_col, seen, other=other)
    tl.store(out + offset(row, sizes, out_rows) + col * out_col, value, (row < rows) & (col < cols))


@jit(repr=lambda _: "embedding_count")
def embedding_count(count, index, sizes, index_rows, rows, size, BM: tl.constexpr, WIDE: tl.constexpr):
    """``count[index[i]] += 1``; sums of integers do not depend on their order."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    row = i * BM + tl.arange(0, BM)
    at = tl.load(index + offset(row, sizes, index_rows), row < rows, other=-1).to(tl.int64)
    tl.atomic_add(count + at, tl.full((BM,), 1, tl.int32), (at >= 0) & (at < size), sem="relaxed")


@jit(repr=lambda _: "embedding_grad")
def embedding_grad(
    out, grad, index, count, sizes, grad_rows, index_rows, grad_col, rows, cols, size, padding,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[index[i]] += grad[i] / count[index[i]]`` by atomic adds into a dense table, in no fixed order."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(cols, BN)
    row = (i // blocks) * BM + tl.arange(0, BM)[:, None]
    col = (i % blocks) * BN + tl.arange(0, BN)[None, :]
    at = tl.load(index + offset(row, sizes, index_rows), row < rows, other=-1).to(tl.int64)
    live = (at >= 0) & (at < size) & (at != padding)
    value = tl.load(grad + offset(row, sizes, grad_rows) + col * grad_col, live & (col < cols), other=0).to(ACC)
    if count is not None:
        value /= tl.load(count + at, live, other=1).to(ACC)
    tl.atomic_add(out + at * cols + col, value, live & (col < cols), sem="relaxed")


@jit(repr=lambda _: "embedding_grad_ordered")
def embedding_grad_ordered(
    out, grad, index, count, sizes, grad_rows, index_rows, grad_col, rows, cols, size, padding,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `embedding_grad`, in the order of the index: a program owns a row and looks for it, BM indices at a time."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(cols, BN)
    mine = i // blocks
    col = (i % blocks) * BN + tl.arange(0, BN)
    lane = tl.arange(0, BM)
    acc = tl.zeros((BN,), ACC)
    if mine != padding:
        for start in range(0, rows, BM):
            row = start + lane
            if WIDE:
                row = row.to(tl.int64)
            at = tl.load(index + offset(row, sizes, index_rows), row < rows, other=-1).to(tl.int64)
            first = tl.min(tl.where(at == mine, lane, BM), 0)
            while first < BM:
                base = grad + offset(start + first + mine * 0, sizes, grad_rows)
                acc += tl.load(base + col * grad_col, col < cols, other=0).to(ACC)
                first = tl.min(tl.where((at == mine) & (lane > first), lane, BM), 0)
        if count is not None:
            acc /= tl.maximum(tl.load(count + mine), 1).to(ACC)
    tl.store(out + mine.to(tl.int64) * cols + col, acc.to(out.dtype.element_ty), col < cols)


def _tile(cols: int, rows: int, itemsize: int) -> dict[str, int]:
    """A program moves 16 bytes for each of the table's ``block`` lanes, whole rows if they fit."""
    config = backends.arch().config("gather")
    elements = max(1, config["block"] * 16 // itemsize)
    bn = min(_layout.next_power_of_2(max(cols, 1)), elements)
    bm = min(max(1, elements // bn), _layout.next_power_of_2(max(rows, 1)), 64)
    return dict(BN=bn, BM=bm, num_warps=config["warps"])


class _Embedding(Op[P, R]):
    """The operator with its gather kernel."""

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        for n in ("max_norm", "sparse"):
            if named[n]:
                why = "writes into weight" if n == "max_norm" else "gives a sparse gradient"
                raise NoKernel(f"embedding: no kernel for {n}={named[n]!r}, which {why}; accepted: {n} left out")
        index, weight, out = named["input"], named["weight"], outs[0]
        sizes, (index_rows, out_rows) = _layout.collapse(index.shape, [tuple(index.stride()), tuple(out.stride()[:-1])])
        rows, (size, cols) = math.prod(index.shape), weight.shape
        wide = _layout.any_wide(out, index)
        wide = wide or _layout.is_wide((1, cols), [weight.stride()])
        meta = dict(_tile(cols, rows, weight.element_size()), WIDE=wide)
        strided = (sizes, out_rows, index_rows, out.stride(-1), *weight.stride(), rows, cols, size)
        grid = _layout.cdiv(rows, meta["BM"]) * _layout.cdiv(cols, meta["BN"])

        def run(outs: Sequence[Tensor], keep: Any, arguments: Named) -> None:
            if grid:
                launch(embedding_gather, (grid,), (outs[0], arguments["weight"], arguments["input"], *strided), meta)

        return run


def _embedding(meaning: Callable[P, R]) -> _Embedding[P, R]:
    return _Embedding(meaning)


@_embedding
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight`` (V, D) selected by ``input`` (int32 or int64 of any shape): (..., D).

    An index outside [0, V) raises on the CPU; on an accelerator, where raising would wait for the device, its row is NaN.
    The gradient adds with atomics in float32 (float64 for float64), in no fixed order;
    ``torch.use_deterministic_algorithms(True)`` chooses a slower kernel with a fixed one. ``max_norm`` and ``sparse``
    have no kernel. Source: ``torch.nn.functional.embedding``.
    """
    if weight.ndim != 2:
        raise ShapeError(f"embedding: weight has {weight.ndim} dimensions; accepted: 2")
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise ArgumentError(f"embedding: padding_idx is {padding_idx}; accepted: None or a row of {list(weight.shape)}")
    return torch.nn.functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _gradient(
    grad: Tensor, input: Tensor, padding_idx: int | None, scale_grad_by_freq: bool, like: Mapping[str, Any],
    into: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    (size, cols), dtype = like["weight"]
    rows, acc, device = input.numel(), compute_type(dtype), grad.device
    strides = [tuple(input.stride()), tuple(grad.stride()[:-1])]
    sizes, (index_rows, grad_rows) = _layout.collapse(input.shape, strides)
    wide = _layout.any_wide(grad, input)
    padding = -1 if padding_idx is None else padding_idx % size
    count = None
    if scale_grad_by_freq:
        count = zeros((size,), torch.int32, device)
        meta: dict[str, Any] = dict(BM=256, WIDE=wide, num_warps=4)
        if rows:
            launch(embedding_count, (_layout.cdiv(rows, 256),), (count, input, sizes, index_rows, rows, size), meta)
    strided = (grad, input, count, sizes, grad_rows, index_rows, grad.stride(-1), rows, cols, size, padding)
    if torch.are_deterministic_algorithms_enabled():
        out = torch.empty((size, cols), dtype=dtype, device=device) if into is None else into
        bn = min(1024, _layout.next_power_of_2(max(cols, 1)))
        meta = dict(ACC=TRITON[acc], BM=1024, BN=bn, WIDE=wide or _layout.is_wide((size, cols), []), num_warps=4)
        if out.numel():
            launch(embedding_grad_ordered, (size * _layout.cdiv(cols, bn),), (out, *strided), meta)
        return {"weight": out}
    out = clear(into) if into is not None and acc == dtype else zeros((size, cols), acc, device)
    meta = dict(_tile(cols, rows, grad.element_size()), ACC=TRITON[acc], WIDE=wide)
    grid = _layout.cdiv(rows, meta["BM"]) * _layout.cdiv(cols, meta["BN"])
    if grid and out.numel():
        launch(embedding_grad, (grid,), (out, *strided), meta)
    if acc == dtype:
        return {"weight": out}
    narrow = torch.empty((size, cols), dtype=dtype, device=device) if into is None else into
    copy(out, narrow)
    return {"weight": narrow}


@embedding.shape_rule
def _(input: Tensor, weight: Tensor, *rest: Any) -> list[tuple[int, ...]] | None:
    size = tuple(input.shape)
    plain = weight.ndim == 2 and 0 not in (*size, *weight.shape) and input.stride() == _layout.contiguous(size)
    return [(*size, weight.shape[1])] if plain else None


embedding.set_gradient(_gradient, ("grad", "input", "padding_idx", "scale_grad_by_freq", "like"), of=("weight",))


@operator()
def embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> Tensor:
    """The gradient of :func:`embedding` with respect to the table of ``num_weights`` rows: rows of ``grad_output``, added.

    A negative ``padding_idx`` is none. Added in the order that :func:`embedding` describes.
    """
    if not grad_output.dtype.is_floating_point:
        raise DtypeError(f"embedding_dense_backward: grad_output must be floating point, given {describe(grad_output)}")
    found: Tensor = torch.ops.aten.embedding_dense_backward(
        grad_output, indices, num_weights, padding_idx, scale_grad_by_freq
    )
    return found


@embedding_dense_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int,
    scale_grad_by_freq: bool,
) -> None:  # fmt: skip
    (out,) = outs
    padding = padding_idx if 0 <= padding_idx < num_weights else None
    _gradient(grad_output, indices, padding, scale_grad_by_freq, {"weight": (tuple(out.shape), out.dtype)}, out)


def embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`embedding_dense_backward`; ``sparse`` gradients have no kernel."""
    if sparse:
        raise NoKernel("embedding_backward: sparse gradients have no kernel; accepted: sparse=False")
    return embedding_dense_backward(grad, indices, num_weights, padding_idx, scale_grad_by_freq)
