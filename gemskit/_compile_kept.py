"""The shapes and dtypes of what a forward pass keeps for the gradient, which :mod:`gemskit._compile` has to declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gemskit._dtypes import compute_type

if TYPE_CHECKING:
    from gemskit._op import Op

Spec: TypeAlias = tuple[tuple[int, ...], torch.dtype]


def rows(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    """Row-wise operators: a value for each row, in the type computed in."""
    # The family's module imports this one by way of the operator.
    from gemskit.nn._drive import columns, row_shape

    input: Tensor = named[op.tensors[0]]
    shape = row_shape(tuple(input.shape) or (1,), columns(named, input.ndim))
    saves: tuple[str, ...] = op.saves  # type: ignore[attr-defined]
    return dict.fromkeys(saves, (tuple(shape), compute_type(named.get("dtype") or input.dtype)))


def _attention(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    rows = tuple(out.shape[:-1])
    shape = (math.prod(rows[:-2]), *rows[-2:]) if len(rows) > 1 else (1, 1, *rows)
    return {"lse": (shape, compute_type(named["query"].dtype)), **_seed(op, named, out)}


def _seed(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    return {"seed": ((1,), torch.int64)} if named["dropout_p"] else {}


def _cross_entropy(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    input: Tensor = named["input"]
    dtype, dim = compute_type(out.dtype), min(1, input.ndim - 1)
    shape = tuple(1 if d == dim else n for d, n in enumerate(input.shape))
    kept: dict[str, Spec] = dict.fromkeys(("peak", "log_total", "mass"), (shape, dtype))
    deprecated = named["size_average"] is not None or named["reduce"] is not None
    if not (named["reduce"] is False or named["size_average"] is False) if deprecated else named["reduction"] == "mean":
        kept["denominator"] = ((1,) * input.ndim, dtype)
    return kept


def _group_norm(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    shape = (out.shape[0], named["num_groups"], *(1,) * (out.ndim - 1))
    return dict.fromkeys(("mean", "rstd"), (shape, compute_type(out.dtype)))


def _batch_norm(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    return {"rstd": ((out.shape[1],), compute_type(out.dtype))}


def _weight_norm(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    shape = tuple([n if named["dim"] != -1 and d == named["dim"] % out.ndim else 1 for d, n in enumerate(out.shape)])
    return {"length": (shape, compute_type(out.dtype))}


def _linear_cross_entropy(op: Op[..., Any], named: Mapping[str, Any], out: Tensor) -> dict[str, Spec]:
    # That module imports this one by way of the operator.
    from gemskit.nn.linear_loss import in_forward, keeps_logits

    input, (classes, features), dtype = named["input"], named["linear_weight"].shape, compute_type(out.dtype)
    rows = 1 if input.ndim == 1 else input.shape[0]
    kept: dict[str, Spec] = dict.fromkeys(("peak", "log_total", "mass"), ((rows, 1), dtype))
    if named["reduction"] == "mean":
        kept["denominator"] = ((1, 1), dtype)
    if keeps_logits(rows, classes, features):
        kept["logits"] = ((rows, (classes + 63) // 64 * 64), input.dtype)
    elif in_forward(named["prepare"], named["reduction"], rows, features):
        specs: dict[str, Spec] = {
            "input": ((rows, features), input.dtype), "linear_weight": ((classes, features), dtype),
            "linear_bias": ((classes,), dtype),
        }  # fmt: skip
        kept |= {f"d_{n}": specs[n] for n in named["prepare"].split()}
    return kept


#: The rule of operators that are not of the row-wise family, by name.
KEPT: dict[str, Callable[[Op[..., Any], Mapping[str, Any], Tensor], dict[str, Spec]]] = {
    "scaled_dot_product_attention": _attention,
    "scaled_dot_product_attention_lse": _seed,
    "flash_attention": _seed,
    "cross_entropy": _cross_entropy,
    "group_norm": _group_norm,
    "_batch_norm": _batch_norm,
    "weight_norm": _weight_norm,
    "fused_linear_cross_entropy": _linear_cross_entropy,
}
