"""Scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit import backends
from gemskit._dtypes import compute_type
from gemskit._layout import contiguous
from gemskit._op import operator
from gemskit.nn import _attention_dense as dense


def launch_numbers(query: Tensor) -> dict[str, int]:
    """What the table of the device says of attention."""
    return backends.arch(None if query.device.type in ("cpu", "meta") else query.device).config("attention")


def draw(p: float, device: torch.device) -> Tensor | None:
    """A seed of dropout, drawn on the device without a host read, so that a captured graph draws anew on every replay."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if p else None


def _diagonal(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, bottom_right: bool) -> Any:
    """(attn_mask, is_causal) for torch, whose own causal mask is the top-left one."""
    if not (is_causal and bottom_right):
        return attn_mask, is_causal
    if attn_mask is not None:
        raise RuntimeError("explicit attn_mask should not be set when is_causal=True")
    length, size = query.shape[-2], key.shape[-2]
    return torch.ones(length, size, dtype=torch.bool, device=query.device).tril(size - length), False


@operator(floats=("query", "key", "value"))
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, bottom_right: bool = False,
) -> Tensor:  # fmt: skip
    """``softmax(scale * query @ key.mT + attn_mask) @ value``, never storing the scores.

    query (.., Hq, L, E), key (.., H, S, E), value (.., H, S, Ev); with ``enable_gqa`` each of the H heads serves Hq / H query
    heads. ``attn_mask`` is boolean (True takes part) or added, and broadcasts to (.., Hq, L, S); ``is_causal`` masks above the
    top-left diagonal, with ``bottom_right`` above the one that ends in the last column; ``scale`` defaults to 1 / sqrt(E).
    A row without any score gives zeros. Head sizes up to 256.
    Source: ``torch.nn.functional.scaled_dot_product_attention`` (Dao 2023, FlashAttention-2).
    """
    attn_mask, is_causal = _diagonal(query, key, attn_mask, is_causal, bottom_right)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@operator(floats=("query", "key", "value"))
def scaled_dot_product_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, bottom_right: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`scaled_dot_product_attention` and the log-sum-exp of each row's scores, (.., Hq, L); both have gradients.

    The second result is float32, float64 for float64, and -inf for a row without any score.
    Source: the second result of ``torch.ops.aten._scaled_dot_product_flash_attention``.
    """
    attn_mask, is_causal = _diagonal(query, key, attn_mask, is_causal, bottom_right)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    wide = compute_type(query.dtype)
    if enable_gqa and key.dim() > 2:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.to(wide) @ key.to(wide).mT * (1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    lse = torch.logsumexp(scores, -1).expand(out.shape[:-1])
    return out, lse.contiguous()


@scaled_dot_product_attention.shape_rule
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> list[tuple[int, ...]] | None:
    sizes = [tuple(t.shape) for t in (query, key, value)]
    q, k, v = sizes
    plain = (
        attn_mask is None and len(q) == 4 and q[0] == k[0] and q[3] == k[3] and k[:3] == v[:3] and 0 not in (*q, *k, *v)
    )
    if not plain or any(t.stride() != contiguous(t.shape) for t in (query, key, value)):
        return None
    return [(*q[:3], v[3])] if q[1] == k[1] or (rest[3] and q[1] % k[1] == 0) else None


def _flat_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the kernels' log-sum-exp, (batch, heads, rows), for a result of ``shape``."""
    rows = shape[:-1]
    return (math.prod(rows[:-2]), *rows[-2:]) if len(rows) > 1 else (1, 1, *rows)


@scaled_dot_product_attention.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
    bottom_right: bool,
) -> None:  # fmt: skip
    (out,) = outs
    lse = torch.empty(_flat_rows(tuple(out.shape)), dtype=compute_type(query.dtype), device=out.device)
    seed = draw(dropout_p, out.device)
    dense.forward(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bottom_right,
        out=out, lse=lse, seed=seed, config=launch_numbers(query),
    )  # fmt: skip
    if keep is not None:
        keep["lse"] = lse
        if seed is not None:
            keep["seed"] = seed


@scaled_dot_product_attention_lse.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
    bottom_right: bool,
) -> None:  # fmt: skip
    out, lse = outs
    seed = draw(dropout_p, out.device)
    dense.forward(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bottom_right,
        out=out, lse=lse.view(_flat_rows(tuple(out.shape))), seed=seed, config=launch_numbers(query),
    )  # fmt: skip
    if keep is not None and seed is not None:
        keep["seed"] = seed


def _gradients(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, bottom_right: bool, needs: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    inputs = dict(query=query, key=key, value=value, attn_mask=attn_mask)
    found = {n: torch.empty_like(t) for n, t in inputs.items() if t is not None and n in needs}
    dense.backward(
        grad, query, key, value, attn_mask, out, lse, dropout_p, is_causal, scale, enable_gqa, bottom_right,
        grad_lse=grad_lse, grad_query=found.get("query"), grad_key=found.get("key"), grad_value=found.get("value"),
        grad_mask=found.get("attn_mask"), seed=seed, config=launch_numbers(query),
    )  # fmt: skip
    return found


@scaled_dot_product_attention.gradient_by
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor, lse: Tensor,
    seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, bottom_right: bool,
    needs: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    return _gradients(
        grad, None, query, key, value, attn_mask, out, lse, seed, dropout_p, is_causal, scale, enable_gqa,
        bottom_right, needs,
    )  # fmt: skip


@scaled_dot_product_attention_lse.gradient_by
def _(
    grads: tuple[Tensor, ...], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor,
    out1: Tensor, seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
    bottom_right: bool, needs: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    flat = _flat_rows(tuple(out.shape))
    return _gradients(
        grads[0], grads[1].reshape(flat), query, key, value, attn_mask, out, out1.view(flat), seed, dropout_p,
        is_causal, scale, enable_gqa, bottom_right, needs,
    )  # fmt: skip
