"""Functions of FlagGems that mean something else than gemskit's of the same name, or that gemskit composes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gemskit
from gemskit.errors import ArgumentError

__all__ = [
    "_unique2",
    "alias_copy_out",
    "apply_rotary_pos_emb",
    "batch_norm",
    "constant_pad_nd",
    "cutlass_scaled_mm",
    "dgeglu",
    "dreglu",
    "dropout",
    "dswiglu",
    "embedding",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "lift_fresh_copy_out",
    "log_softmax",
    "max_dim",
    "min_dim",
    "mse_loss",
    "rms_norm_backward",
    "rms_norm_forward",
    "softmax",
    "unique_consecutive",
    "weight_norm_interface",
]


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, rotary_interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`gemskit.apply_rotary_pos_emb`; overwrites ``q`` and ``k`` if ``inplace``."""
    rotate = gemskit.apply_rotary_pos_emb_ if inplace else gemskit.apply_rotary_pos_emb
    return rotate(q, k, cos, sin, position_ids, rotary_interleaved)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`gemskit.layer_norm`, and the mean and ``1 / sqrt(var + eps)`` of every row, flat, in the dtype of ``input``.

    The statistics have no gradient and cost kernels of their own: call :func:`gemskit.layer_norm` where they are not used.
    """
    with torch.no_grad():
        var, mean = gemskit.var_mean(input, _last(normalized_shape), correction=0)
        rstd = gemskit.rsqrt(gemskit.add(var, eps))
    return gemskit.layer_norm(input, normalized_shape, weight, bias, eps), mean.reshape(-1), rstd.reshape(-1)


def group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gemskit.group_norm`, and mean and ``1 / sqrt(var + eps)`` (N, group); these as in :func:`layer_norm`."""
    with torch.no_grad():
        var, mean = gemskit.var_mean(input.detach().reshape(N, group, C // max(group, 1) * HxW), 2, correction=0)
        rstd = gemskit.rsqrt(gemskit.add(var, eps))
    return gemskit.group_norm(input, group, weight, bias, eps), mean, rstd


def batch_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`gemskit.batch_norm`, and the mean and ``1 / sqrt(var + eps)`` it used, which have no gradient.

    They cost kernels of their own in training, as in :func:`layer_norm`.
    """
    with torch.no_grad():
        mean, var = running_mean, running_var
        if training or mean is None or var is None:
            var, mean = gemskit.var_mean(input.detach(), (0, *range(2, input.ndim)), correction=0)
        else:
            mean = gemskit.clone(mean.detach())
        rstd = gemskit.rsqrt(gemskit.add(var, eps))
    return gemskit.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), mean, rstd


def instance_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`gemskit.instance_norm`; ``cudnn_enable`` says nothing."""
    return gemskit.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`gemskit.weight_norm`, and the norms in float32, which have no gradient and cost a kernel of their own."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    with torch.no_grad():
        norms = gemskit.vector_norm(v.detach(), 2, others, True, dtype=torch.promote_types(v.dtype, torch.float32))
    return gemskit.weight_norm(v, g, dim), norms


def rms_norm_backward(
    dy: Tensor, x: Tensor, inv_rms: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor | None, ...]:
    """:func:`gemskit.rms_norm_backward`; ``eps`` is in ``inv_rms``."""
    return gemskit.rms_norm_backward(dy, x, normalized_shape, inv_rms, weight)


def rms_norm_forward(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`gemskit.rms_norm` and ``1 / sqrt(mean(x**2) + eps)`` of every row, flat, in float32; for tests of gradients."""
    with torch.no_grad():
        square = gemskit.square(gemskit.to_copy(x, dtype=torch.float32))
        inv_rms = gemskit.rsqrt(gemskit.add(gemskit.mean(square, _last(normalized_shape)), eps))
    return gemskit.rms_norm(x, normalized_shape, weight, eps), inv_rms.reshape(-1)


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def dropout(input: Tensor, p: float, train: bool = True) -> tuple[Tensor, Tensor]:
    """``(input * mask / (1 - p), mask)``, as ``torch.ops.aten.native_dropout``; the mask is stored."""
    if not train or p == 0:
        return gemskit.clone(input), gemskit.ones_like(input, dtype=torch.bool)
    if p == 1:
        return gemskit.zeros_like(input), gemskit.zeros_like(input, dtype=torch.bool)
    mask = gemskit.ge(gemskit.rand(input.shape, device=input.device), p)
    return gemskit.native_dropout_backward(input, mask, 1 / (1 - p)), mask


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """:func:`gemskit.embedding` in ATen's order; ``padding_idx=-1`` is none."""
    padding = None if padding_idx == -1 else padding_idx
    return gemskit.embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def softmax(self: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """:func:`gemskit.softmax`; the result is float32 if ``half_to_float``."""
    return gemskit.softmax(self, dim, torch.float32 if half_to_float else None)


def log_softmax(self: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """:func:`gemskit.log_softmax`; the result is float32 if ``half_to_float``."""
    return gemskit.log_softmax(self, dim, torch.float32 if half_to_float else None)


def max_dim(inp: Tensor, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The largest values along ``dim`` and their indices."""
    return gemskit.max(inp, _required(dim), keepdim)


def min_dim(inp: Tensor, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest values along ``dim`` and their indices."""
    return gemskit.min(inp, _required(dim), keepdim)


def _required(dim: int | None) -> int:
    if dim is None:
        raise ArgumentError("flag_gems: dim is None; accepted: an int")
    return dim


def _unique2(
    in0: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(values, inverse, counts)``, None for what was not asked."""
    return _three(gemskit.unique(in0, sorted, return_inverse, return_counts), return_inverse, return_counts)


def unique_consecutive(
    input: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(values, inverse, counts)``, None for what was not asked."""
    return _three(gemskit.unique_consecutive(input, return_inverse, return_counts, dim), return_inverse, return_counts)


def _three(found: Any, inverse: bool, counts: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    values, *rest = found if isinstance(found, tuple) else (found,)
    asked = iter(rest)
    return values, next(asked) if inverse else None, next(asked) if counts else None


def constant_pad_nd(self: Tensor, pad_list: Sequence[int], value: float = 0) -> Tensor:
    """:func:`gemskit.pad` with a constant."""
    return gemskit.pad(self, pad_list, "constant", value)


def mse_loss(inp: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """:func:`gemskit.mse_loss`; ``reduction`` is 0 for none, 1 for the mean, 2 for the sum."""
    return gemskit.mse_loss(inp, target, reduction=("none", "mean", "sum")[reduction])


def alias_copy_out(x: Tensor, out: Tensor) -> Tensor:
    """Copy ``x`` into ``out``."""
    return gemskit.copy_(out, x)


def lift_fresh_copy_out(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy ``x`` into ``out``, into a new tensor if None."""
    return gemskit.clone(x) if out is None else gemskit.copy_(out, x)


def cutlass_scaled_mm(
    c: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """:func:`gemskit.cutlass_scaled_mm` in the dtype of ``c``, which is overwritten and returned."""
    return gemskit.copy_(c, gemskit.cutlass_scaled_mm(a, b, a_scale, b_scale, c.dtype, bias))


def dswiglu(grad_output: Tensor, input_tensor: Tensor, quantizer: None = None) -> Tensor:
    """The gradient of :func:`gemskit.swiglu`; there is no quantizer."""
    return _gradient(gemskit.swiglu, grad_output, input_tensor)


def dgeglu(grad_output: Tensor, input_tensor: Tensor, quantizer: None = None) -> Tensor:
    """The gradient of :func:`gemskit.geglu`; there is no quantizer."""
    return _gradient(gemskit.geglu, grad_output, input_tensor)


def dreglu(grad_output: Tensor, input_tensor: Tensor, quantizer: None = None) -> Tensor:
    """The gradient of :func:`gemskit.reglu`; there is no quantizer."""
    return _gradient(gemskit.reglu, grad_output, input_tensor)


def _gradient(gate: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(gate(x), x, grad)[0]
