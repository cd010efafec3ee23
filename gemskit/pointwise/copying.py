"""Copies: of layouts, of dtypes, into another tensor. Between devices torch copies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit._jit import jit
from gemskit._op import P, R
from gemskit.pointwise._drive import Pointwise, pointwise

#: Memory formats by the names that operators know them by: the launcher of replays takes strings.
_FORMATS = {
    "preserve": torch.preserve_format,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_NAMES: dict[torch.memory_format | None, str] = {None: "preserve", **{v: k for k, v in _FORMATS.items()}}


class _Copying(Pointwise[P, R]):
    """An operator whose result is laid out as its last argument says."""

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        # The others are not row-major, even where their strides look so.
        return super().shapes(values) if values[-1] in ("preserve", "contiguous") else None


def _copying(*, aten: str | None = None) -> Callable[[Callable[P, R]], _Copying[P, R]]:
    return functools.partial(_Copying, aten=aten)


@_copying(aten="clone")
def _clone(input: Tensor, memory_format: str) -> Tensor:
    """A copy of ``input`` in the memory format of that name."""
    return torch.clone(input, memory_format=_FORMATS[memory_format])


@_copying(aten="_to_copy")
def _to_copy(input: Tensor, dtype: torch.dtype | None, memory_format: str) -> Tensor:
    """A copy of ``input`` in ``dtype`` and the memory format of that name."""
    return input.to(dtype or input.dtype, copy=True, memory_format=_FORMATS[memory_format])


@_to_copy.formula
@_clone.formula
@jit
def _(input):
    return input


@_to_copy.gradient
@_clone.gradient
@jit
def _(grad):
    return grad


def clone(input: Tensor, *, memory_format: torch.memory_format | None = torch.preserve_format) -> Tensor:
    """A copy of ``input``: in its strides where these leave no gaps, row-major otherwise, or in ``memory_format``.

    Source: ``torch.clone``.
    """
    return _clone(input, _NAMES[memory_format])


@pointwise(aten="copy")
def _copy(input: Tensor, src: Tensor) -> Tensor:
    """A tensor like ``input`` with the values of ``src``, which is broadcast and converted."""
    return input.clone().copy_(src)


@_copy.formula
@jit
def _(src):
    return src


@_copy.gradient
@jit
def _(grad):
    return tl.zeros_like(grad), grad


_copy_ = _copy.inplace


def copy(input: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """A tensor like ``input`` with the values of ``src``, which is broadcast, converted, and brought to its device.

    Source: ``torch.ops.aten.copy``.
    """
    if input.device != src.device:
        src = src.to(input.device, non_blocking=non_blocking)
    return _copy(input, src)


def copy_(input: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """Overwrite ``input`` with ``src``, which is broadcast and converted to its dtype: floats to ints by truncation.

    ``src`` may be on another device; then torch copies. Source: ``torch.Tensor.copy_``.
    """
    if input.device != src.device:
        return input.copy_(src, non_blocking)
    return input if input is src else _copy_(input, src)


def contiguous(input: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``input`` itself where it is laid out in ``memory_format``, else a copy that is. Source: ``torch.Tensor.contiguous``."""
    return input if input.is_contiguous(memory_format=memory_format) else clone(input, memory_format=memory_format)


def to_copy(
    input: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    non_blocking: bool = False, memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    """A copy of ``input`` in another dtype, memory format, or on another device. Source: ``torch.ops.aten._to_copy``."""
    if device is None or torch.empty(0, device=device).device == input.device:
        return _to_copy(input, dtype, _NAMES[memory_format])
    # What moves is converted on the device it comes from.
    formats = {} if memory_format is None else {"memory_format": memory_format}
    return input.to(device=device, dtype=dtype or input.dtype, non_blocking=non_blocking, copy=True, **formats)


def alias_copy(input: Tensor) -> Tensor:
    """A copy of ``input``. Source: ``torch.alias_copy``."""
    return clone(input)


def lift_fresh_copy(input: Tensor) -> Tensor:
    """A copy of ``input``. Source: ``torch.ops.aten.lift_fresh_copy``."""
    return clone(input)


def t_copy(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A copy of the transpose of a matrix; vectors are copied. Source: ``torch.t_copy``."""
    turned = input.t()
    if out is None:
        return clone(turned, memory_format=torch.contiguous_format)
    if out.shape != turned.shape:
        out.resize_(turned.shape)
    return copy_(out, turned)
