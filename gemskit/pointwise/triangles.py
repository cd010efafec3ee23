"""Triangles and diagonals of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._op import operator
from gemskit.pointwise._place import copy, fit, place, stand_in


@operator(aten="triu")
def triu(input: Tensor, diagonal: int = 0, *, out: Tensor | None = None) -> Tensor:
    """The last two dimensions where ``column - row >= diagonal``, elsewhere 0. Source: ``torch.triu``."""
    return torch.triu(input, diagonal)


@operator(aten="tril")
def tril(input: Tensor, diagonal: int = 0, *, out: Tensor | None = None) -> Tensor:
    """The last two dimensions where ``column - row <= diagonal``, elsewhere 0. Source: ``torch.tril``."""
    return torch.tril(input, diagonal)


def _triangle(kind: str, out: Tensor, input: Tensor, diagonal: int) -> Tensor:
    # In place only zeros are written, nothing is read.
    return place(out, None if out is input else input, band=(kind, diagonal))


@triu.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, diagonal: int) -> None:
    _triangle("upper", outs[0], input, diagonal)


@triu.gradient_by
def _(grad: Tensor, diagonal: int) -> dict[str, Tensor]:
    return {"input": _triangle("upper", torch.empty_like(grad), grad, diagonal)}


@tril.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, diagonal: int) -> None:
    _triangle("lower", outs[0], input, diagonal)


@tril.gradient_by
def _(grad: Tensor, diagonal: int) -> dict[str, Tensor]:
    return {"input": _triangle("lower", torch.empty_like(grad), grad, diagonal)}


triu_ = triu.inplace
tril_ = tril.inplace


def _on_diagonal(out: Tensor, values: Tensor, offset: int, dim1: int, dim2: int) -> Tensor:
    """``values`` on a diagonal of ``out``, elsewhere 0."""
    matrix = out.movedim((dim1, dim2), (-2, -1))
    # Above the main diagonal the row counts the values, below the column does.
    along = values.unsqueeze(-1 if offset >= 0 else -2)
    place(matrix, along.expand(*values.shape[:-1], *_square(values.shape[-1], offset)), band=("diagonal", offset))
    return out


def _square(length: int, offset: int) -> tuple[int, int]:
    return (length, length + 1) if offset >= 0 else (length + 1, length)


@operator(aten="diag_embed")
def diag_embed(input: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """The last dimension of ``input`` on the diagonal ``offset`` of matrices in ``dim1`` and ``dim2``, elsewhere 0.

    Source: ``torch.diag_embed``.
    """
    return torch.diag_embed(input, offset, dim1, dim2)


@diag_embed.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, offset: int, dim1: int, dim2: int) -> None:
    _on_diagonal(outs[0], input, offset, dim1, dim2)


@diag_embed.gradient_by
def _(grad: Tensor, offset: int, dim1: int, dim2: int) -> dict[str, Tensor]:
    return {"input": grad.diagonal(offset, dim1, dim2)}


@operator(aten="diagonal_backward")
def diagonal_backward(grad_output: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """The gradient of ``diagonal(input, offset, dim1, dim2)``: ``grad_output`` there, elsewhere 0, in ``input_sizes``."""
    fit("diagonal_backward", grad_output, stand_in(input_sizes).diagonal(offset, dim1, dim2))
    return torch.ops.aten.diagonal_backward(grad_output, input_sizes, offset, dim1, dim2)  # type: ignore[no-any-return]


@diagonal_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_output: Tensor, input_sizes: Sequence[int], offset: int, dim1: int,
    dim2: int,
) -> None:  # fmt: skip
    _on_diagonal(outs[0], grad_output, offset, dim1, dim2)


@diagonal_backward.gradient_by
def _(grad: Tensor, offset: int, dim1: int, dim2: int) -> dict[str, Tensor]:
    return {"grad_output": grad.diagonal(offset, dim1, dim2)}


@operator(aten="diag")
def diag(input: Tensor, diagonal: int = 0, *, out: Tensor | None = None) -> Tensor:
    """A copy of a matrix's diagonal, or a matrix with the vector ``input`` on it, elsewhere 0. Source: ``torch.diag``."""
    return torch.diag(input, diagonal)


@diag.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, diagonal: int) -> None:
    if input.ndim == 1:
        _on_diagonal(outs[0], input, diagonal, 0, 1)
    else:
        copy(input.diagonal(diagonal), outs[0])


@diag.gradient_by
def _(grad: Tensor, diagonal: int, like: dict[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    if len(shape) == 1:
        return {"input": grad.diagonal(diagonal)}
    return {"input": _on_diagonal(torch.empty(shape, dtype=dtype, device=grad.device), grad, diagonal, 0, 1)}
