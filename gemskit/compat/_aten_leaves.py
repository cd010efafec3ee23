"""ATen's own names for the parts of composite functions, in terms of gemskit's operators.

torch decomposes ``softmax``, ``layer_norm`` or ``embedding`` above autograd into operators with other signatures than the
functions have. Each function here has the name and the arguments of such an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import gemskit
from gemskit._dtypes import Number
from gemskit._op import Op
from gemskit.errors import NoKernel
from gemskit.nn._drive import row_shape

F = TypeVar("F", bound=Callable[..., Any])

#: By ATen name.
LEAVES: dict[str, Any] = {}


def leaf(row: str) -> Callable[[F], F]:
    """Register a function as an ATen operator that the function ``row`` (or "... backward") of gemskit selects."""

    def register(fn: F) -> F:
        fn.row = row  # type: ignore[attr-defined]
        LEAVES[fn.__name__] = fn
        return fn

    return register


# -- softmax --------------------------------------------------------------------------------------------------------------


def _wide(input: Tensor, half_to_float: bool) -> torch.dtype | None:
    if half_to_float and input.dtype is not torch.float16 and input.dtype is not torch.bfloat16:
        raise NoKernel(f"softmax: half_to_float is for halves, given {input.dtype}")
    return torch.float32 if half_to_float else None


@leaf("softmax")
def _softmax(input: Tensor, dim: int, half_to_float: bool, *, out: Tensor | None = None) -> Tensor:
    return gemskit.softmax(input, dim, _wide(input, half_to_float), out=out)


@leaf("log_softmax")
def _log_softmax(input: Tensor, dim: int, half_to_float: bool, *, out: Tensor | None = None) -> Tensor:
    return gemskit.log_softmax(input, dim, _wide(input, half_to_float), out=out)


@leaf("safe_softmax")
def _safe_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return gemskit.safe_softmax(input, dim, dtype)


# -- norms ----------------------------------------------------------------------------------------------------------------


def _backward(
    op: Op[..., Any], values: tuple[Any, ...], keep: dict[str, Any], grad: Tensor, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """The gradients of an operator by parameter, as autograd would ask for them."""
    saved = op._saved(values, (), keep)
    tensors = [v for v, _ in saved.values() if isinstance(v, Tensor)]
    found = op._gradients.call(op._how(values, saved), tuple(needs), grad, *tensors)
    return tuple(found)


def _rows(input: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    return row_shape(input.shape, range(input.ndim - len(normalized_shape), input.ndim))


@leaf("layer_norm")
def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (out,), keep = gemskit.layer_norm._trainings.call(input, tuple(normalized_shape), weight, bias, eps)
    return out, keep["mean"], keep["rstd"]


@leaf("layer_norm backward")
def native_layer_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = gemskit.layer_norm
    values = (input, tuple(normalized_shape), weight, bias, 0.0)
    needs = (output_mask[0], False, output_mask[1], output_mask[2], False)
    shape = _rows(input, normalized_shape)
    keep = {"mean": mean.view(shape), "rstd": rstd.view(shape)}
    found = _backward(op, values, keep, grad_out, needs)
    return found[0], found[2], found[3]


@leaf("rms_norm")
def _fused_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    (out,), keep = gemskit.rms_norm._trainings.call(input, tuple(normalized_shape), weight, eps)
    return out, keep["rstd"]


@leaf("rms_norm backward")
def _fused_rms_norm_backward(
    grad_out: Tensor, input: Tensor, normalized_shape: Sequence[int], rstd: Tensor, weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values = (input, tuple(normalized_shape), weight, None)
    keep = {"rstd": rstd.view(_rows(input, normalized_shape))}
    found = _backward(gemskit.rms_norm, values, keep, grad_out, (output_mask[0], False, output_mask[1], False))
    return found[0], found[2]


# -- rows by index --------------------------------------------------------------------------------------------------------


@leaf("embedding")
def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    # The last three only matter to the gradient.
    return gemskit.embedding(indices, weight)


@leaf("embedding backward")
def embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    padding = padding_idx if padding_idx >= 0 else None
    weight = (num_weights, grad_output.shape[-1])
    like = (("input", tuple(indices.shape), indices.dtype), ("weight", weight, grad_output.dtype))
    how = (("input",), ("padding_idx", "scale_grad_by_freq"), (padding, scale_grad_by_freq), like)
    needs = (False, True, False, False, False, False, False)
    found: Tensor = gemskit.embedding._gradients.call(how, needs, grad_output, indices)[1]
    return found


# -- the rest -------------------------------------------------------------------------------------------------------------


@leaf("vector_norm")
def linalg_vector_norm(
    input: Tensor, ord: Number = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *,
    dtype: torch.dtype | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return gemskit.vector_norm(input, ord, None if dim is None else list(dim), keepdim, dtype=dtype, out=out)


@leaf("pad")
def constant_pad_nd(input: Tensor, pad: Sequence[int], value: Number = 0) -> Tensor:
    if not input.dtype.is_floating_point and value != 0:
        raise NoKernel("pad: a value other than 0 is for floating-point tensors")
    return gemskit.pad(input, pad, "constant", float(value))


@leaf("to_copy")
def _to_copy(
    input: Tensor, *, dtype: torch.dtype | None = None, layout: torch.layout | None = None,
    device: torch.device | None = None, pin_memory: bool | None = None, non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    if pin_memory or layout not in (None, torch.strided) or device not in (None, input.device):
        raise NoKernel("to_copy: no kernel copies to another device or layout")
    return gemskit.to_copy(input, dtype=dtype, memory_format=memory_format)
