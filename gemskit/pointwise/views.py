"""What needs no kernel: views of the same memory, and values read by the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemskit._dtypes import Number

Sizes = int | Sequence[int]


def _listed(sizes: Sequence[Sizes]) -> Sequence[int]:
    """``f(x, 2, 3)`` or ``f(x, (2, 3))``."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes  # type: ignore[return-value]


def alias(input: Tensor) -> Tensor:
    """Another tensor of the same memory. Source: ``torch.ops.aten.alias``."""
    return torch.ops.aten.alias(input)  # type: ignore[no-any-return]


def as_strided(input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """A view of these sizes and strides. Source: ``torch.as_strided``."""
    return input.as_strided(tuple(size), tuple(stride), storage_offset)


def as_strided_(input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """Give ``input`` these sizes and strides. Source: ``torch.as_strided_``."""
    return input.as_strided_(tuple(size), tuple(stride), storage_offset)


def detach(input: Tensor) -> Tensor:
    """A view that takes no part in autograd. Source: ``torch.Tensor.detach``."""
    return input.detach()


def detach_(input: Tensor) -> Tensor:
    """Take ``input`` out of autograd. Source: ``torch.Tensor.detach_``."""
    return input.detach_()


def expand(input: Tensor, *size: Sizes) -> Tensor:
    """A view in which dimensions of size 1 repeat; -1 keeps a size. Source: ``torch.Tensor.expand``."""
    return input.expand(_listed(size))


def item(input: Tensor) -> Number:
    """The value of a tensor of one element; the host waits for it. Source: ``torch.Tensor.item``."""
    return input.item()


def lift_fresh(input: Tensor) -> Tensor:
    """``input`` itself: a fresh tensor is what it is. Source: ``torch.ops.aten.lift_fresh``."""
    return torch.ops.aten.lift_fresh(input)  # type: ignore[no-any-return]


def permute(input: Tensor, dims: Sequence[int]) -> Tensor:
    """A view with the dimensions in another order. Source: ``torch.permute``."""
    return input.permute(tuple(dims))


def select(input: Tensor, dim: int, index: int) -> Tensor:
    """A view of one index along ``dim``, which goes away. Source: ``torch.select``."""
    return input.select(dim, index)


def slice(input: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    """``input[start:end:step]`` along ``dim``. Source: ``torch.ops.aten.slice``."""
    return torch.ops.aten.slice(input, dim, start, end, step)  # type: ignore[no-any-return]


def split(input: Tensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Views of consecutive pieces along ``dim``, of one size or of these. Source: ``torch.split``."""
    sizes = split_size_or_sections if isinstance(split_size_or_sections, int) else list(split_size_or_sections)
    return tuple(torch.split(input, sizes, dim))


def split_with_sizes(input: Tensor, split_sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Views of consecutive pieces of these sizes along ``dim``. Source: ``torch.split_with_sizes``."""
    return tuple(input.split_with_sizes(list(split_sizes), dim))


def squeeze(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """A view without dimensions of size 1: all of them, or those in ``dim``. Source: ``torch.squeeze``."""
    return input.squeeze() if dim is None else input.squeeze(dim if isinstance(dim, int) else tuple(dim))


def squeeze_(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """Take dimensions of size 1 away from ``input``. Source: ``torch.Tensor.squeeze_``."""
    return input.squeeze_() if dim is None else input.squeeze_(dim if isinstance(dim, int) else tuple(dim))


def t(input: Tensor) -> Tensor:
    """The transpose of a matrix; a vector is itself. Source: ``torch.t``."""
    return input.t()


def t_(input: Tensor) -> Tensor:
    """Transpose ``input``. Source: ``torch.Tensor.t_``."""
    return input.t_()


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """A view with two dimensions exchanged. Source: ``torch.transpose``."""
    return input.transpose(dim0, dim1)


def transpose_(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """Exchange two dimensions of ``input``. Source: ``torch.Tensor.transpose_``."""
    return input.transpose_(dim0, dim1)


def unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of each index along ``dim``. Source: ``torch.unbind``."""
    return tuple(input.unbind(dim))


def unsafe_view(input: Tensor, size: Sequence[int]) -> Tensor:
    """:func:`view` for autograd to forget that it is one. Source: ``torch.ops.aten._unsafe_view``."""
    return torch.ops.aten._unsafe_view(input, tuple(size))  # type: ignore[no-any-return]


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """A view with a dimension of size 1 at ``dim``. Source: ``torch.unsqueeze``."""
    return input.unsqueeze(dim)


def unsqueeze_(input: Tensor, dim: int) -> Tensor:
    """Give ``input`` a dimension of size 1 at ``dim``. Source: ``torch.Tensor.unsqueeze_``."""
    return input.unsqueeze_(dim)


def view(input: Tensor, *shape: Sizes | torch.dtype) -> Tensor:
    """A view of another shape, or of the same bits as another dtype. Source: ``torch.Tensor.view``."""
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return input.view(shape[0])
    return input.view(_listed(shape))  # type: ignore[arg-type]


def assert_async(input: Tensor, assert_msg: str = "") -> None:
    """Fail, when the device comes to it, where the one element of ``input`` is zero. Source: ``torch._assert_async``."""
    torch._assert_async(input, assert_msg) if assert_msg else torch._assert_async(input)
