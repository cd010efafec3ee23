"""Scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit import backends
from gemskit._driver import tf32
from gemskit._layout import contiguous
from gemskit._op import operator
from gemskit.nn import _attention_host as host


@operator(floats=("query", "key", "value"))
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``softmax(scale * query @ key.mT + attn_mask) @ value``, never storing the scores.

    query (.., Hq, L, E), key (.., H, S, E), value (.., H, S, Ev); with ``enable_gqa`` each of the H heads serves Hq / H query
    heads. ``attn_mask`` is boolean (True takes part) or added, and broadcasts to (.., Hq, L, S); ``is_causal`` masks above the
    top-left diagonal; ``scale`` defaults to 1 / sqrt(E). A row without any score gives zeros. Head sizes up to 256.
    Source: ``torch.nn.functional.scaled_dot_product_attention`` (Dao 2023, FlashAttention-2).
    """
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


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


def _settings(query: Tensor) -> dict[str, Any]:
    config = backends.arch(None if query.device.type in ("cpu", "meta") else query.device).config("attention")
    return dict(config=config, precision="tf32" if tf32() else "ieee")


@scaled_dot_product_attention.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
) -> None:  # fmt: skip
    (out,) = outs
    rows = out.shape[:-1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty(
        (math.prod(rows[:-2]), *rows[-2:]) if len(rows) > 1 else (1, 1, *rows), dtype=wide, device=out.device
    )
    # Drawn on the device, without a host read, so that a captured graph draws anew on every replay.
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=out.device) if dropout_p else None
    host.forward(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        out=out, lse=lse, seed=seed, **_settings(query),
    )  # fmt: skip
    if keep is not None:
        keep["lse"] = lse
        if seed is not None:
            keep["seed"] = seed


@scaled_dot_product_attention.gradient_by
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor, lse: Tensor,
    seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, needs: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    inputs = dict(query=query, key=key, value=value, attn_mask=attn_mask)
    found = {n: torch.empty_like(t) for n, t in inputs.items() if t is not None and n in needs}
    host.backward(
        grad, query, key, value, attn_mask, out, lse, dropout_p, is_causal, scale, enable_gqa,
        grad_query=found.get("query"), grad_key=found.get("key"), grad_value=found.get("value"),
        grad_mask=found.get("attn_mask"), seed=seed, **_settings(query),
    )  # fmt: skip
    return found
