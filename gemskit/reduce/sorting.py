"""Sorted elements, and where they were. NaN is largest; equal elements keep their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit.reduce._keys import Rows
from gemskit.reduce._select import topk_into
from gemskit.reduce._sort import sort_into


@operator(aten="sort.stable", named=torch.return_types.sort)
def sort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, *,
    out: tuple[Tensor, Tensor] | None = None,
) -> torch.return_types.sort:  # fmt: skip
    """The elements in order along ``dim``, and their indices (int64). Source: ``torch.sort``.

    NaN is largest. Equal elements, ``-0.0`` and ``0.0`` among them, keep their order whether ``stable`` or not. Results:
    (values, indices) of the shape of ``input``. The gradient of a value goes to where it came from.
    """
    return torch.sort(input, dim=dim, descending=descending, stable=True)


@sort.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, dim: int, descending: bool, stable: bool) -> None:
    sort_into(outs[0], outs[1], input, dim, descending)


@operator(aten="argsort.stable")
def argsort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """The indices (int64) that sort ``input`` along ``dim``: those of :func:`sort`. Source: ``torch.argsort``."""
    return torch.argsort(input, dim=dim, descending=descending, stable=True)


@argsort.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, dim: int, descending: bool, stable: bool) -> None:
    sort_into(None, outs[0], input, dim, descending)


@operator(aten="topk", named=torch.return_types.topk)
def topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *,
    out: tuple[Tensor, Tensor] | None = None,
) -> torch.return_types.topk:  # fmt: skip
    """The ``k`` largest elements along ``dim`` (smallest, if not ``largest``), and their indices. Source: ``torch.topk``.

    They come in order, whether ``sorted`` or not. NaN is largest; of equal elements those with smaller indices are taken,
    and come first. The gradient of a value goes to where it came from.
    """
    size = input.shape[dim] if input.ndim else 1
    if not 0 <= k <= size:
        raise IndexError(f"selected index k={k} is out of range: dim {dim} has {size} elements")
    values, indices = torch.sort(input, dim=dim, descending=largest, stable=True)
    if input.ndim:
        return torch.return_types.topk((values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()))
    return torch.return_types.topk((values, indices))


@topk.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, k: int, dim: int, largest: bool, sorted: bool
) -> None:  # fmt: skip
    topk_into(outs[0], outs[1], input, k, dim, largest)


@jit
def place_grad(
    dx, grad, indices, row_sizes, dx_rows, g_rows, i_rows, dx_col, g_col, i_col, rows, cols,
    CLEAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store every gradient where its element came from; with CLEAR zeros everywhere."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(cols, BN)
    row = ((i // blocks) * BM + tl.arange(0, BM))[:, None]
    col = ((i % blocks) * BN + tl.arange(0, BN))[None, :]
    live = (row < rows) & (col < cols)
    out = dx + offset(row, row_sizes, dx_rows)
    if CLEAR:
        tl.store(out + col * dx_col, tl.zeros((BM, BN), dx.dtype.element_ty), live)
    else:
        value = tl.load(grad + offset(row, row_sizes, g_rows) + col * g_col, live)
        at = tl.load(indices + offset(row, row_sizes, i_rows) + col * i_col, live)
        tl.store(out + at * dx_col, value, live)


def _placed(grads: tuple[Tensor, ...], dim: int, out1: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    grad = grads[0]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    # Of topk not every element has a gradient.
    for clear in (True, False) if grad.shape != dx.shape else (False,):
        cols = dx.shape[dim] if clear else out1.shape[dim] if out1.ndim else 1
        if 0 in dx.shape or not cols:
            continue
        layout = Rows.of(dx, grad, out1, dim)
        bn = min(1024, _layout.next_power_of_2(cols))
        bm = min(1024 // bn, _layout.next_power_of_2(layout.rows))
        launch(
            place_grad, (_layout.cdiv(layout.rows, bm) * _layout.cdiv(cols, bn),),
            (dx, grad, out1, layout.sizes, *layout.by_row, *layout.by_col, layout.rows, cols),
            dict(CLEAR=clear, BM=bm, BN=bn, WIDE=layout.wide, num_warps=4),
        )  # fmt: skip
    return {"input": dx}


sort.gradient_by(_placed)
topk.gradient_by(_placed)
