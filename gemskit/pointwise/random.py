"""Drawn values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import _launch
from gemskit.errors import ArgumentError
from gemskit.pointwise._drive import pointwise


@triton.jit
def _scale(seed, index, p):
    """What an element is multiplied by: 0 with probability ``p``, else ``1 / (1 - p)``; for int32 and int64 ``index`` alike."""
    low = index.to(tl.uint32, bitcast=index.dtype.primitive_bitwidth == 32)
    high = (index.to(tl.int64) >> 32).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, low, high, high * 0, high * 0)
    return tl.where(tl.uint_to_uniform_float(bits) >= p, 1 / (1 - p), 0)


@pointwise(keep=("seed",), random=True)
def _dropout(input: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """:func:`dropout` with the mask that ``seed`` (int64, 0-dim) draws; ``None`` draws from torch, on CPU tensors only."""
    return torch.nn.functional.dropout(input, p)


@_dropout.formula
@triton.jit
def _(input, p, seed, index):
    return input * _scale(seed, index, p)


@_dropout.gradient
@triton.jit
def _(grad, p, seed, index):
    return grad * _scale(seed, index, p)


def _seed(input: Tensor) -> Tensor | None:
    """A seed on the device: drawn from torch's generator there without a host read, so that a captured graph draws anew."""
    if not torch.compiler.is_compiling() and not _launch.has_kernels(input.device):
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device)


def _checked(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ArgumentError(f"{name}: p is the probability of an element to be zeroed, between 0 and 1; given {p!r}")
    return float(p)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``; ``input`` itself if not ``training``.

    The mask follows ``torch.manual_seed`` and the logical index of an element, not its memory layout; it is drawn again for
    the gradient, never stored. With ``inplace`` the input is overwritten. Source: ``torch.nn.functional.dropout``.
    """
    if inplace:
        return dropout_(input, p, training)
    p = _checked("dropout", p)
    return _dropout(input, p, _seed(input)) if training and p else input


def dropout_(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """In-place :func:`dropout`: overwrites ``input``. Source: ``torch.dropout_``."""
    p = _checked("dropout_", p)
    return _dropout_(input, p, _seed(input)) if training and p else input


_dropout_ = _dropout.inplace
